"""Rules about the rest of the DeepSpeed config, which only a user's own JSON can break."""

from pipeline.plan.deepspeed.keys import REMOVED, REMOVED_FROM_ZERO
from pipeline.plan.rules.rule import PlanContext, Rule, issue

_DEEPSPEED = "deepspeedai/DeepSpeed"
_ADAMW_PARAMETERS = {"lr", "betas", "eps", "weight_decay", "torch_adam", "fused"}


def _removed(key: str, instead: str, block: str = "") -> Rule[PlanContext]:
    path = f"{block}.{key}" if block else key
    return Rule(
        id=f"removed-{key.replace('_', '-')}",
        level="refuse",
        applies=lambda s: key in (s.block(block) if block else s.deepspeed),
        reason=f"{path}: DeepSpeed 0.19 removed this key and stops at it",
        remedy=instead,
        source=issue(_DEEPSPEED, 8489),
        versions="deepspeed>=0.19",
    )


def _contradicts_plan(s: PlanContext) -> bool:
    adam = s.block("optimizer", "params")
    offload = s.block("zero_optimization", "offload_param").get("device") or "none"
    layout, settings = s.layout, s.settings
    pairs = (
        (s.deepspeed.get("train_micro_batch_size_per_gpu"), layout.micro_batch_size),
        (s.deepspeed.get("gradient_accumulation_steps"), layout.accumulation_steps),
        (s.deepspeed.get("train_batch_size"), layout.global_batch_size),
        (s.deepspeed.get("gradient_clipping"), settings.max_grad_norm),
        (s.zero.get("stage"), layout.zero_stage),
        (s.zero.get("zero_hpz_partition_size", 1), layout.hpz_partition_size),
        (None if offload == "nvme" else offload, layout.offload_param),
        (adam.get("lr"), settings.lr),
        (adam.get("weight_decay"), settings.weight_decay),
    )
    return any(found is not None and found != planned for found, planned in pairs)


def _contradicts_precision(s: PlanContext) -> bool:
    dtype = s.layout.training_dtype
    is_wrong = [
        bool(s.block(name).get("enabled")) != (dtype == planned)
        for name, planned in (("bf16", "bfloat16"), ("fp16", "float16"))
    ]
    casts = s.block("data_types")
    return any(is_wrong) or any(casts.get(key) for key in ("param_dtype", "buffer_dtype"))


def _has_16_bit_masters(s: PlanContext) -> bool:
    bf16, fp16 = s.block("bf16"), s.block("fp16")
    keys = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
    return any(bf16.get(k) for k in keys) or bool(fp16.get("fp16_master_weights_and_grads"))


def _adds_in_fp32_at_zero1(s: PlanContext) -> bool:
    accumulates_in = s.block("data_types").get("grad_accum_dtype")
    is_bf16 = s.layout.training_dtype == "bfloat16"
    return s.layout.zero_stage == 1 and is_bf16 and accumulates_in in ("fp32", "float32")


def _adds_in_16_bits(s: PlanContext) -> bool:
    if s.layout.training_dtype == "float32":
        return False
    found = (
        s.deepspeed.get("communication_data_type"),
        s.block("data_types").get("grad_accum_dtype"),
    )
    return any(str(dtype).lower() in ("fp16", "bf16", "float16", "bfloat16") for dtype in found)


def _splits_the_model(s: PlanContext) -> bool:
    return (
        s.block("tensor_parallel").get("autotp_size") not in (None, 0, 1)
        or bool(s.block("expert_parallel").get("enabled"))
        or s.deepspeed.get("sequence_parallel_size") not in (None, 1)
        or bool(s.block("pipeline"))
    )


def _divides_gradients_otherwise(s: PlanContext) -> bool:
    return (
        bool(s.deepspeed.get("prescale_gradients"))
        or s.deepspeed.get("gradient_predivide_factor") not in (None, 1)
        or str(s.deepspeed.get("gradient_allreduce_op") or "mean").lower() == "sum"
    )


