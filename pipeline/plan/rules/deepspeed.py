"""Rules about the DeepSpeed config. Most of them apply only to a user's own JSON.

ds_configs/README.md explains the keys of the generated config.
"""

from pipeline.commands import command
from pipeline.plan.deepspeed.keys import REMOVED, REMOVED_FROM_ZERO
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
from pipeline.plan.rules.zero import ZERO_RULES

# Keys of optimizer.params that a user's JSON may set.
_ADAMW_PARAMETERS = {"lr", "betas", "eps", "weight_decay", "torch_adam", "fused"}
# Key paths that DeepSpeed accepts and that change nothing in a run of this package.
_WITHOUT_EFFECT = (
    "activation_checkpointing",
    "checkpoint",
    "zero_allow_untested_optimizer",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save",
)


def _rule_for_removed(key: str, remedy: str, block: str = "") -> Rule[PlanContext]:
    """The rule for a key that DeepSpeed removed, at the top level or in a block."""
    path = f"{block}.{key}" if block else key
    return Rule(
        id=f"removed-{key.replace('_', '-')}",
        level="refuse",
        applies=lambda run: key in (run.block(block) if block else run.deepspeed),
        reason=f"{path}: DeepSpeed 0.19 removed this key and refuses a config that has it",
        remedy=remedy,
        source=issue(DEEPSPEED, 8489),
        versions="deepspeed>=0.19",
    )


def _contradicts_plan(run: PlanContext) -> bool:
    """Whether a value of the DeepSpeed config differs from the settings or the layout."""
    layout, settings, offload = run.layout, run.settings, run.offload_device
    planned = {
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.accumulation_steps,
        "train_batch_size": layout.global_batch_size,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization.stage": layout.zero_stage,
        "optimizer.params.lr": settings.lr,
        "optimizer.params.weight_decay": settings.weight_decay,
    }
    differs = any(run.value(path) not in (None, value) for path, value in planned.items())
    differs |= (run.zero.get("zero_hpz_partition_size") or 1) != layout.hpz_partition_size
    return differs or offload not in ("nvme", layout.offload_param)  # nvme has its own rule


def _contradicts_precision(run: PlanContext) -> bool:
    """Whether the DeepSpeed config enables another training dtype, or casts weights or buffers."""
    dtype = run.layout.training_dtype
    differs = any(
        bool(run.value(f"{block}.enabled")) != (dtype == name)
        for block, name in (("bf16", "bfloat16"), ("fp16", "float16"))
    )
    return differs or is_set("data_types.param_dtype", "data_types.buffer_dtype")(run)


def _accumulates_fp32_at_zero1(run: PlanContext) -> bool:
    is_fp32 = run.value("data_types.grad_accum_dtype") in ("fp32", "float32")
    return run.layout.zero_stage == 1 and run.layout.training_dtype == "bfloat16" and is_fp32


def _reduces_in_16_bits(run: PlanContext) -> bool:
    if run.layout.training_dtype == "float32":
        return False
    dtypes = run.value("communication_data_type"), run.value("data_types.grad_accum_dtype")
    return any(str(dtype).lower() in ("fp16", "bf16", "float16", "bfloat16") for dtype in dtypes)


def _uses_model_parallelism(run: PlanContext) -> bool:
    """Whether the DeepSpeed config has tensor, sequence, expert or pipeline parallelism."""
    sizes = run.value("tensor_parallel.autotp_size"), run.value("sequence_parallel_size")
    has_size = any(size not in (None, 0, 1) for size in sizes)
    return has_size or is_set("expert_parallel.enabled", "pipeline")(run)


def _changes_gradient_averaging(run: PlanContext) -> bool:
    return (
        is_set("prescale_gradients")(run)
        or run.value("gradient_predivide_factor") not in (None, 1)
        or str(run.value("gradient_allreduce_op") or "mean").lower() == "sum"
    )


def _has_other_optimizer_keys(run: PlanContext) -> bool:
    """Whether the block `optimizer` has keys that would change a step or a checkpoint."""
    other_keys = set(run.block("optimizer")) - {"type", "params"}
    other_parameters = set(run.block("optimizer.params")) - _ADAMW_PARAMETERS
    return bool(other_keys or other_parameters)


