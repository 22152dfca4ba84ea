"""Rules about the block `zero_optimization`: what the plan sets there, and what a user may not."""

from collections.abc import Mapping
from typing import Any

from pipeline.plan.cost.gathers import gathers
from pipeline.plan.cost.memory import bucket_elements
from pipeline.plan.given.adapter_counts import adapter_counts
from pipeline.plan.rules.rule import PlanContext, Rule, issue

_DEEPSPEED = "deepspeedai/DeepSpeed"
_ZERO = "DeepSpeed 0.19.8 runtime/zero"


def _hpz(s: PlanContext) -> int:
    asked = s.settings.hpz_partition_size
    found = s.zero.get("zero_hpz_partition_size") or 1
    return max(int(found), 1 if asked == "auto" else asked)


def _threshold(s: PlanContext) -> int:
    return int(s.zero.get("stage3_param_persistence_threshold", 100_000))


def _bucket(s: PlanContext) -> int:
    return int(s.zero.get("reduce_bucket_size", 500_000_000))


def _gathers_too_much(s: PlanContext) -> bool:
    planned = gathers(s.shape, s.settings)
    limits = (
        ("stage3_max_live_parameters", planned.block),
        ("stage3_prefetch_bucket_size", planned.block),
        ("stage3_max_reuse_distance", planned.reuse_distance),
    )
    return s.layout.is_sharded and any(s.zero.get(key, most) > most for key, most in limits)


def _has_no_leaves(s: PlanContext) -> bool:
    leaves: Mapping[str, Any] | None = s.zero.get("leaf_module")  # not there: DeepSpeed's own list
    is_emptied = leaves is not None and "classes" in leaves and not any(leaves.values())
    return s.shape.num_experts > 0 and s.layout.is_sharded and is_emptied