DEEPSPEED_RULES: tuple[Rule[PlanContext], ...] = (
    *(_removed(key, instead) for key, instead in REMOVED.items()),
    *(_removed(key, instead, "zero_optimization") for key, instead in REMOVED_FROM_ZERO.items()),
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
        "buffers by itself",
        remedy="leave them out and set bf16 or fp16 in the run file",
        source="DeepSpeed 0.19.8 runtime/engine.py:1813",
    ),
    Rule(
        id="16-bit-masters",
        level="refuse",
        applies=_has_16_bit_masters,
        reason="master weights or optimizer states in 16 bits lose the small updates of an "
        "adapter, and save almost no memory",
        remedy="leave these keys of bf16 and fp16 out",
        source="DeepSpeed 0.19.8 runtime/precision_config.py:60",
    ),
    Rule(
        id="bf16-overflow-unchecked",
        level="warn",
        applies=lambda s: s.block("bf16").get("check_grad_overflow") is False,
        reason="bf16.check_grad_overflow: false applies a step whose gradients are not finite",
        remedy="leave it out",
        source=issue(_DEEPSPEED, 5242, 6976),
    ),
    Rule(
        id="zero1-fp32-accumulation",
        level="refuse",
        applies=_adds_in_fp32_at_zero1,
        reason="data_types.grad_accum_dtype: fp32 at ZeRO-1 in bf16 switches to another optimizer "
        "class, which checkpoints do not know",
        remedy="set zero_stage: 2, which adds in fp32",
        source="DeepSpeed 0.19.8 runtime/engine.py:2305",
    ),
    Rule(
        id="16-bit-gradients",
        level="warn",
        applies=_adds_in_16_bits,
        reason="communication_data_type or data_types.grad_accum_dtype add gradients in 16 bits, "
        "so the numbers depend on how a batch is split",
        remedy="leave them out: fp32 costs little for an adapter",
        source="DeepSpeed 0.19.8 runtime/engine.py:1718",
    ),
    Rule(
        id="torch-autocast",
        level="refuse",
        applies=lambda s: bool(s.block("torch_autocast").get("enabled")),
        reason="torch_autocast: adapters would have no 16-bit copy beside their fp32 masters",
        remedy="leave it out and set bf16 or fp16 in the run file",
        source="DeepSpeed 0.19.8 runtime/torch_autocast.py:53",
    ),
    Rule(
        id="gradient-division",
        level="refuse",
        applies=_divides_gradients_otherwise,
        reason="prescale_gradients, gradient_predivide_factor and gradient_allreduce_op change "
        "how gradients are averaged, which the loss is scaled for; ZeRO-2 and 3 stop at the "
        "first two",
        remedy="leave them out",
        source="DeepSpeed 0.19.8 runtime/zero/stage_1_and_2.py:350, stage3.py:395",
    ),
    Rule(
        id="own-accumulation",
        level="refuse",
        applies=lambda s: s.deepspeed.get("managed_gradient_accumulation") is False,
        reason="managed_gradient_accumulation: false, but the loop leaves it to DeepSpeed to know "
        "the last micro-batch of a step",
        remedy="leave it out",
        source="DeepSpeed 0.19.8 runtime/engine.py:2030",
    ),
    Rule(
        id="scheduler",
        level="refuse",
        applies=lambda s: "scheduler" in s.deepspeed,
        reason="scheduler: the learning rate of each step is set from the run file, so a second "
        "schedule would fight it",
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
        applies=lambda s: (
            bool(set(s.block("optimizer", "params")) - _ADAMW_PARAMETERS)
            or bool(set(s.block("optimizer")) - {"type", "params"})
        ),
        reason="optimizer.params may hold lr, betas, eps, weight_decay, torch_adam and fused; "
        "others change what a step or a checkpoint is",
        remedy="leave the others out; clipping is max_grad_norm in the run file",
        source="DeepSpeed 0.19.8 runtime/engine.py:2476",
    ),
    Rule(
        id="compiled-adam",
        level="warn",
        applies=lambda s: s.block("optimizer", "params").get("torch_adam") is False,
        reason="optimizer.params.torch_adam: false makes every machine compile an optimizer at "
        "start-up",
        remedy="leave it out",
        source=issue(_DEEPSPEED, 694, 2844),
    ),
    Rule(
        id="untested-optimizer",
        level="warn",
        applies=lambda s: bool(s.deepspeed.get("zero_allow_untested_optimizer")),
        reason="zero_allow_untested_optimizer has no effect: AdamW is one of the tested",
        remedy="leave it out",
        source="DeepSpeed 0.19.8 runtime/zero/utils.py:45",
    ),
    Rule(
        id="model-parallel",
        level="refuse",
        applies=_splits_the_model,
        reason="tensor_parallel, expert_parallel, sequence_parallel_size and pipeline know nothing "
        "of adapters and packed weights",
        remedy="leave them out; zero_stage: 3 shards the base",
        source="DeepSpeed 0.19.8 module_inject/auto_tp.py:308",
    ),
    Rule(
        id="4bit-deepcompile",
        level="refuse",
        applies=lambda s: s.settings.load_in_4bit and bool(s.block("compile").get("deepcompile")),
        reason="compile.deepcompile knows nothing of 4-bit layers",
        remedy="leave it out",
        source="DeepSpeed 0.19.8 compile/util.py:29",
    ),
    Rule(
        id="compile-not-yet",
        level="refuse",
        applies=lambda s: (
            any(s.block("compile").values())
            and not (s.settings.load_in_4bit and s.block("compile").get("deepcompile"))
        ),
        reason="compile: the run does not compile its model yet, which this block needs",
        remedy="leave it out",
        source="pipeline/train/engine.py",
    ),
    Rule(
        id="activation-checkpointing-no-effect",
        level="warn",
        applies=lambda s: bool(s.block("activation_checkpointing")),
        reason="activation_checkpointing has no effect on models of transformers",
        remedy="leave it out; set gradient_checkpointing in the run file",
        source="DeepSpeed 0.19.8 runtime/activation_checkpointing/checkpointing.py",
    ),
    Rule(
        id="other-engines",
        level="refuse",
        applies=lambda s: (
            any(
                s.block(name).get("enabled")
                for name in ("autotuning", "hybrid_engine", "data_efficiency")
            )
            or "weight_quantization" in s.deepspeed
        ),
        reason="autotuning, hybrid_engine, data_efficiency and weight_quantization choose batches, "
        "data or weights by themselves and know nothing of frozen ones",
        remedy="leave them out; launch/plan.py chooses the layout",
        source="DeepSpeed 0.19.8 autotuning/autotuner.py:279",
    ),
    Rule(
        id="checkpoint-writer",
        level="refuse",
        applies=lambda s: (
            s.block("checkpoint").get("writer") is not None or "datastates_ckpt" in s.deepspeed
        ),
        reason="checkpoint.writer and datastates_ckpt start writers for checkpoints that are never "
        "written here, and that fail without DeepSpeed's own launcher",
        remedy="leave them out; set save_strategy and save_steps",
        source="DeepSpeed 0.19.8 runtime/engine.py:1899",
    ),
    Rule(
        id="checkpoint-no-effect",
        level="warn",
        applies=lambda s: bool(s.block("checkpoint")),
        reason="checkpoint has no effect: checkpoints are this project's own",
        remedy="leave it out; set save_strategy and save_steps",
        source="pipeline/train/checkpoint.py",
    ),
    Rule(
        id="flops-profiler-4bit",
        level="warn",
        applies=lambda s: (
            s.settings.load_in_4bit and bool(s.block("flops_profiler").get("enabled"))
        ),
        reason="flops_profiler does not see the products of 4-bit layers, so it shows too little",
        remedy="leave it out",
        source="DeepSpeed 0.19.8 profiling/flops_profiler/profiler.py",
    ),
)