_OTHER_RULES: tuple[Rule[PlanContext], ...] = (
    Rule(
        id="json-against-plan",
        level="refuse",
        applies=_contradicts_plan,
        reason="deepspeed_json: a batch size, clipping, stage, hpZ, offload, learning rate or "
        "weight decay differs from the plan",
        remedy='leave these keys out, or set them to "auto"',
        source="pipeline/plan/deepspeed/overlay.py",
    ),
    Rule(
        id="json-against-precision",
        level="refuse",
        applies=_contradicts_precision,
        reason="bf16.enabled or fp16.enabled differs from the plan, or data_types casts weights or "
        "buffers",
        remedy="leave them out and set bf16 or fp16 in the run file",
        source=f"{ENGINE_SOURCE}:1813",
    ),
    Rule(
        id="16-bit-masters",
        level="refuse",
        applies=is_set(
            "bf16.bf16_master_weights_and_grads",
            "bf16.bf16_optimizer_states",
            "fp16.fp16_master_weights_and_grads",
        ),
        reason="a key of bf16 or fp16 keeps master weights or optimizer states in 16 bits, which "
        "lose the small updates of an adapter and save almost no memory",
        remedy="leave out bf16_master_weights_and_grads, bf16_optimizer_states and "
        "fp16_master_weights_and_grads",
        source="DeepSpeed 0.19.8 runtime/precision_config.py:60",
    ),
    Rule(
        id="bf16-overflow-unchecked",
        level="warn",
        applies=is_false("bf16.check_grad_overflow"),
        reason="bf16.check_grad_overflow: with false, DeepSpeed also applies steps whose gradients "
        "are not finite",
        source=issue(DEEPSPEED, 5242, 6976),
    ),
    Rule(
        id="zero1-fp32-accumulation",
        level="refuse",
        applies=_accumulates_fp32_at_zero1,
        reason="data_types.grad_accum_dtype: fp32 at ZeRO-1 in bf16 switches to another optimizer "
        "class, which checkpoints do not support",
        remedy="set zero_stage: 2, which accumulates in fp32",
        source=f"{ENGINE_SOURCE}:2305",
    ),
    Rule(
        id="16-bit-gradients",
        level="warn",
        applies=_reduces_in_16_bits,
        reason="communication_data_type or data_types.grad_accum_dtype sums gradients in 16 bits, "
        "so results depend on how a batch is split; fp32 costs little for an adapter",
        source=f"{ENGINE_SOURCE}:1718",
    ),
    Rule(
        id="torch-autocast",
        level="refuse",
        applies=is_set("torch_autocast.enabled"),
        reason="torch_autocast: adapters would have fp32 master weights but no 16-bit copy",
        remedy="leave it out and set bf16 or fp16 in the run file",
        source="DeepSpeed 0.19.8 runtime/torch_autocast.py:53",
    ),
    Rule(
        id="gradient-division",
        level="refuse",
        applies=_changes_gradient_averaging,
        reason="prescale_gradients, gradient_predivide_factor and gradient_allreduce_op change how "
        "gradients are averaged, but the loss is scaled for DeepSpeed's default average",
        source=f"{ZERO_SOURCE}/stage_1_and_2.py:350, stage3.py:395",
    ),
    Rule(
        id="own-accumulation",
        level="refuse",
        applies=is_false("managed_gradient_accumulation"),
        reason="managed_gradient_accumulation: the training loop needs true, because it relies on "
        "DeepSpeed to detect the last micro-batch of a step",
        source=f"{ENGINE_SOURCE}:2030",
    ),
    Rule(
        id="scheduler",
        level="refuse",
        applies=is_present("scheduler"),
        reason="scheduler: the training loop sets the learning rate of each step, and a second "
        "schedule would overwrite it",
        remedy="leave it out; set lr, warmup_ratio, lr_scheduler_type and min_lr_ratio in the run "
        "file",
        source=issue(DEEPSPEED, 7303),
    ),
    Rule(
        id="optimizer-not-adamw",
        level="refuse",
        applies=lambda run: str(run.block("optimizer").get("type", "AdamW")).lower() != "adamw",
        reason="optimizer.type is not AdamW; checkpoints can store only the two moments of AdamW",
        remedy='set it to "AdamW", or leave it out',
        source="pipeline/adapter/gather.py",
    ),
    Rule(
        id="optimizer-parameters",
        level="refuse",
        applies=_has_other_optimizer_keys,
        reason="optimizer: a key other than type and params, or a parameter other than lr, betas, "
        "eps, weight_decay, torch_adam and fused; it would change the optimizer step or the "
        "content of checkpoints",
        remedy="leave it out; for clipping set max_grad_norm in the run file",
        source=f"{ENGINE_SOURCE}:2476",
    ),
    Rule(
        id="compiled-adam",
        level="warn",
        applies=is_false("optimizer.params.torch_adam"),
        reason="optimizer.params.torch_adam: with false, DeepSpeed compiles an optimizer at "
        "start-up on every machine",
        source=issue(DEEPSPEED, 694, 2844),
    ),
    Rule(
        id="model-parallel",
        level="refuse",
        applies=_uses_model_parallelism,
        reason="tensor_parallel, expert_parallel and pipeline do not support adapters and packed "
        "weights, and a DeepSpeed config with sequence_parallel_size has other gradients",
        remedy="leave them out; zero_stage: 3 shards the base, and sequence_parallel_size in the "
        "run file splits sequences",
        source="DeepSpeed 0.19.8 module_inject/auto_tp.py:308",
    ),
    Rule(
        id="compile-not-yet",
        level="refuse",
        applies=lambda run: any(run.block("compile").values()),
        reason="compile: compiling the model is not implemented, and its key deepcompile does not "
        "support 4-bit layers",
        source="DeepSpeed 0.19.8 compile/util.py:29",
    ),
    Rule(
        id="other-engines",
        level="refuse",
        applies=lambda run: (
            is_set("autotuning.enabled", "hybrid_engine.enabled", "data_efficiency.enabled")(run)
            or "weight_quantization" in run.deepspeed
        ),
        reason="autotuning, hybrid_engine, data_efficiency and weight_quantization change batches, "
        "data or weights by themselves, and do not support frozen weights",
        remedy=f"leave them out; {command('plan')} chooses the layout",
        source="DeepSpeed 0.19.8 autotuning/autotuner.py:279",
    ),
    Rule(
        id="checkpoint-writer",
        level="refuse",
        applies=is_present("checkpoint.writer", "datastates_ckpt"),
        reason="checkpoint.writer and datastates_ckpt start writers for DeepSpeed's checkpoints, "
        "but a run writes its own checkpoints; the writers also fail without DeepSpeed's launcher",
        remedy="leave them out; set save_strategy and save_steps",
        source=f"{ENGINE_SOURCE}:1899",
    ),
    Rule(
        id="json-no-effect",
        level="warn",
        applies=lambda run: ", ".join(path for path in _WITHOUT_EFFECT if is_set(path)(run)),
        reason="some keys of deepspeed_json have no effect, because transformers does activation "
        "checkpointing, the optimizer is AdamW, and a run saves only the adapter, in its own "
        "checkpoints",
        remedy="leave them out",
        source=f"pipeline/adapter/gather.py; {ZERO_SOURCE}/utils.py:45",
    ),
    Rule(
        id="flops-profiler-4bit",
        level="warn",
        applies=lambda run: run.settings.load_in_4bit and is_set("flops_profiler.enabled")(run),
        reason="flops_profiler does not count the products of 4-bit layers",
        source="DeepSpeed 0.19.8 profiling/flops_profiler/profiler.py",
    ),
)

DEEPSPEED_RULES: tuple[Rule[PlanContext], ...] = (
    *(_rule_for_removed(key, remedy) for key, remedy in REMOVED.items()),
    *(
        _rule_for_removed(key, remedy, "zero_optimization")
        for key, remedy in REMOVED_FROM_ZERO.items()
    ),
    *ZERO_RULES,
    *_OTHER_RULES,
)
