"""Rules about the DeepSpeed config, most of which only a user's own JSON can break.

What the generated config sets on purpose is explained in ds_configs/README.md.
"""

from pipeline.plan.cost.gathers import gathers
from pipeline.plan.cost.memory import bucket_elements
from pipeline.plan.deepspeed.keys import REMOVED, REMOVED_FROM_ZERO
from pipeline.plan.given.adapter_counts import adapter_counts
from pipeline.plan.rules.rule import (
    PlanContext,
    Rule,
    is_false,
    is_present,
    is_set,
    issue,
)

_DEEPSPEED = "deepspeedai/DeepSpeed"
_ZERO = "DeepSpeed 0.19.8 runtime/zero"
_ENGINE = "DeepSpeed 0.19.8 runtime/engine.py"
_ADAMW_PARAMETERS = {"lr", "betas", "eps", "weight_decay", "torch_adam", "fused"}
_AUTO = 'leave it out or set "auto"'
_WITHOUT_EFFECT = (
    "activation_checkpointing",
    "checkpoint",
    "zero_allow_untested_optimizer",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save",
)


def _in_zero(*keys: str) -> tuple[str, ...]:
    return tuple(f"zero_optimization.{key}" for key in keys)


def _removed(key: str, remedy: str, block: str = "") -> Rule[PlanContext]:
    path = f"{block}.{key}" if block else key
    return Rule(
        id=f"removed-{key.replace('_', '-')}",
        level="refuse",
        applies=lambda s: key in (s.block(block) if block else s.deepspeed),
        reason=f"{path}: DeepSpeed 0.19 removed this key and stops at it",
        remedy=remedy,
        source=issue(_DEEPSPEED, 8489),
        versions="deepspeed>=0.19",
    )


def _hpz_ranks(s: PlanContext) -> int:
    setting = s.settings.hpz_partition_size
    in_json = s.zero.get("zero_hpz_partition_size") or 1
    return max(int(in_json), 1 if setting == "auto" else setting)


def _gathers_adapters(s: PlanContext) -> bool:
    threshold = int(s.zero.get("stage3_param_persistence_threshold", 100_000))
    return s.layout.is_sharded and threshold < adapter_counts(s.shape, s.settings).largest_matrix


def _has_large_bucket(s: PlanContext) -> bool:
    bucket = int(s.zero.get("reduce_bucket_size", 500_000_000))
    return bucket > bucket_elements(s.shape, s.settings)


def _gathers_too_much(s: PlanContext) -> bool:
    planned = gathers(s.shape, s.settings)
    limits = (
        ("stage3_max_live_parameters", planned.block),
        ("stage3_prefetch_bucket_size", planned.block),
        ("stage3_max_reuse_distance", planned.reuse_distance),
    )
    return s.layout.is_sharded and any(s.zero.get(key, most) > most for key, most in limits)


def _has_no_leaf_modules(s: PlanContext) -> bool:
    # without the block DeepSpeed uses its own list
    leaves = s.value("zero_optimization.leaf_module")
    is_emptied = leaves is not None and "classes" in leaves and not any(leaves.values())
    return s.shape.num_experts > 0 and s.layout.is_sharded and is_emptied


def _offload_device(s: PlanContext, key: str) -> str:
    return str(s.value(f"zero_optimization.{key}.device") or "none")


def _offloads_parameters(s: PlanContext) -> bool:
    return s.settings.offload_param == "cpu" or _offload_device(s, "offload_param") != "none"


def _contradicts_plan(s: PlanContext) -> bool:
    layout, settings, offload = s.layout, s.settings, _offload_device(s, "offload_param")
    planned = {
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.accumulation_steps,
        "train_batch_size": layout.global_batch_size,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization.stage": layout.zero_stage,
        "optimizer.params.lr": settings.lr,
        "optimizer.params.weight_decay": settings.weight_decay,
    }
    has_other = any(s.value(path) not in (None, value) for path, value in planned.items())
    has_other |= (s.zero.get("zero_hpz_partition_size") or 1) != layout.hpz_partition_size
    return has_other or offload not in ("nvme", layout.offload_param)  # nvme has its own rules


