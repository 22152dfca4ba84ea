"""Rules about versions of packages that are known to be wrong."""

from pipeline.plan.rules.rule import PlanContext, Rule, issue

_DEEPSPEED = "deepspeedai/DeepSpeed"


def _loads_sharded_in_16_bits(s: PlanContext) -> bool:
    is_16_bit = s.layout.training_dtype != "float32"
    return s.layout.is_sharded and is_16_bit and not s.settings.is_quantised


VERSION_RULES: tuple[Rule[PlanContext], ...] = (
    Rule(
        id="deepspeed-zero3-frozen",
        level="refuse",
        applies=lambda s: s.layout.zero_stage == 3,
        reason="this DeepSpeed fails at ZeRO-3 with frozen weights and checkpointing",
        remedy="install deepspeed>=0.19.6",
        source=issue(_DEEPSPEED, 8148) + ", " + issue("huggingface/transformers", 47254),
        versions="deepspeed<0.19.3",
    ),
    Rule(
        id="deepspeed-wrong-gradients",
        level="refuse",
        applies=lambda s: s.layout.zero_stage == 2,
        reason="this DeepSpeed computes wrong gradients at ZeRO-2",
        remedy="install deepspeed>=0.19.6",
        source=issue(_DEEPSPEED, 7718, 7697),
        versions="deepspeed>=0.17.6,<0.18.3",
    ),
    Rule(
        id="deepspeed-zero1-last-micro-batch",
        level="refuse",
        applies=lambda s: s.layout.zero_stage == 1 and s.layout.training_dtype == "bfloat16",
        reason="this DeepSpeed leaves the last micro-batch out of the sum over ranks at ZeRO-1 "
        "in bf16",
        remedy="install deepspeed>=0.19.6",
        source=issue(_DEEPSPEED, 7985),
        versions="deepspeed>=0.18.6,<=0.18.10",
    ),
    Rule(
        id="deepspeed-shared-parameter",
        level="warn",
        applies=lambda s: s.layout.zero_stage == 2 and s.layout.training_dtype == "bfloat16",
        reason="this DeepSpeed drops a part of the gradient of a parameter that is used twice in "
        "one backward pass at ZeRO-2 in bf16",
        remedy="install deepspeed>=0.19.6",
        source=issue(_DEEPSPEED, 8224),
        versions="deepspeed>=0.18.3,<=0.19.3",
    ),
    Rule(
        id="transformers-zero3-rotary",
        level="refuse",
        applies=_loads_sharded_in_16_bits,
        reason="this transformers rounds the rotary frequencies to 16 bits when it loads a model "
        "sharded, so positions are wrong and nothing says so",
        remedy="install transformers>=5.23, or set zero_stage: 2",
        source="measured 2026-11-24 with 5.17 to 5.22; tests/adapter/test_published.py",
        versions="transformers<5.23",
    ),
)