ZERO_RULES: tuple[Rule[PlanContext], ...] = (
    Rule(
        id="persistence-threshold",
        level="set",
        applies=lambda s: (
            s.layout.is_sharded
            and _threshold(s) >= adapter_counts(s.shape, s.settings).largest_matrix
        ),
        reason="at ZeRO-3 every matrix above stage3_param_persistence_threshold is gathered for "
        "each layer",
        remedy="it is at least the largest adapter matrix, so adapters stay whole on every rank",
        source=f"{_ZERO}/stage3.py:2840",
    ),
    Rule(
        id="persistence-too-low",
        level="warn",
        applies=lambda s: (
            s.layout.is_sharded
            and _threshold(s) < adapter_counts(s.shape, s.settings).largest_matrix
        ),
        reason="zero_optimization.stage3_param_persistence_threshold is below the largest adapter "
        "matrix, so adapters are gathered for each layer",
        remedy='leave it out or set "auto"',
        source=f"{_ZERO}/stage3.py:2840",
    ),
    Rule(
        id="bucket-sizes",
        level="set",
        applies=lambda s: _bucket(s) <= bucket_elements(s.shape, s.settings),
        reason="buckets are allocated in full, by default a gigabyte",
        remedy="they are no larger than the adapter's gradients",
        source=f"{_ZERO}/stage3.py:780, stage_1_and_2.py:3260",
    ),
    Rule(
        id="bucket-too-large",
        level="warn",
        applies=lambda s: _bucket(s) > bucket_elements(s.shape, s.settings),
        reason="zero_optimization.reduce_bucket_size is larger than all gradients of the adapter, "
        "and is allocated in full",
        remedy='leave it out or set "auto"',
        source=f"{_ZERO}/stage3.py:780, stage_1_and_2.py:3260",
    ),
    Rule(
        id="overlap-comm-off",
        level="set",
        applies=lambda s: s.layout.zero_stage < 3 and not s.zero.get("overlap_comm"),
        reason="overlap_comm at ZeRO-1 and 2 costs one more bucket, has given wrong gradients, "
        "and an adapter's are small",
        remedy="it is off",
        source=issue(_DEEPSPEED, 4298, 5294, 7188),
    ),
    Rule(
        id="overlap-comm",
        level="warn",
        applies=lambda s: s.layout.zero_stage < 3 and bool(s.zero.get("overlap_comm")),
        reason="zero_optimization.overlap_comm at ZeRO-1 and 2 has given NaN and wrong gradient "
        "norms",
        remedy="leave it out; an adapter's gradients are small",
        source=issue(_DEEPSPEED, 4298, 5294, 7188),
    ),
    Rule(
        id="moe-leaf-modules",
        level="set",
        applies=lambda s: s.shape.num_experts > 0 and s.layout.is_sharded and not _has_no_leaves(s),
        reason="ranks that route to other experts would gather in another order at ZeRO-3 and "
        "wait for each other for ever",
        remedy="each mixture-of-experts block is gathered as one leaf module",
        source=issue(_DEEPSPEED, 4966, 5008, 5066),
    ),
    Rule(
        id="moe-without-leaf-modules",
        level="refuse",
        applies=_has_no_leaves,
        reason="zero_optimization.leaf_module names no module, so ranks that route to other "
        "experts would wait for each other for ever at ZeRO-3",
        remedy="leave it out, or set zero_stage: 2",
        source=issue(_DEEPSPEED, 4966, 5008, 5066),
    ),
    Rule(
        id="hpz-without-zero3",
        level="refuse",
        applies=lambda s: _hpz(s) > 1 and not s.layout.is_sharded,
        reason="hpz_partition_size: only ZeRO-3 shards the base, so there is no second copy",
        remedy="set zero_stage: 3, or leave hpz_partition_size out",
        source="https://www.deepspeed.ai/tutorials/zeropp/",
    ),
    Rule(
        id="hpz-divides-ranks",
        level="refuse",
        applies=lambda s: s.layout.world_size % _hpz(s) != 0,
        reason="hpz_partition_size does not divide the number of ranks",
        remedy="set it to the ranks of a node, or leave it out",
        source="DeepSpeed 0.19.8 utils/groups.py:945",
    ),
    Rule(
        id="old-stage-1",
        level="refuse",
        applies=lambda s: (
            bool(s.zero.get("legacy_stage1")) or bool(s.zero.get("elastic_checkpoint"))
        ),
        reason="zero_optimization.legacy_stage1 and elastic_checkpoint: DeepSpeed stops at the "
        "first, and checkpoints are this project's own",
        remedy="leave them out",
        source="DeepSpeed 0.19.8 runtime/engine.py:2650",
    ),
    Rule(
        id="4bit-quantized-weights",
        level="refuse",
        applies=lambda s: s.settings.load_in_4bit and bool(s.zero.get("zero_quantized_weights")),
        reason="zero_optimization.zero_quantized_weights with load_in_4bit quantises the packed "
        "bytes once more, and nothing says so",
        remedy="leave it out: 4-bit weights travel as 4 bits",
        source=f"{_ZERO}/partition_parameters.py:1504",
    ),
    Rule(
        id="quantized-communication",
        level="warn",
        applies=lambda s: (
            bool(s.zero.get("zero_quantized_gradients"))
            or (bool(s.zero.get("zero_quantized_weights")) and not s.settings.load_in_4bit)
        ),
        reason="zero_quantized_weights and zero_quantized_gradients round what travels to 8 or 4 "
        "bits, so the numbers are no longer the same for every split",
        remedy="leave them out, or compare the losses of a short run",
        source="https://www.deepspeed.ai/tutorials/zeropp/",
    ),
    Rule(
        id="quantized-nontrainable-weights",
        level="refuse",
        applies=lambda s: bool(s.zero.get("zero_quantized_nontrainable_weights")),
        reason="zero_optimization.zero_quantized_nontrainable_weights: weights that are frozen "
        "before they are sharded become zeros",
        remedy="leave it out, and set load_in_4bit or load_in_8bit to save memory",
        source=issue(_DEEPSPEED, 4885) + f"; {_ZERO}/partition_parameters.py:1836",
    ),
    Rule(
        id="4bit-all-reduce-fetch",
        level="refuse",
        applies=lambda s: (
            s.settings.load_in_4bit and bool(s.zero.get("stage3_use_all_reduce_for_fetch_params"))
        ),
        reason="zero_optimization.stage3_use_all_reduce_for_fetch_params needs one type in each "
        "gather, and 4-bit weights travel beside adapters",
        remedy="leave it out",
        source=f"{_ZERO}/partition_parameters.py:1451",
    ),
    Rule(
        id="round-robin-gradients",
        level="refuse",
        applies=lambda s: s.layout.zero_stage < 3 and bool(s.zero.get("round_robin_gradients")),
        reason="zero_optimization.round_robin_gradients: full gradients can no longer be read",
        remedy="leave it out; it speeds up offloading of large models",
        source="measured 2026-11-25 with DeepSpeed 0.19.8 on 2 CPU ranks; utils/tensor_fragment.py",
    ),
    Rule(
        id="module-granularity",
        level="refuse",
        applies=lambda s: (
            s.layout.is_sharded and bool(s.zero.get("stage3_module_granularity_threshold"))
        ),
        reason="zero_optimization.stage3_module_granularity_threshold: the backward pass of an "
        "adapter fails on shapes",
        remedy="leave it out",
        source="measured 2026-11-25 with DeepSpeed 0.19.8 on 2 CPU ranks",
    ),
    Rule(
        id="no-gradient-norm",
        level="refuse",
        applies=lambda s: s.zero.get("compute_grad_norm") is False,
        reason="zero_optimization.compute_grad_norm: false, but a run clips and records the norm",
        remedy="leave it out",
        source=f"{_ZERO}/stage_1_and_2.py:212",
    ),
    Rule(
        id="gathered-too-much",
        level="warn",
        applies=_gathers_too_much,
        reason="zero_optimization.stage3_max_live_parameters, stage3_max_reuse_distance or "
        "stage3_prefetch_bucket_size lets more of the base stay gathered than the planned memory "
        "holds",
        remedy='leave them out or set "auto"',
        source=f"{_ZERO}/partitioned_param_coordinator.py; pipeline/plan/cost/gathers.py",
    ),
    Rule(
        id="memory-inefficient-linear",
        level="warn",
        applies=lambda s: s.layout.is_sharded and s.zero.get("memory_efficient_linear") is False,
        reason="zero_optimization.memory_efficient_linear: false keeps every gathered weight until "
        "the backward pass, which the planned memory does not hold",
        remedy="leave it out",
        source=f"{_ZERO}/linear.py:99",
    ),
    Rule(
        id="gather-on-save",
        level="warn",
        applies=lambda s: (
            bool(s.zero.get("stage3_gather_16bit_weights_on_model_save"))
            or bool(s.zero.get("stage3_gather_fp16_weights_on_model_save"))
        ),
        reason="zero_optimization.stage3_gather_16bit_weights_on_model_save has no effect: only "
        "the adapter is gathered and saved",
        remedy="leave it out",
        source="pipeline/adapter/gather.py",
    ),
)
