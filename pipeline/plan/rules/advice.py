"""Advice: rules of thumb for the settings of a run. No rule in this file stops a run.

docs/lora.md explains the rules of thumb.
"""

from collections.abc import Callable

from pipeline.config.presets import PRESETS, RANGES, Preset, preset_for
from pipeline.config.settings import settings_without_effect
from pipeline.plan.cost.memory import memory
from pipeline.plan.given.layout import SequenceProfile
from pipeline.plan.given.shape import DEQUANTISED
from pipeline.plan.rules.rule import PlanContext, Rule

_LEARNING_RATES = (1e-5, 2e-4)  # the usual range
# That range is for large models. The model of launch/runs/quickstart.yaml (135 M parameters) trains
# well at 2e-3, so rates up to 2e-3 are accepted for models below a billion parameters.
_SMALL_MODEL, _SMALL_MODEL_RATE = 10**9, 2e-3
_FEW_STEPS = 30  # a run with fewer optimizer steps gets advice
_SHORT_OF_MEMORY = 0.9  # a run that needs more than this fraction of the usable memory gets advice


def _has_unusual_rate(run: PlanContext) -> bool:
    low, high = _LEARNING_RATES
    if run.shape.parameters < _SMALL_MODEL:
        high = _SMALL_MODEL_RATE
    return not low <= run.settings.lr <= high


def _computes_in_another_type(run: PlanContext) -> bool:
    setting = run.settings.bnb_4bit_compute_dtype
    return run.settings.load_in_4bit and setting not in ("auto", run.layout.training_dtype)


def _evaluates_at_other_steps(run: PlanContext) -> bool:
    """Whether the run file sets both strategies, and evaluations and saves are at different steps.

    The defaults differ too, but a user who did not choose them needs no advice.
    """
    settings = run.settings
    are_set = {"evaluation_strategy", "save_strategy"} <= settings.model_fields_set
    evaluations, saves = settings.evaluations, settings.saves
    if settings.eval_data is None or not are_set or evaluations is None or saves is None:
        return False
    return evaluations != saves


def _settings_without_effect(run: PlanContext) -> str:
    """The settings without effect, each with the setting on which its effect depends."""
    without_effect = settings_without_effect(run.settings)
    return ", ".join(f"{name} ({reason})" for name, reason in without_effect.items())


def _is_short_of_memory(run: PlanContext) -> bool:
    """Whether checkpointing is off, and the run needs nearly all of the usable device memory."""
    if run.settings.gradient_checkpointing is not False:
        return False
    sequences = SequenceProfile(tokens=run.settings.max_length)
    need = memory(run.shape, run.settings, run.layout, run.hardware, sequences).device_peak_bytes
    return need > _SHORT_OF_MEMORY * run.hardware.usable_bytes(run.layout.ranks_per_node)


def _has_few_steps(run: PlanContext) -> bool:
    settings = run.settings
    if run.data is None or settings.max_steps is not None or settings.epochs == "auto":
        return False
    sequences = run.data.num_sequences(settings.max_length, is_packed=settings.packing)
    return settings.epochs * sequences < _FEW_STEPS * run.layout.global_batch_size


def _has_untiled_mlps(run: PlanContext) -> bool:
    """Whether the run file sets mlp_tiles, and no MLP of the model can be computed in tiles."""
    is_tileable = any(block.has_tileable_mlp for block in run.shape.blocks)
    return run.layout.mlp_tiles > 1 and not is_tileable


def _deviates_from(name: Preset) -> Callable[[PlanContext], bool]:
    """Condition of the rule that recommends a preset.

    It holds if the data has the size for which the preset is meant, but epochs are outside the
    preset's range or lora_dropout is below that of the preset.
    """
    low, high = RANGES[name]["epochs"]
    dropout = PRESETS[name]["lora_dropout"]

    def deviates(run: PlanContext) -> bool:
        if run.data is None or preset_for(run.data.documents) != name:
            return False
        epochs, max_steps = run.settings.epochs, run.settings.max_steps
        has_other_epochs = max_steps is None and epochs != "auto" and not low <= epochs <= high
        return has_other_epochs or run.settings.lora_dropout < dropout

    return deviates


def _rule_for_size(name: Preset, documents: str) -> Rule[PlanContext]:
    """The rule that recommends a preset; `documents`: the number of documents that it is for."""
    low, high = RANGES[name]["epochs"]
    dropout = PRESETS[name]["lora_dropout"]
    return Rule(
        id=f"data-{name}",
        level="advise",
        applies=_deviates_from(name),
        reason=f"rule of thumb for {documents} training documents: {low} to {high} epochs and "
        f"lora_dropout {dropout:g} or more",
        remedy=f"leave both out and set `preset: {name}`, which also sets "
        f"r {PRESETS[name]['lora_r']} and lr {PRESETS[name]['lr']:g} (too low for a model of less "
        "than a billion parameters: set lr as well)",
        source="docs/lora.md",
    )


