"""Rules about the model, the adapter, the precision and what is not there yet."""

import re

from pipeline.plan.cost.memory import checkpoint_bytes
from pipeline.plan.cost.speed import step_seconds
from pipeline.plan.cost.stopping import slow_stop_warning
from pipeline.plan.given.adapter_counts import trainable_parameters
from pipeline.plan.rules.rule import PlanContext, PlanInput, Rule, issue

_WRITE_RATE = 500e6  # bytes/s of a disk, hashing included; an assumption

# Names that transformers' models give their embeddings and their head, with the usual path.
_EMBEDDINGS_AND_HEADS = (
    "lm_head", "embed_out", "output_layer", "model.embed_tokens", "gpt_neox.embed_in",
    "transformer.wte", "transformer.word_embeddings",
)  # fmt: skip


def _targets_embeddings_or_head(s: PlanInput) -> bool:
    targets = s.settings.lora_target_modules
    if isinstance(targets, str):
        if targets == "all-linear":  # peft leaves the head out
            return False
        try:
            return any(re.fullmatch(targets, name) for name in _EMBEDDINGS_AND_HEADS)
        except re.error:
            return False
    ends = {name.rsplit(".", 1)[-1] for name in _EMBEDDINGS_AND_HEADS}
    return any(target.rsplit(".", 1)[-1] in ends for target in targets)


def _is_cpu(s: PlanInput) -> bool:
    return s.hardware.kind == "cpu"


def _flash_attention_missing(s: PlanInput) -> bool:
    is_there = not _is_cpu(s) and s.packages.get("flash-attn") is not None
    return s.settings.use_flash_attention is True and not is_there


def _too_old_for_bf16(s: PlanContext) -> bool:
    capability = s.hardware.compute_capability
    return s.layout.training_dtype == "bfloat16" and capability is not None and capability < (8, 0)


def _stops_slowly(s: PlanContext) -> bool:
    step = step_seconds(s.shape, s.settings, s.layout, s.hardware, s.settings.max_length)
    micro_batch_s = step.seconds_per_step / s.layout.accumulation_steps
    save_s = checkpoint_bytes(trainable_parameters(s.shape, s.settings)) / _WRITE_RATE
    return slow_stop_warning(save_s, micro_batch_s) is not None


def _is_checkpointed(s: PlanContext) -> bool:
    return s.layout.checkpointed_layers == s.shape.num_layers


def _storage_differs(s: PlanContext) -> bool:
    storage = s.settings.bnb_4bit_quant_storage
    return s.settings.load_in_4bit and storage not in ("uint8", s.layout.training_dtype)


def _saves_modules(s: PlanInput) -> bool:
    return bool(s.settings.modules_to_save)


# Applied before anything is chosen, so that "it does not fit" never hides them.
INPUT_RULES: tuple[Rule[PlanInput], ...] = (
    Rule(
        id="modules-to-save-zero3",
        level="refuse",
        applies=lambda s: _saves_modules(s) and s.settings.zero_stage == 3,
        reason="modules_to_save with zero_stage: 3: copies of sharded modules come out empty or "
        "fail when they are loaded",
        remedy="leave modules_to_save out",
        source=issue("huggingface/peft", 1450, 2450, 2453),
    ),
    Rule(
        id="modules-to-save-4bit",
        level="refuse",
        applies=lambda s: _saves_modules(s) and s.settings.load_in_4bit,
        reason="modules_to_save with load_in_4bit: on a quantised base, updates have gone to the "
        "original module and not to the copy that is saved",
        remedy="leave modules_to_save out",
        source=issue("huggingface/peft", 602, 2603, 2946),
    ),
    Rule(
        id="modules-to-save-not-yet",
        level="refuse",
        applies=lambda s: (
            _saves_modules(s) and not s.settings.load_in_4bit and s.settings.zero_stage != 3
        ),
        reason="modules_to_save: modules cannot be trained in full beside the adapter yet",
        remedy="leave it out; lora_target_modules adapts them by LoRA where they are linear layers "
        "of the blocks",
        source="pipeline/model/adapter.py",
    ),
    Rule(
        id="tied-pair",
        level="refuse",
        applies=lambda s: s.shape.is_tied and _targets_embeddings_or_head(s),
        reason="lora_target_modules names the head or the embeddings of a model that ties them: "
        "an update of one side is lost, or changes both, when the model is loaded again",
        remedy="name linear layers of the blocks, or all-linear",
        source=issue("huggingface/peft", 2018) + ", " + issue("huggingface/transformers", 45127),
    ),
    Rule(
        id="embeddings-or-head-not-yet",
        level="refuse",
        applies=lambda s: not s.shape.is_tied and _targets_embeddings_or_head(s),
        reason="lora_target_modules names the head or the embeddings, which cannot be adapted yet",
        remedy="name linear layers of the blocks, or all-linear",
        source="pipeline/plan/given/shape.py",
    ),
    Rule(
        id="tokens-without-embeddings",
        level="refuse",
        applies=lambda s: (
            s.shape.num_tokens is not None and s.shape.num_tokens > s.shape.vocab_size
        ),
        reason="the tokenizer has tokens that the model has no embeddings for; resized embeddings "
        "would have to be trained in full",
        remedy="use the tokenizer that came with the model, and write new markers with its own "
        "tokens",
        source=issue("huggingface/transformers", 25241, 26024),
    ),
    Rule(
        id="prequantised-base",
        level="refuse",
        applies=lambda s: s.shape.quantization is not None,
        reason="the base is already quantised, so nothing can be merged into it exactly",
        remedy="use the 16-bit model and load_in_4bit: true",
        source=issue("deepspeedai/DeepSpeed", 7096),
    ),
    Rule(
        id="packing-own-code",
        level="refuse",
        applies=lambda s: (
            s.settings.packing and s.settings.trust_remote_code and s.shape.has_own_code
        ),
        reason="packing with a model that brings its own code (trust_remote_code, auto_map): its "
        "attention may not know where a document ends, and documents of a pack would see each "
        "other",
        remedy="set packing: false, or trust_remote_code: false to take transformers' own class",
        source="transformers 5.23.0 modeling_utils.py",
    ),
    Rule(
        id="flash-attention-missing",
        level="refuse",
        applies=_flash_attention_missing,
        reason="use_flash_attention: true, but there is no GPU or no package flash-attn here",
        remedy="set use_flash_attention: auto, which uses PyTorch's own attention",
        source="transformers 5.23.0 modeling_utils.py",
    ),
    Rule(
        id="fp16-cpu",
        level="refuse",
        applies=lambda s: s.settings.fp16 is True and _is_cpu(s),
        reason="fp16: true on a CPU",
        remedy="set bf16: true, or both to false for fp32",
        source="DeepSpeed 0.19.8 accelerator/cpu_accelerator.py",
    ),
)

