"""The rule table: what is known to go wrong, and what is done about it.

A rule refuses (exit 2), warns, sets (says what was chosen because of it) or advises. docs/rules.md
is generated from this table. Versions come from package metadata: nothing is imported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from packaging.version import Version

from pipeline.config.settings import RunSettings
from pipeline.plan.hardware import Hardware
from pipeline.plan.layout import Layout
from pipeline.plan.shape import ModelShape

Level = Literal["refuse", "warn", "set", "advise"]


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What a rule may look at. `layout` and `deepspeed` are as chosen."""

    settings: RunSettings
    shape: ModelShape
    hardware: Hardware
    layout: Layout
    deepspeed: Mapping[str, Any]
    packages: Mapping[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One known trap."""

    id: str
    level: Level
    applies: Callable[[Situation], bool]
    reason: str
    remedy: str
    source: str

    @property
    def message(self) -> str:
        """Reason and remedy."""
        return f"{self.reason}; {self.remedy}"


def installed_versions() -> dict[str, str | None]:
    """Versions of the packages that rules ask about, None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "flash-attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def rules_that_apply(situation: Situation) -> list[Rule]:
    """Rules whose condition holds, refusals first."""
    order: tuple[Level, ...] = ("refuse", "warn", "set", "advise")
    found = [rule for rule in RULES if rule.applies(situation)]
    return sorted(found, key=lambda rule: order.index(rule.level))


def _between(found: str | None, low: str, high: str) -> bool:
    return found is not None and Version(low) <= Version(found) <= Version(high)


def _is_cpu(s: Situation) -> bool:
    return s.hardware.kind == "cpu"


def _too_old_for_bf16(s: Situation) -> bool:
    capability = s.hardware.compute_capability
    return s.layout.training_dtype == "bfloat16" and capability is not None and capability < (8, 0)


def _compute_dtype_differs(s: Situation) -> bool:
    asked = s.settings.bnb_4bit_compute_dtype
    return s.settings.load_in_4bit and asked not in ("auto", s.layout.training_dtype)


RULES: tuple[Rule, ...] = (
    Rule(
        id="packing-not-yet",
        level="refuse",
        applies=lambda s: s.settings.packing,
        reason="packing: documents cannot be laid in one sequence yet",
        remedy="set packing: false; batches are formed by length, so little padding is left",
        source="pipeline/data/order.py",
    ),
    Rule(
        id="8bit-zero3",
        level="refuse",
        applies=lambda s: s.settings.load_in_8bit and s.layout.zero_stage == 3,
        reason="load_in_8bit with ZeRO-3: every rank keeps the whole int8 base, and losses have "
        "been seen to be silently wrong",
        remedy="set zero_stage: 2, or load_in_4bit: true",
        source="bitsandbytes#1451; bitsandbytes 0.50.2 nn/modules.py:1159",
    ),
    Rule(
        id="prequantised-base",
        level="refuse",
        applies=lambda s: s.shape.quantization is not None,
        reason="the base is already quantised, so nothing can be merged into it exactly",
        remedy="use the 16-bit model and load_in_4bit: true",
        source="bitsandbytes 0.50.2; DeepSpeed#7096",
    ),
    Rule(
        id="fp16-cpu",
        level="refuse",
        applies=lambda s: s.layout.training_dtype == "float16" and _is_cpu(s),
        reason="fp16: true on a CPU",
        remedy="set bf16: true, or both to false for fp32",
        source="DeepSpeed 0.19.8 accelerator/cpu_accelerator.py",
    ),
    Rule(
        id="bf16-old-gpu",
        level="refuse",
        applies=_too_old_for_bf16,
        reason="bf16 on a GPU older than compute capability 8.0 is emulated",
        remedy="set fp16: true",
        source="DeepSpeedExamples#418",
    ),
    Rule(
        id="fp16-for-bf16-model",
        level="warn",
        applies=lambda s: s.layout.training_dtype == "float16" and s.shape.dtype == "bfloat16",
        reason="fp16 for a model trained in bfloat16 often overflows",
        remedy="set bf16: true if the GPU has it",
        source="DeepSpeedExamples#418; Chinese-LLaMA-Alpaca#534",
    ),
    Rule(
        id="flash-attention-missing",
        level="refuse",
        applies=lambda s: (
            s.settings.use_flash_attention is True
            and (_is_cpu(s) or s.packages.get("flash-attn") is None)
        ),
        reason="use_flash_attention: true, but there is no GPU or no package flash-attn here",
        remedy="set use_flash_attention: auto, which uses PyTorch's own attention",
        source="transformers 5.23 modeling_utils.py",
    ),
    Rule(
        id="deepspeed-zero3-frozen",
        level="refuse",
        applies=lambda s: (
            s.layout.zero_stage == 3 and _between(s.packages.get("deepspeed"), "0.1.0", "0.19.2")
        ),
        reason="this DeepSpeed fails at ZeRO-3 with frozen weights and checkpointing",
        remedy="install deepspeed>=0.19.6",
        source="DeepSpeed#8148",
    ),
    Rule(
        id="deepspeed-wrong-gradients",
        level="refuse",
        applies=lambda s: (
            s.layout.zero_stage == 2 and _between(s.packages.get("deepspeed"), "0.17.6", "0.18.2")
        ),
        reason="this DeepSpeed computes wrong gradients at ZeRO-2",
        remedy="install deepspeed>=0.19.6",
        source="DeepSpeed#7718; DeepSpeed#7697",
    ),
    Rule(
        id="transformers-zero3-rotary",
        level="refuse",
        applies=lambda s: (
            s.layout.zero_stage == 3
            and s.layout.training_dtype != "float32"
            and not s.settings.is_quantised
            and _between(s.packages.get("transformers"), "0.1.0", "5.22.999")
        ),
        reason="this transformers rounds the rotary frequencies to 16 bits when it loads a model "
        "sharded, so positions are wrong and nothing says so",
        remedy="install transformers>=5.23, or set zero_stage: 2",
        source="measured 2026-11-24 with 5.17 to 5.22; tests/engine/test_published.py",
    ),
    Rule(
        id="zero1-bf16-accumulation",
        level="warn",
        applies=lambda s: (
            s.layout.zero_stage == 1
            and s.layout.training_dtype == "bfloat16"
            and s.layout.accumulation_steps > 1
        ),
        reason="ZeRO-1 in bf16 adds the gradients of micro-batches in bf16",
        remedy="set zero_stage: 2, which adds them in fp32 for the same memory within a few MB",
        source="DeepSpeed 0.19.8 runtime/engine.py:2305",
    ),
    Rule(
        id="4bit-zero3-reentrant",
        level="set",
        applies=lambda s: s.settings.load_in_4bit and s.layout.zero_stage == 3,
        reason="4-bit layers keep their gathered weight until the backward pass",
        remedy="checkpointing is on and re-entrant, which lets go of it",
        source="bitsandbytes 0.50.2 autograd/_functions.py:357",
    ),
    Rule(
        id="compute-dtype",
        level="advise",
        applies=_compute_dtype_differs,
        reason="bnb_4bit_compute_dtype is not the type that the run trains in",
        remedy="leave it out, or set it to the training type",
        source="LoRA Basics, QLoRA-Specific",
    ),
    Rule(
        id="alpha",
        level="advise",
        applies=lambda s: s.settings.alpha not in (s.settings.lora_r, 2 * s.settings.lora_r),
        reason="lora_alpha is neither r nor 2 x r",
        remedy="leave lora_alpha out for 2 x r",
        source="LoRA Basics, LoRA Parameters",
    ),
)