ADVICE: tuple[Rule[PlanContext], ...] = (
    Rule(
        id="alpha",
        level="advise",
        applies=lambda run: (
            not run.settings.use_rslora
            and run.settings.alpha not in (run.settings.lora_r, 2 * run.settings.lora_r)
        ),
        reason="lora_alpha is neither r nor 2 x r (rule of thumb)",
        remedy="leave lora_alpha out; the default is 2 x r",
        source="docs/lora.md",
    ),
    Rule(
        id="dequantised-base",
        level="advise",
        applies=lambda run: run.shape.quantization if run.shape.quantization in DEQUANTISED else "",
        reason="the weights of this checkpoint are quantised, and are dequantised to 16 bits while "
        "it is loaded: base and merged model take 2 bytes per weight",
        remedy="load_in_4bit: true quantises the linear layers of the blocks again",
        source="pipeline/model/quantised_files.py",
    ),
    Rule(
        id="bf16-on-cpu",
        level="advise",
        applies=lambda run: (
            run.hardware.is_slow_in_bf16 and run.layout.training_dtype == "bfloat16"
        ),
        reason="this CPU multiplies matrices faster in fp32 than in bf16, so steps are faster in "
        "fp32, even compared with the fast path fp32_kernels",
        remedy="set bf16: false and fp16: false if memory allows; base and activations then take "
        "4 bytes per value",
        source="docs/log.md",
    ),
    Rule(
        id="lora-r",
        level="advise",
        applies=lambda run: not 8 <= run.settings.lora_r <= 128,
        reason="lora_r is outside the usual range of 8 to 128 (rule of thumb)",
        remedy="use 8 to 16 for a change of style, 32 to 64 for a new domain, 64 to 128 for new "
        "capabilities",
        source="docs/lora.md",
    ),
    Rule(
        id="learning-rate",
        level="advise",
        applies=_has_unusual_rate,
        reason="lr is outside the usual range of 1e-5 to 2e-4, or 2e-3 for models below a billion "
        "parameters (rule of thumb)",
        remedy="compare with a short run at 2e-4",
        source="docs/lora.md",
    ),
    _rule_for_size("small", "fewer than 1,000"),
    _rule_for_size("medium", "1,000 to 10,000"),
    _rule_for_size("large", "more than 10,000"),
    Rule(
        id="compute-dtype",
        level="advise",
        applies=_computes_in_another_type,
        reason="bnb_4bit_compute_dtype is not the training dtype",
        remedy="leave it out, or set it to the training dtype",
        source="docs/lora.md",
    ),
    Rule(
        id="double-quantisation",
        level="advise",
        applies=lambda run: (
            run.settings.load_in_4bit and not run.settings.bnb_4bit_use_double_quant
        ),
        reason="bnb_4bit_use_double_quant: false costs about 0.4 bits of memory per parameter",
        source="docs/lora.md",
    ),
    Rule(
        id="nf4",
        level="advise",
        applies=lambda run: run.settings.load_in_4bit and run.settings.bnb_4bit_quant_type == "fp4",
        reason="bnb_4bit_quant_type: fp4 is usually less accurate than nf4",
        remedy="leave it out; the default is nf4",
        source="docs/lora.md",
    ),
    Rule(
        id="few-steps",
        level="warn",  # so that the start of a run shows it
        applies=_has_few_steps,
        reason="the run has fewer than 30 steps, rarely enough to learn the data (rule of thumb)",
        remedy="set a smaller global_batch_size, more epochs, or packing: false if short documents "
        "are packed",
        source="docs/lora.md",
    ),
    Rule(
        id="evaluation-matches-saving",
        level="advise",
        applies=_evaluates_at_other_steps,
        reason="evaluations and saves are at different steps, so the checkpoints are not the "
        "states that were evaluated",
        remedy="give evaluation_strategy and save_strategy, and eval_steps and save_steps, the "
        "same value",
        source="docs/lora.md",
    ),
    Rule(
        id="without-effect",
        level="warn",
        applies=_settings_without_effect,
        reason="these settings are set and have no effect in this run",
        remedy="set what each of them needs, or remove them",
        source="pipeline/config/traits.py",
    ),
    Rule(
        id="untiled-mlps",
        level="warn",
        applies=_has_untiled_mlps,
        reason="mlp_tiles has no effect: MLPs are tiled only in blocks without experts, and only "
        "if the model_type is in pipeline/plan/given/families.py",
        remedy="remove mlp_tiles",
        source="pipeline/plan/given/block.py, has_tileable_mlp",
    ),
    Rule(
        id="checkpointing",
        level="advise",
        applies=_is_short_of_memory,
        reason="gradient_checkpointing: false, and the run is predicted to need more than 90 % of "
        "the usable device memory",
        remedy="set gradient_checkpointing: auto; checkpointing costs about 30 % of the time",
        source="docs/lora.md",
    ),
)
