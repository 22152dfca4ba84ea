"""Rules about the targets of the adapter, its initial values and other trained modules."""

from pipeline.plan.given.adapter_counts import adapted_layers
from pipeline.plan.given.patterns import full_matches
from pipeline.plan.given.saved_modules import saved_modules
from pipeline.plan.rules.rule import PlanInput, Rule, issue

# Module names of embeddings and output heads in transformers' models.
_EMBEDDINGS_AND_HEADS = (
    "lm_head", "embed_out", "output_layer", "model.embed_tokens", "gpt_neox.embed_in",
    "transformer.wte", "transformer.word_embeddings",
)  # fmt: skip


def _targets_embeddings_or_head(run: PlanInput) -> bool:
    targets = run.settings.lora_target_modules
    if targets in ("auto", "all-linear"):  # these exclude embeddings and head
        return False
    if isinstance(targets, str):  # a regular expression
        return bool(full_matches(targets, _EMBEDDINGS_AND_HEADS, "lora_target_modules"))
    ends = {name.rsplit(".", 1)[-1] for name in _EMBEDDINGS_AND_HEADS}
    return any(target.rsplit(".", 1)[-1] in ends for target in targets)


def _options_unsupported_by_experts(run: PlanInput) -> str:
    """The settings of the run that adapters on experts do not support, as text; empty if none."""
    if not run.shape.targeted_experts(run.settings.lora_target_modules):
        return ""
    names = ("layers_to_transform", "exclude_modules", "rank_pattern", "alpha_pattern", "use_dora")
    return ", ".join(name for name in names if getattr(run.settings, name))


def _untied_by_peft(run: PlanInput) -> str:
    """Why peft would untie embeddings and head that are trained in full; empty if it would not.

    peft ties only embeddings with the name `embed_tokens`, to a head without a bias.
    """
    saved = saved_modules(run.shape, run.settings)
    if not saved or not saved[0].tied_name:
        return ""
    if saved[0].name.rpartition(".")[2] != "embed_tokens":
        return f"the embeddings are called {saved[0].name}, not embed_tokens"
    return "the head has a bias" if run.shape.has_head_bias else ""


def _unsupported_by_new_tokens(run: PlanInput) -> str:
    """Why rows of new tokens cannot be trained in this run; empty if they can."""
    settings, shape = run.settings, run.shape
    if not settings.new_tokens:
        return ""
    if settings.modules_to_save:
        return "modules_to_save trains all rows of these modules; leave one of the two out"
    if shape.has_head_bias:
        return "peft leaves out the bias of this model's head when rows of the head are trained"
    if shape.has_other_towers:
        return "not implemented for a model with other towers, such as vision"
    return ""


def _unsupported_by_split_base(run: PlanInput) -> str:
    """Why PiSSA or OLoRA is not possible in this run; empty if it is or if neither is used.

    With these, A and B start with a part of the base, which is subtracted from the base.
    """
    settings = run.settings
    if not settings.initialises_from_base:
        return ""
    if settings.is_quantised:
        return "a quantised base cannot represent its weights minus the initial product of B and A"
    if run.shape.targeted_experts(settings.lora_target_modules):
        return "peft computes the initial A and B only for linear layers, not for fused experts"
    names = [name for name in ("use_dora", "init_adapter") if getattr(settings, name)]
    if names:
        return f"it cannot be used together with {names[0]}"
    for layer in adapted_layers(run.shape, settings):
        if layer.linear.is_shared:
            return f"another block has the weight of {layer.name} too, so it would be changed twice"
        if layer.r > min(layer.linear.d_in, layer.linear.d_out):
            return f"r {layer.r} is more than the rank of the weight of {layer.name}"
    return ""