def _contradicts_precision(s: PlanContext) -> bool:
    dtype = s.layout.training_dtype
    is_other = any(
        bool(s.value(f"{block}.enabled")) != (dtype == name)
        for block, name in (("bf16", "bfloat16"), ("fp16", "float16"))
    )
    return is_other or is_set("data_types.param_dtype", "data_types.buffer_dtype")(s)


def _accumulates_fp32_at_zero1(s: PlanContext) -> bool:
    is_fp32 = s.value("data_types.grad_accum_dtype") in ("fp32", "float32")
    return s.layout.zero_stage == 1 and s.layout.training_dtype == "bfloat16" and is_fp32


def _reduces_in_16_bits(s: PlanContext) -> bool:
    if s.layout.training_dtype == "float32":
        return False
    dtypes = s.value("communication_data_type"), s.value("data_types.grad_accum_dtype")
    return any(str(dtype).lower() in ("fp16", "bf16", "float16", "bfloat16") for dtype in dtypes)


def _splits_the_model(s: PlanContext) -> bool:
    sizes = s.value("tensor_parallel.autotp_size"), s.value("sequence_parallel_size")
    return any(size not in (None, 0, 1) for size in sizes) or is_set(
        "expert_parallel.enabled", "pipeline"
    )(s)


def _changes_gradient_averaging(s: PlanContext) -> bool:
    return (
        is_set("prescale_gradients")(s)
        or s.value("gradient_predivide_factor") not in (None, 1)
        or str(s.value("gradient_allreduce_op") or "mean").lower() == "sum"
    )


def _has_other_optimizer_keys(s: PlanContext) -> bool:
    parameters, keys = s.block("optimizer.params"), s.block("optimizer")
    return bool(set(parameters) - _ADAMW_PARAMETERS) or bool(set(keys) - {"type", "params"})


