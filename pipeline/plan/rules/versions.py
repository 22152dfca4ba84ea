"""Rules about versions of packages that train wrongly, whatever the model."""

from pipeline.plan.rules.rule import DEEPSPEED, PlanContext, Rule, issue


def _loads_sharded_in_16_bits(run: PlanContext) -> bool:
    """Whether an unquantised base is loaded in bf16 or fp16 at ZeRO-3."""
    is_16_bit = run.layout.training_dtype != "float32"
    return run.layout.is_sharded and is_16_bit and not run.settings.is_quantised


VERSION_RULES: tuple[Rule[PlanContext], ...] = (
    Rule(
        id="deepspeed-zero3-frozen",
        level="refuse",
        applies=lambda run: run.layout.zero_stage == 3,
        reason="this version of DeepSpeed fails at ZeRO-3 with frozen weights and activation "
        "checkpointing",
        remedy="install deepspeed>=0.19.6",
        source=issue(DEEPSPEED, 8148) + ", " + issue("huggingface/transformers", 47254),
        versions="deepspeed<0.19.3",
    ),
    Rule(
        id="deepspeed-wrong-gradients",
        level="refuse",
        applies=lambda run: run.layout.zero_stage == 2,
        reason="this version of DeepSpeed computes wrong gradients at ZeRO-2",
        remedy="install deepspeed>=0.19.6",
        source=issue(DEEPSPEED, 7718, 7697),
        versions="deepspeed>=0.17.6,<0.18.3",
    ),
    Rule(
        id="deepspeed-zero1-last-micro-batch",
        level="refuse",
        applies=lambda run: run.layout.zero_stage == 1 and run.layout.training_dtype == "bfloat16",
        reason="this version of DeepSpeed omits the last micro-batch from the reduction over ranks "
        "at ZeRO-1 in bf16",
        remedy="install deepspeed>=0.19.6",
        source=issue(DEEPSPEED, 7985),
        versions="deepspeed>=0.18.6,<=0.18.10",
    ),
    Rule(
        id="deepspeed-shared-parameter",
        level="warn",
        applies=lambda run: run.layout.zero_stage == 2 and run.layout.training_dtype == "bfloat16",
        reason="this version of DeepSpeed loses part of the gradient of a parameter that is used "
        "twice in one backward pass at ZeRO-2 in bf16",
        remedy="install deepspeed>=0.19.6",
        source=issue(DEEPSPEED, 8224),
        versions="deepspeed>=0.18.3,<=0.19.3",
    ),
    Rule(
        id="transformers-zero3-rotary",
        level="refuse",
        applies=_loads_sharded_in_16_bits,
        reason="this version of transformers rounds the rotary frequencies to 16 bits when it "
        "loads a model at ZeRO-3, so positions are wrong without an error",
        remedy="install transformers>=5.23, or set zero_stage: 2",
        source="measured 2026-11-24 with 5.17 to 5.22; tests/adapter/test_published.py",
        versions="transformers<5.23",
    ),
)