def _unsupported_by_loftq(run: PlanInput) -> str:
    """Why A and B cannot start with a correction of the base in this run; empty if they can."""
    settings = run.settings
    if not settings.corrects_quantisation:
        return ""
    if not settings.load_in_4bit:
        return "it corrects the errors of a 4-bit base, and load_in_4bit is not set"
    if run.shape.targeted_experts(settings.lora_target_modules):
        return "fused experts are not quantised, so they have no errors to correct"
    if settings.use_dora:
        return "not together with use_dora, whose magnitudes are those of the uncorrected weights"
    for layer in adapted_layers(run.shape, settings):
        if layer.r > min(layer.linear.d_in, layer.linear.d_out):
            return f"r {layer.r} is more than the rank of the weight of {layer.name}"
    return ""


def _unsupported_by_eva(run: PlanInput) -> str:
    """Why A cannot start as principal directions of inputs in this run; empty if it can."""
    if not run.settings.initialises_from_inputs:
        return ""
    if run.shape.targeted_experts(run.settings.lora_target_modules):
        return "the tokens that an expert gets are not recorded"
    for layer in adapted_layers(run.shape, run.settings):
        if 2 * layer.r > layer.linear.d_in:
            return f"r {layer.r} is more than half of the width of the input of {layer.name}"
    return ""


ADAPTER_RULES: tuple[Rule[PlanInput], ...] = (
    Rule(
        id="new-tokens",
        level="refuse",
        applies=_unsupported_by_new_tokens,
        reason="new_tokens cannot be trained in this run",
        remedy="leave new_tokens out",
        source="peft 0.21.2 tuners/trainable_tokens/layer.py, utils/other.py:1583",
    ),
    Rule(
        id="saved-tied",
        level="refuse",
        applies=_untied_by_peft,
        reason="modules_to_save: embeddings and head share their weight, and peft cannot load "
        "them as one from an adapter of this model",
        remedy="leave modules_to_save out; linear layers of the blocks can be named in "
        "lora_target_modules",
        source="peft 0.21.2 tuners/tuners_utils.py:1430, utils/other.py:648",
    ),
    Rule(
        id="experts-plain",
        level="refuse",
        applies=_options_unsupported_by_experts,
        reason="lora_target_modules: an adapter on fused experts does not support all of the "
        "given options",
        remedy="leave them out, or leave experts out of lora_target_modules",
        source="peft 0.21.2 tuners/lora/layer.py, ParamWrapper",
    ),
    Rule(
        id="split-base",
        level="refuse",
        applies=_unsupported_by_split_base,
        reason="init_lora_weights: pissa and olora are not possible in this run",
        remedy="set init_lora_weights: true or gaussian",
        source="peft 0.21.2 tuners/lora/layer.py, pissa_init and olora_init",
    ),
    Rule(
        id="loftq",
        level="refuse",
        applies=_unsupported_by_loftq,
        reason="init_lora_weights: loftq is not possible in this run",
        remedy="set init_lora_weights: true or gaussian, or load_in_4bit: true",
        source="peft 0.21.2 utils/loftq_utils.py, replace_lora_weights_loftq",
    ),
    Rule(
        id="eva",
        level="refuse",
        applies=_unsupported_by_eva,
        reason="init_lora_weights: eva is not possible in this run",
        remedy="set init_lora_weights: true or gaussian",
        source="peft 0.21.2 utils/incremental_pca.py, which computes twice the r directions",
    ),
    Rule(
        id="tied-pair",
        level="refuse",
        applies=lambda run: run.shape.is_tied and _targets_embeddings_or_head(run),
        reason="lora_target_modules names the head or the embeddings of a model in which these "
        "share their weight: when the adapter is loaded, its update is lost or changes both",
        remedy="name linear layers of the blocks, or leave it out to adapt all of them",
        source=issue("huggingface/peft", 2018) + ", " + issue("huggingface/transformers", 45127),
    ),
    Rule(
        id="embeddings-or-head-not-yet",
        level="refuse",
        applies=lambda run: not run.shape.is_tied and _targets_embeddings_or_head(run),
        reason="lora_target_modules names the head or the embeddings; adapters on these are not "
        "implemented",
        remedy="name linear layers of the blocks, or leave it out to adapt all of them",
        source="pipeline/plan/given/shape.py",
    ),
)