_ZERO_RULES: tuple[Rule[PlanContext], ...] = (
    Rule(
        id="persistence-too-low",
        level="warn",
        applies=_gathers_adapters,
        reason="zero_optimization.stage3_param_persistence_threshold is below the largest adapter "
        "matrix, so adapters are gathered for each layer",
        remedy=_AUTO,
        source=f"{_ZERO}/stage3.py:2840",
    ),
    Rule(
        id="bucket-too-large",
        level="warn",
        applies=_has_large_bucket,
        reason="zero_optimization.reduce_bucket_size is larger than all gradients of the adapter, "
        "and is allocated in full",
        remedy=_AUTO,
        source=f"{_ZERO}/stage3.py:780, stage_1_and_2.py:3260",
    ),
    Rule(
        id="overlap-comm",
        level="warn",
        applies=lambda s: s.layout.zero_stage < 3 and bool(s.zero.get("overlap_comm")),
        reason="zero_optimization.overlap_comm at ZeRO-1 and 2 has caused NaN and wrong gradient "
        "norms, and an adapter's gradients are small",
        source=issue(_DEEPSPEED, 4298, 5294, 7188),
    ),
    Rule(
        id="moe-without-leaf-modules",
        level="refuse",
        applies=_has_no_leaf_modules,
        reason="zero_optimization.leaf_module names no module: at ZeRO-3, ranks that route to "
        "different experts would gather in different orders and deadlock",
        remedy="leave it out, or set zero_stage: 2",
        source=issue(_DEEPSPEED, 4966, 5008, 5066),
    ),
    Rule(
        id="hpz-without-zero3",
        level="refuse",
        applies=lambda s: _hpz_ranks(s) > 1 and not s.layout.is_sharded,
        reason="hpz_partition_size: only ZeRO-3 shards the base, so there is no second copy",
        remedy="set zero_stage: 3, or leave hpz_partition_size out",
        source="https://www.deepspeed.ai/tutorials/zeropp/",
    ),
    Rule(
        id="hpz-divides-ranks",
        level="refuse",
        applies=lambda s: s.layout.world_size % _hpz_ranks(s) != 0,
        reason="hpz_partition_size does not divide the number of ranks",
        remedy="set it to the ranks of a node, or leave it out",
        source="DeepSpeed 0.19.8 utils/groups.py:945",
    ),
    Rule(
        id="old-stage-1",
        level="refuse",
        applies=is_set(*_in_zero("legacy_stage1", "elastic_checkpoint")),
        reason="zero_optimization.legacy_stage1 and elastic_checkpoint: DeepSpeed stops at the "
        "first, and checkpoints are this project's own",
        source=f"{_ENGINE}:2650",
    ),
    Rule(
        id="4bit-quantized-weights",
        level="refuse",
        applies=lambda s: s.settings.load_in_4bit and bool(s.zero.get("zero_quantized_weights")),
        reason="zero_optimization.zero_quantized_weights with load_in_4bit silently quantises the "
        "packed bytes once more; 4-bit weights are communicated as 4 bits anyway",
        source=f"{_ZERO}/partition_parameters.py:1504",
    ),
    Rule(
        id="quantized-communication",
        level="warn",
        applies=lambda s: (
            bool(s.zero.get("zero_quantized_gradients"))
            or (bool(s.zero.get("zero_quantized_weights")) and not s.settings.load_in_4bit)
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
        source=issue(_DEEPSPEED, 4885) + f"; {_ZERO}/partition_parameters.py:1836",
    ),
    Rule(
        id="4bit-all-reduce-fetch",
        level="refuse",
        applies=lambda s: (
            s.settings.load_in_4bit and bool(s.zero.get("stage3_use_all_reduce_for_fetch_params"))
        ),
        reason="zero_optimization.stage3_use_all_reduce_for_fetch_params needs one dtype in each "
        "gather, and 4-bit weights are gathered together with adapters",
        source=f"{_ZERO}/partition_parameters.py:1451",
    ),
    Rule(
        id="round-robin-gradients",
        level="refuse",
        applies=lambda s: s.layout.zero_stage < 3 and bool(s.zero.get("round_robin_gradients")),
        reason="zero_optimization.round_robin_gradients: full gradients can no longer be read; it "
        "speeds up the offloading of large models only",
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
        source="measured 2026-11-25 with DeepSpeed 0.19.8 on 2 CPU ranks",
    ),
    Rule(
        id="no-gradient-norm",
        level="refuse",
        applies=is_false("zero_optimization.compute_grad_norm"),
        reason="zero_optimization.compute_grad_norm: false, but a run clips and records the norm",
        source=f"{_ZERO}/stage_1_and_2.py:212",
    ),
    Rule(
        id="gathered-too-much",
        level="warn",
        applies=_gathers_too_much,
        reason="zero_optimization.stage3_max_live_parameters, stage3_max_reuse_distance or "
        "stage3_prefetch_bucket_size keeps more of the base gathered than the predicted memory "
        "includes",
        remedy='leave them out or set "auto"',
        source=f"{_ZERO}/partitioned_param_coordinator.py; pipeline/plan/cost/gathers.py",
    ),
    Rule(
        id="memory-inefficient-linear",
        level="warn",
        applies=lambda s: s.layout.is_sharded and s.zero.get("memory_efficient_linear") is False,
        reason="zero_optimization.memory_efficient_linear: false keeps every gathered weight until "
        "the backward pass, which the predicted memory does not include",
        source=f"{_ZERO}/linear.py:99",
    ),
    Rule(
        id="offload-param-without-zero3",
        level="refuse",
        applies=lambda s: _offloads_parameters(s) and not s.layout.is_sharded,
        reason="offload_param: only ZeRO-3 can keep the base in host memory",
        remedy="set zero_stage: 3, or leave offload_param out",
        source="https://www.deepspeed.ai/docs/config-json/#parameter-offloading",
    ),
    Rule(
        id="nvme-not-yet",
        level="refuse",
        applies=lambda s: _offload_device(s, "offload_param") == "nvme",
        reason="zero_optimization.offload_param to nvme: its memory and speed are not modelled, "
        "and its buffers have the training dtype, which packed 4-bit weights have not",
        remedy='set "cpu", or leave it out',
        source=f"{_ZERO}/partition_parameters.py:1820",
    ),
    Rule(
        id="cpu-offload-param",
        level="refuse",
        applies=is_set(*_in_zero("cpu_offload_param", "cpu_offload_use_pin_memory")),
        reason="zero_optimization.cpu_offload_param and cpu_offload_use_pin_memory are deprecated "
        "names that the plan does not read",
        remedy="set offload_param: cpu in the run file",
        source=f"{_ZERO}/config.py:189",
    ),
    Rule(
        id="offload-optimizer",
        level="refuse",
        applies=is_set(*_in_zero("offload_optimizer.device", "cpu_offload")),
        reason="zero_optimization.offload_optimizer: an adapter's optimizer is 12 bytes a "
        "trainable parameter, divided over the ranks; offloading it slows every step and compiles "
        "an optimizer at start-up",
        source=issue(_DEEPSPEED, 6550, 5241) + f"; {_ENGINE}:2342",
    ),
    Rule(
        id="zenflow",
        level="refuse",
        applies=lambda s: (
            is_present(*_in_zero("zenflow"))(s)
            or is_set(*_in_zero("offload_optimizer.super_offload"))(s)
        ),
        reason="zenflow and super_offload are offload schemes for full fine-tuning; zenflow "
        "transposes every gathered weight",
        source=f"{_ZERO}/parameter_offload.py:545",
    ),
)

_OTHER_RULES: tuple[Rule[PlanContext], ...] = (
    Rule(
        id="json-against-plan",
        level="refuse",
        applies=_contradicts_plan,
        reason="deepspeed_json: batch sizes, clipping, stage, hpZ, offload, learning rate or "
        "weight decay are not what the plan chose",
        remedy='leave these keys out, or set them to "auto"',
        source="pipeline/plan/deepspeed/overlay.py",
    ),
    Rule(
        id="json-against-precision",
        level="refuse",
        applies=_contradicts_precision,
        reason="bf16.enabled or fp16.enabled is not as planned, or data_types casts weights or "
        "buffers",
        remedy="leave them out and set bf16 or fp16 in the run file",
        source=f"{_ENGINE}:1813",
    ),
    Rule(
        id="16-bit-masters",
        level="refuse",
        applies=is_set(
            "bf16.bf16_master_weights_and_grads",
            "bf16.bf16_optimizer_states",
            "fp16.fp16_master_weights_and_grads",
        ),
        reason="master weights or optimizer states in 16 bits lose the small updates of an "
        "adapter, and save almost no memory",
        remedy="leave these keys of bf16 and fp16 out",
        source="DeepSpeed 0.19.8 runtime/precision_config.py:60",
    ),
    Rule(
        id="bf16-overflow-unchecked",
        level="warn",
        applies=is_false("bf16.check_grad_overflow"),
        reason="bf16.check_grad_overflow: false applies a step whose gradients are not finite",
        source=issue(_DEEPSPEED, 5242, 6976),
    ),
    Rule(
        id="zero1-fp32-accumulation",
        level="refuse",
        applies=_accumulates_fp32_at_zero1,
        reason="data_types.grad_accum_dtype: fp32 at ZeRO-1 in bf16 switches to another optimizer "
        "class, which checkpoints do not support",
        remedy="set zero_stage: 2, which accumulates in fp32",
        source=f"{_ENGINE}:2305",
    ),
    Rule(
        id="16-bit-gradients",
        level="warn",
        applies=_reduces_in_16_bits,
        reason="communication_data_type or data_types.grad_accum_dtype add gradients in 16 bits, "
        "so results depend on how a batch is split; fp32 costs little for an adapter",
        source=f"{_ENGINE}:1718",
    ),
    Rule(
        id="torch-autocast",
        level="refuse",
        applies=is_set("torch_autocast.enabled"),
        reason="torch_autocast: adapters would have no 16-bit copy beside their fp32 masters",
        remedy="leave it out and set bf16 or fp16 in the run file",
        source="DeepSpeed 0.19.8 runtime/torch_autocast.py:53",
    ),
    Rule(
        id="gradient-division",
        level="refuse",
        applies=_changes_gradient_averaging,
        reason="prescale_gradients, gradient_predivide_factor and gradient_allreduce_op change "
        "how gradients are averaged, which the loss is scaled for; ZeRO-2 and 3 stop at the "
        "first two",
        source=f"{_ZERO}/stage_1_and_2.py:350, stage3.py:395",
    ),
    Rule(
        id="own-accumulation",
        level="refuse",
        applies=is_false("managed_gradient_accumulation"),
        reason="managed_gradient_accumulation: false, but the training loop relies on DeepSpeed to "
        "detect the last micro-batch of a step",
        source=f"{_ENGINE}:2030",
    ),
    Rule(
        id="scheduler",
        level="refuse",
        applies=is_present("scheduler"),
        reason="scheduler: the learning rate of each step is set from the run file, and a second "
        "schedule would overwrite it",
        remedy="leave it out; set lr, warmup_ratio, lr_scheduler_type and min_lr_ratio",
        source=issue(_DEEPSPEED, 7303),
    ),
    Rule(
        id="optimizer-not-adamw",
        level="refuse",
        applies=lambda s: str(s.block("optimizer").get("type", "AdamW")).lower() != "adamw",
        reason="optimizer.type is not AdamW, whose two moments are what a checkpoint holds",
        remedy='set it to "AdamW", or leave it out',
        source="pipeline/adapter/gather.py",
    ),
    Rule(
        id="optimizer-parameters",
        level="refuse",
        applies=_has_other_optimizer_keys,
        reason="optimizer.params may hold lr, betas, eps, weight_decay, torch_adam and fused; "
        "others change what a step or a checkpoint is",
        remedy="leave the others out; clipping is max_grad_norm in the run file",
        source=f"{_ENGINE}:2476",
    ),
    Rule(
        id="compiled-adam",
        level="warn",
        applies=is_false("optimizer.params.torch_adam"),
        reason="optimizer.params.torch_adam: false compiles an optimizer at start-up on every "
        "machine",
        source=issue(_DEEPSPEED, 694, 2844),
    ),
    Rule(
        id="model-parallel",
        level="refuse",
        applies=_splits_the_model,
        reason="tensor_parallel, expert_parallel, sequence_parallel_size and pipeline do not "
        "support adapters and packed weights",
        remedy="leave them out; zero_stage: 3 shards the base",
        source="DeepSpeed 0.19.8 module_inject/auto_tp.py:308",
    ),
    Rule(
        id="compile-not-yet",
        level="refuse",
        applies=lambda s: any(s.block("compile").values()),
        reason="compile: a run does not compile its model, and deepcompile does not support 4-bit "
        "layers",
        source="DeepSpeed 0.19.8 compile/util.py:29",
    ),
    Rule(
        id="other-engines",
        level="refuse",
        applies=lambda s: (
            is_set("autotuning.enabled", "hybrid_engine.enabled", "data_efficiency.enabled")(s)
            or "weight_quantization" in s.deepspeed
        ),
        reason="autotuning, hybrid_engine, data_efficiency and weight_quantization choose batches, "
        "data or weights themselves and do not support frozen weights",
        remedy="leave them out; launch/plan.py chooses the layout",
        source="DeepSpeed 0.19.8 autotuning/autotuner.py:279",
    ),
    Rule(
        id="checkpoint-writer",
        level="refuse",
        applies=is_present("checkpoint.writer", "datastates_ckpt"),
        reason="checkpoint.writer and datastates_ckpt start writers for DeepSpeed checkpoints, "
        "which a run does not write, and fail without DeepSpeed's own launcher",
        remedy="leave them out; set save_strategy and save_steps",
        source=f"{_ENGINE}:1899",
    ),
    Rule(
        id="json-no-effect",
        level="warn",
        applies=lambda s: ", ".join(path for path in _WITHOUT_EFFECT if is_set(path)(s)),
        reason="keys without effect, because transformers checkpoints activations, AdamW is a "
        "tested optimizer, and checkpoints and saved weights are the adapter's alone",
        remedy="leave them out",
        source=f"pipeline/adapter/gather.py; {_ZERO}/utils.py:45",
    ),
    Rule(
        id="flops-profiler-4bit",
        level="warn",
        applies=lambda s: s.settings.load_in_4bit and is_set("flops_profiler.enabled")(s),
        reason="flops_profiler does not count the products of 4-bit layers",
        source="DeepSpeed 0.19.8 profiling/flops_profiler/profiler.py",
    ),
)

DEEPSPEED_RULES: tuple[Rule[PlanContext], ...] = (
    *(_removed(key, remedy) for key, remedy in REMOVED.items()),
    *(_removed(key, remedy, "zero_optimization") for key, remedy in REMOVED_FROM_ZERO.items()),
    *_ZERO_RULES,
    *_OTHER_RULES,
)
