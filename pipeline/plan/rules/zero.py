"""Rules about the block `zero_optimization` of the DeepSpeed config."""

from pipeline.plan.cost.gathers import gathers, persistence_threshold
from pipeline.plan.cost.memory import bucket_elements
from pipeline.plan.rules.rule import (
    DEEPSPEED,
    ENGINE_SOURCE,
    ZERO_SOURCE,
    PlanContext,
    Rule,
    is_false,
    is_present,
    is_set,
    issue,
)

_AUTO = 'leave it out or set "auto"'


def _in_zero(*keys: str) -> tuple[str, ...]:
    """Dotted paths of keys in the block zero_optimization."""
    return tuple(f"zero_optimization.{key}" for key in keys)


def _hpz_ranks(run: PlanContext) -> int:
    """The larger hpz_partition_size of the run file and the DeepSpeed config; 1 if none is set."""
    setting = run.settings.hpz_partition_size
    in_json = run.zero.get("zero_hpz_partition_size") or 1
    return max(int(in_json), 1 if setting == "auto" else setting)


def _gathers_adapters(run: PlanContext) -> bool:
    """Whether ZeRO-3 shards adapter matrices of linear layers, so that it has to gather them."""
    threshold = int(run.zero.get("stage3_param_persistence_threshold", 100_000))
    return run.layout.is_sharded and threshold < persistence_threshold(run.shape, run.settings)


def _has_large_bucket(run: PlanContext) -> bool:
    """Whether the reduce bucket is larger than the one that the plan would choose."""
    bucket = int(run.zero.get("reduce_bucket_size", 500_000_000))
    return bucket > bucket_elements(run.shape, run.settings)


def _gathers_too_much(run: PlanContext) -> bool:
    """Whether a limit of ZeRO-3 is above the one for which the plan predicts the memory."""
    planned = gathers(run.shape, run.settings)
    planned_limits = {
        "stage3_max_live_parameters": planned.block,
        "stage3_prefetch_bucket_size": planned.block,
        "stage3_max_reuse_distance": planned.reuse_distance,
    }
    is_above = any(run.zero.get(key, limit) > limit for key, limit in planned_limits.items())
    return run.layout.is_sharded and is_above


def _has_no_leaf_modules(run: PlanContext) -> bool:
    """Whether experts are sharded and the config has a leaf_module block that names no module."""
    # If the config has no such block, DeepSpeed uses a list of its own.
    leaves = run.value("zero_optimization.leaf_module")
    is_emptied = leaves is not None and "classes" in leaves and not any(leaves.values())
    return run.shape.num_experts > 0 and run.layout.is_sharded and is_emptied


def _offloads_parameters(run: PlanContext) -> bool:
    """Whether the run file or the DeepSpeed config offloads the base."""
    return run.settings.offload_param == "cpu" or run.offload_device != "none"