MODEL_RULES: tuple[Rule[PlanContext], ...] = (
    Rule(
        id="8bit-zero3",
        level="refuse",
        applies=lambda s: s.settings.load_in_8bit and s.layout.zero_stage == 3,
        reason="load_in_8bit with ZeRO-3: every rank keeps the whole int8 base, and losses have "
        "been seen to be silently wrong",
        remedy="set zero_stage: 2, or load_in_4bit: true",
        source=issue("bitsandbytes-foundation/bitsandbytes", 1451)
        + "; bitsandbytes 0.50.2 nn/modules.py:1159",
    ),
    Rule(
        id="4bit-zero3-reentrant",
        level="set",
        applies=lambda s: s.settings.load_in_4bit and s.layout.is_sharded and _is_checkpointed(s),
        reason="4-bit layers keep their gathered weight until the backward pass",
        remedy="checkpointing is on and re-entrant, which lets go of it",
        source="bitsandbytes 0.50.2 autograd/_functions.py:357",
    ),
    Rule(
        id="4bit-zero3-unchecked",
        level="refuse",
        applies=lambda s: (
            s.settings.load_in_4bit and s.layout.is_sharded and not _is_checkpointed(s)
        ),
        reason="4 bits at ZeRO-3 without gradient_checkpointing: each layer keeps its gathered "
        "weight until the backward pass, so every rank comes to hold the whole base",
        remedy="set gradient_checkpointing: auto, or zero_stage: 2",
        source="bitsandbytes 0.50.2 autograd/_functions.py:357",
    ),
    Rule(
        id="4bit-storage",
        level="refuse",
        applies=_storage_differs,
        reason="bnb_4bit_quant_storage is neither uint8 nor the type that the run trains in: "
        "DeepSpeed casts it, which turns the packed bits into other numbers",
        remedy="leave it out, or set it to the training type",
        source="DeepSpeed 0.19.8 runtime/engine.py:1851",
    ),
    Rule(
        id="4bit-moe",
        level="warn",
        applies=lambda s: s.settings.load_in_4bit and s.shape.num_experts > 0,
        reason="load_in_4bit with a mixture of experts: the experts are fused parameters, which "
        "bitsandbytes leaves in 16 bits, so little memory is saved",
        remedy="plan with the 16-bit base as well and compare",
        source="transformers 5.23.0 integrations/bitsandbytes.py:184",
    ),
    Rule(
        id="bf16-old-gpu",
        level="refuse",
        applies=_too_old_for_bf16,
        reason="bf16 on a GPU older than compute capability 8.0 is emulated",
        remedy="set fp16: true",
        source=issue("deepspeedai/DeepSpeedExamples", 418),
    ),
    Rule(
        id="fp16-for-bf16-model",
        level="warn",
        applies=lambda s: s.layout.training_dtype == "float16" and s.shape.dtype == "bfloat16",
        reason="fp16 for a model trained in bfloat16 often overflows",
        remedy="set bf16: true if the GPU has it",
        source=issue("deepspeedai/DeepSpeedExamples", 418)
        + ", "
        + issue("ymcui/Chinese-LLaMA-Alpaca", 534),
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
        id="slow-stop",
        level="warn",
        applies=_stops_slowly,
        reason="one save and one micro-batch are predicted to take longer than the 30 s that "
        "DeepSpeed's launcher waits after Ctrl-C or SIGTERM before it kills a rank",
        remedy="stop this run with its `stop` file, or set a smaller batch_size",
        source="DeepSpeed 0.19.8 launcher/launch.py",
    ),
)