ZERO_RULES: tuple[Rule[PlanContext], ...] = (
    Rule(
        id="persistence-too-low",
        level="warn",
        applies=_gathers_adapters,
        reason="zero_optimization.stage3_param_persistence_threshold is below the size of the "
        "largest adapter matrix, so adapters are sharded, and each layer gathers them",
        remedy=_AUTO,
        source=f"{ZERO_SOURCE}/stage3.py:2840",
    ),
    Rule(
        id="bucket-too-large",
        level="warn",
        applies=_has_large_bucket,
        reason="zero_optimization.reduce_bucket_size is larger than all gradients of the adapter; "
        "the bucket is allocated in full",
        remedy=_AUTO,
        source=f"{ZERO_SOURCE}/stage3.py:780, stage_1_and_2.py:3260",
    ),
    Rule(
        id="overlap-comm",
        level="warn",
        applies=lambda run: run.layout.zero_stage < 3 and bool(run.zero.get("overlap_comm")),
        reason="zero_optimization.overlap_comm at ZeRO-1 and 2 has caused NaN and wrong gradient "
        "norms, and gains little for the small gradients of an adapter",
        source=issue(DEEPSPEED, 4298, 5294, 7188),
    ),
    Rule(
        id="moe-without-leaf-modules",
        level="refuse",
        applies=_has_no_leaf_modules,
        reason="zero_optimization.leaf_module names no module: at ZeRO-3, ranks that route tokens "
        "to different experts would gather parameters in different orders and deadlock",
        remedy="leave it out, or set zero_stage: 2",
        source=issue(DEEPSPEED, 4966, 5008, 5066),
    ),
    Rule(
        id="hpz-without-zero3",
        level="refuse",
        applies=lambda run: _hpz_ranks(run) > 1 and not run.layout.is_sharded,
        reason="hpz_partition_size: only ZeRO-3 shards the base and can have a second, sharded "
        "copy",
        remedy="set zero_stage: 3, or leave hpz_partition_size out",
        source="https://www.deepspeed.ai/tutorials/zeropp/",
    ),
    Rule(
        id="hpz-divides-ranks",
        level="refuse",
        applies=lambda run: run.layout.world_size % _hpz_ranks(run) != 0,
        reason="hpz_partition_size does not divide the number of ranks",
        remedy="set it to the number of ranks of a node, or leave it out",
        source="DeepSpeed 0.19.8 utils/groups.py:945",
    ),
    Rule(
        id="old-stage-1",
        level="refuse",
        applies=is_set(*_in_zero("legacy_stage1", "elastic_checkpoint")),
        reason="zero_optimization.legacy_stage1 and elastic_checkpoint: DeepSpeed refuses "
        "legacy_stage1, and elastic_checkpoint is for DeepSpeed's checkpoints, which a run does "
        "not write",
        source=f"{ENGINE_SOURCE}:2650",
    ),
    Rule(
        id="4bit-quantized-weights",
        level="refuse",
        applies=lambda run: (
            run.settings.load_in_4bit and bool(run.zero.get("zero_quantized_weights"))
        ),
        reason="zero_optimization.zero_quantized_weights with load_in_4bit quantises the packed "
        "4-bit weights a second time, without an error; they are communicated in 4 bits anyway",
        source=f"{ZERO_SOURCE}/partition_parameters.py:1504",
    ),
    Rule(
        id="quantized-communication",
        level="warn",
        applies=lambda run: (
            bool(run.zero.get("zero_quantized_gradients"))
            or (bool(run.zero.get("zero_quantized_weights")) and not run.settings.load_in_4bit)
        ),
        reason="zero_quantized_weights and zero_quantized_gradients round communicated values to 8 "
        "or 4 bits, so results depend on how a batch is split",
        remedy="leave them out, or compare the losses of a short run",
        source="https://www.deepspeed.ai/tutorials/zeropp/",
    ),
    Rule(
        id="quantized-nontrainable-weights",
        level="refuse",
        applies=is_set(*_in_zero("zero_quantized_nontrainable_weights")),
        reason="zero_optimization.zero_quantized_nontrainable_weights: weights that are frozen "
        "before they are sharded become zeros",
        remedy="leave it out, and set load_in_4bit or load_in_8bit to save memory",
        source=issue(DEEPSPEED, 4885) + f"; {ZERO_SOURCE}/partition_parameters.py:1836",
    ),
    Rule(
        id="4bit-all-reduce-fetch",
        level="refuse",
        applies=lambda run: (
            run.settings.load_in_4bit
            and bool(run.zero.get("stage3_use_all_reduce_for_fetch_params"))
        ),
        reason="zero_optimization.stage3_use_all_reduce_for_fetch_params needs a single dtype in "
        "each gather, but 4-bit weights are gathered together with adapters",
        source=f"{ZERO_SOURCE}/partition_parameters.py:1451",
    ),
    Rule(
        id="round-robin-gradients",
        level="refuse",
        applies=lambda run: (
            run.layout.zero_stage < 3 and bool(run.zero.get("round_robin_gradients"))
        ),
        reason="zero_optimization.round_robin_gradients makes full gradients unreadable; it only "
        "speeds up optimizer offload of large models",
        source="measured 2026-11-25 with DeepSpeed 0.19.8 on 2 CPU ranks; utils/tensor_fragment.py",
    ),
    Rule(
        id="module-granularity",
        level="refuse",
        applies=lambda run: (
            run.layout.is_sharded and bool(run.zero.get("stage3_module_granularity_threshold"))
        ),
        reason="zero_optimization.stage3_module_granularity_threshold: the backward pass of an "
        "adapter fails with a shape mismatch",
        source="measured 2026-11-25 with DeepSpeed 0.19.8 on 2 CPU ranks",
    ),
    Rule(
        id="no-gradient-norm",
        level="refuse",
        applies=is_false("zero_optimization.compute_grad_norm"),
        reason="zero_optimization.compute_grad_norm: false, but a run needs the gradient norm for "
        "clipping and for metrics.jsonl",
        source=f"{ZERO_SOURCE}/stage_1_and_2.py:212",
    ),
    Rule(
        id="gathered-too-much",
        level="warn",
        applies=_gathers_too_much,
        reason="zero_optimization.stage3_max_live_parameters, stage3_max_reuse_distance or "
        "stage3_prefetch_bucket_size keeps more of the base gathered than the predicted memory "
        "includes",
        remedy='leave them out or set "auto"',
        source=f"{ZERO_SOURCE}/partitioned_param_coordinator.py; pipeline/plan/cost/gathers.py",
    ),
    Rule(
        id="memory-inefficient-linear",
        level="warn",
        applies=lambda run: (
            run.layout.is_sharded and run.zero.get("memory_efficient_linear") is False
        ),
        reason="zero_optimization.memory_efficient_linear: with false, every gathered weight stays "
        "in memory until its backward pass, which the predicted memory does not include",
        source=f"{ZERO_SOURCE}/linear.py:99",
    ),
    Rule(
        id="offload-param-without-zero3",
        level="refuse",
        applies=lambda run: _offloads_parameters(run) and not run.layout.is_sharded,
        reason="offload_param: only ZeRO-3 can offload the base to host memory",
        remedy="set zero_stage: 3, or leave offload_param out",
        source="https://www.deepspeed.ai/docs/config-json/#parameter-offloading",
    ),
    Rule(
        id="nvme-not-yet",
        level="refuse",
        applies=lambda run: run.offload_device == "nvme",
        reason="zero_optimization.offload_param.device: nvme is not supported: the plan does not "
        "predict its memory and speed, and its buffers have the training dtype, so they cannot "
        "hold packed 4-bit weights",
        remedy='set "cpu", or leave it out',
        source=f"{ZERO_SOURCE}/partition_parameters.py:1820",
    ),
    Rule(
        id="cpu-offload-param",
        level="refuse",
        applies=is_set(*_in_zero("cpu_offload_param", "cpu_offload_use_pin_memory")),
        reason="zero_optimization.cpu_offload_param and cpu_offload_use_pin_memory are deprecated "
        "names, and the plan does not read them",
        remedy="set offload_param: cpu in the run file",
        source=f"{ZERO_SOURCE}/config.py:189",
    ),
    Rule(
        id="offload-optimizer",
        level="refuse",
        applies=is_set(*_in_zero("offload_optimizer.device", "cpu_offload")),
        reason="zero_optimization.offload_optimizer saves little memory (an adapter's optimizer "
        "states are 12 bytes per trainable parameter, divided over the ranks), slows every step, "
        "and compiles an optimizer at start-up",
        source=issue(DEEPSPEED, 6550, 5241) + f"; {ENGINE_SOURCE}:2342",
    ),
    Rule(
        id="zenflow",
        level="refuse",
        applies=lambda run: (
            is_present(*_in_zero("zenflow"))(run)
            or is_set(*_in_zero("offload_optimizer.super_offload"))(run)
        ),
        reason="zenflow and super_offload are for full fine-tuning; zenflow also transposes "
        "every gathered weight",
        source=f"{ZERO_SOURCE}/parameter_offload.py:545",
    ),
)
