"""Rules about the model, DoRA and the precision.

A class is "proven" if its checks on a small copy of the model have run (model/proof.py): they
compare loss, attention, packs, adapter and checkpointing with those of the class itself.
"""

from collections.abc import Sequence

from pipeline.commands import command
from pipeline.plan.cost.memory import checkpoint_bytes
from pipeline.plan.cost.speed import step_seconds
from pipeline.plan.cost.stopping import slow_stop_warning
from pipeline.plan.given.adapter_counts import trainable_parameters
from pipeline.plan.given.class_proof import reason_against_packs
from pipeline.plan.given.layout import SequenceProfile
from pipeline.plan.given.shape import DEQUANTISED
from pipeline.plan.rules.adapter import ADAPTER_RULES
from pipeline.plan.rules.rule import DEEPSPEED, PlanContext, PlanInput, Rule, issue
from pipeline.plan.rules.sequence_parallel import SEQUENCE_PARALLEL_RULES

_WRITE_RATE = 500e6  # bytes/s of a checkpoint to disk, hashing included: an assumption


def _first_reason(reasons: Sequence[str]) -> str:
    """The first reason; empty if there is none."""
    return reasons[0] if reasons else ""


def _reentrant_refusal(run: PlanContext) -> str:
    """The reason against re-entrant checkpointing, if the run uses it; only ZeRO-3 uses it."""
    if run.proof is None or not run.layout.is_sharded or not run.layout.checkpointed_layers:
        return ""
    return _first_reason(run.proof.without_reentrant)


def _packs_of_mixing_class(run: PlanInput) -> str:
    """If the run has packs: why the class does not keep the documents of a pack separate."""
    if not run.settings.packing:
        return ""
    is_set = "packing" in run.settings.model_fields_set
    if run.proof is None and not is_set:  # the plan itself then sets `packing: false`
        return ""
    return reason_against_packs(run.shape, run.proof)


def _lacks_flash_attention(run: PlanInput) -> bool:
    """Whether the run file asks for FlashAttention-2, and the GPU or the package is missing."""
    is_available = run.is_cuda and run.packages.get("flash-attn") is not None
    return run.settings.use_flash_attention is True and not is_available


def _is_too_old_for_bf16(run: PlanContext) -> bool:
    capability = run.hardware.compute_capability
    return (
        run.layout.training_dtype == "bfloat16" and capability is not None and capability < (8, 0)
    )


def _unquantised_experts(run: PlanContext) -> str:
    """The number of experts' parameters, which stay in 16 bits, if the base is quantised."""
    experts = run.shape.expert_parameters
    if not run.settings.is_quantised or not experts:
        return ""
    return f"{experts / 1e9:,.2f} of {run.shape.parameters / 1e9:,.2f} B parameters"


def _stops_slowly(run: PlanContext) -> bool:
    """Whether the launcher may kill the ranks before they have saved a checkpoint."""
    sequences = SequenceProfile(tokens=run.settings.max_length)
    step = step_seconds(run.shape, run.settings, run.layout, run.hardware, sequences)
    micro_batch_s = step.seconds_per_step / run.layout.accumulation_steps
    save_s = checkpoint_bytes(trainable_parameters(run.shape, run.settings)) / _WRITE_RATE
    return slow_stop_warning(save_s, micro_batch_s) is not None


def _checkpoints_all_layers(run: PlanContext) -> bool:
    return run.layout.checkpointed_layers == run.shape.num_layers


def _stores_4_bits_in_another_type(run: PlanContext) -> bool:
    storage = run.settings.bnb_4bit_quant_storage
    return run.settings.load_in_4bit and storage not in ("uint8", run.layout.training_dtype)


def _lengths_differ_in_one_forward(run: PlanContext) -> bool:
    """Whether documents or parts of documents of different lengths are in a forward pass."""
    layout = run.layout
    return run.settings.packing or layout.micro_batch_size > 1 or layout.sequence_parallel_size > 1


def _exceeds_original_length(run: PlanContext) -> str:
    """Text with the longest document, if it exceeds rope's original length and that matters.

    It matters if documents or parts of documents of different lengths share a forward pass.
    """
    limit, data = run.shape.rope_original_length, run.data
    if limit is None or data is None or not data.is_exact or data.longest is None:
        return ""
    if data.longest <= limit or not _lengths_differ_in_one_forward(run):
        return ""
    return f"the longest document has {data.longest} tokens, the original length is {limit} tokens"


def _may_exceed_original_length(run: PlanContext) -> str:
    """Text with `max_length`, if it exceeds rope's original length and data is not counted yet."""
    limit = run.shape.rope_original_length
    is_counted = run.data is not None and run.data.longest is not None
    if limit is None or is_counted or run.settings.max_length <= limit:
        return ""
    if not _lengths_differ_in_one_forward(run):
        return ""
    return f"max_length is {run.settings.max_length}, the original length is {limit} tokens"


def _exceeds_positions(run: PlanContext) -> str:
    """Text with the documents that exceed the model's number of positions; empty if none does."""
    limit, data = run.shape.max_positions, run.data
    if limit is None or run.settings.max_length <= limit:
        return ""
    if data is None or data.longest is None:
        return f"max_length is {run.settings.max_length}, the model has {limit} positions"
    if data.longest <= limit:
        return ""
    count = data.longer_than(limit)
    documents = "documents" if count is None else f"{count} of {data.documents} documents"
    return f"{documents} have up to {data.longest} tokens, the model has {limit} positions"


INPUT_RULES: tuple[Rule[PlanInput], ...] = (
    # These are checked before a layout is chosen. Otherwise a run with one of these problems might
    # only be told that it does not fit in memory.
    *ADAPTER_RULES,
    Rule(
        id="tokens-without-embeddings",
        level="refuse",
        applies=lambda run: (
            run.shape.required_vocab_size is not None
            and run.shape.required_vocab_size > run.shape.vocab_size
        ),
        reason="the tokenizer has tokens for which the model has no embedding",
        remedy="name them in new_tokens, which adds and trains their embeddings, or use the "
        "model's original tokenizer",
        source=issue("huggingface/transformers", 25241, 26024),
    ),
    Rule(
        id="class-refused",
        level="refuse",
        applies=lambda run: _first_reason(run.proof.refusals) if run.proof else "",
        reason="model: checks on a small copy of the model showed that its class cannot be trained "
        "correctly",
        remedy="if the reason names an adapter, try other lora_target_modules; else use a model of "
        "another type",
        source="pipeline/model/proof.py",
    ),
    Rule(
        id="class-packs",
        level="refuse",
        applies=_packs_of_mixing_class,
        reason="packing: this model class does not keep the documents of a pack separate",
        remedy="set packing: false, or leave it out",
        source="pipeline/model/proof.py",
    ),
    Rule(
        id="prequantised-base",
        level="refuse",
        applies=lambda run: (
            "" if run.shape.quantization in (None, *DEQUANTISED) else run.shape.quantization
        ),
        reason="the base is already quantised with a method that is not supported here, so an "
        "adapter cannot be merged into it exactly, according to quant_method in config.json",
        remedy="use the 16-bit model and load_in_4bit: true",
        source=issue(DEEPSPEED, 7096),
    ),
    Rule(
        id="bidirectional",
        level="refuse",
        applies=lambda run: run.shape.bidirectional_entry,
        reason="model: tokens of this model attend to later tokens, so it cannot learn to predict "
        "the next token, according to config.json",
        remedy="use a causal language model",
        source="transformers 5.23.0 models/gemma3/modeling_gemma3.py",
    ),
    Rule(
        id="other-head",
        level="refuse",
        applies=lambda run: run.shape.other_head,
        reason="model: the checkpoint has no language-model head, so the head would start from "
        "random numbers, according to config.json",
        remedy="use the causal language model that this checkpoint was trained from",
        source="transformers 5.23.0 modeling_utils.py",
    ),
    Rule(
        id="flash-attention-missing",
        level="refuse",
        applies=_lacks_flash_attention,
        reason="use_flash_attention: true needs a GPU and the package flash-attn, and this machine "
        "lacks one of them",
        remedy="set use_flash_attention: auto, which uses PyTorch's own attention kernels",
        source="transformers 5.23.0 modeling_utils.py",
    ),
    Rule(
        id="fp16-cpu",
        level="refuse",
        applies=lambda run: run.settings.fp16 is True and not run.is_cuda,
        reason="fp16: true needs a GPU, but the ranks of this run train on a CPU",
        remedy="set bf16: true, or both to false for fp32",
        source="DeepSpeed 0.19.8 accelerator/cpu_accelerator.py",
    ),
    *SEQUENCE_PARALLEL_RULES,
)

MODEL_RULES: tuple[Rule[PlanContext], ...] = (
    Rule(
        id="dora-zero3",
        level="refuse",
        applies=lambda run: run.settings.use_dora and run.layout.is_sharded,
        reason="use_dora at ZeRO-3: peft reads a layer's base weight for its norms after DeepSpeed "
        "has released it",
        remedy="set zero_stage: 2 (with load_in_4bit: true if the base does not fit otherwise), or "
        "leave use_dora out",
        source="peft 0.21.2 tuners/lora/dora.py, forward",
    ),
    Rule(
        id="dora-8bit",
        level="refuse",
        applies=lambda run: run.settings.use_dora and run.settings.load_in_8bit,
        reason="use_dora with load_in_8bit: peft does not copy an 8-bit layer before it computes "
        "the norms of its weight",
        remedy="set load_in_4bit: true instead, or leave use_dora out",
        source="peft 0.21.2 tuners/lora/dora.py, update_layer",
    ),
    Rule(
        id="class-re-entrant",
        level="refuse",
        applies=_reentrant_refusal,
        reason="zero_stage: ZeRO-3 uses re-entrant checkpointing, with which this model class has "
        "wrong gradients",
        remedy="set zero_stage: 2 or gradient_checkpointing: false",
        source="pipeline/model/proof.py",
    ),
    Rule(
        id="class-not-proven",
        level="warn",
        applies=lambda run: run.shape.is_from_class and run.proof is None and run.shape.model_type,
        reason="this model_type is not in the table of known families, and its class has not been "
        "checked on this machine: the checks of loss, attention, packing and adapter may refuse it",
        remedy=f"`{command('preflight')} RUN.yaml` runs the checks within seconds on the CPU; "
        "training runs them too, before it loads the base",
        source="pipeline/model/proof.py",
    ),
    Rule(
        id="class-merge",
        level="warn",
        applies=lambda run: _first_reason(run.proof.without_merge) if run.proof else "",
        reason="the adapter of this model cannot be merged into the base",
        remedy="serve the adapter with its base",
        source="pipeline/model/proof.py",
    ),
    Rule(
        id="8bit-zero3",
        level="refuse",
        applies=lambda run: run.settings.load_in_8bit and run.layout.zero_stage == 3,
        reason="load_in_8bit at ZeRO-3: every rank keeps the whole int8 base, and losses were "
        "wrong without an error",
        remedy="set zero_stage: 2, or load_in_4bit: true",
        source=issue("bitsandbytes-foundation/bitsandbytes", 1451)
        + "; bitsandbytes 0.50.2 nn/modules.py:1159",
    ),
    Rule(
        id="4bit-zero3-unchecked",
        level="refuse",
        applies=lambda run: (
            run.settings.load_in_4bit and run.layout.is_sharded and not _checkpoints_all_layers(run)
        ),
        reason="load_in_4bit at ZeRO-3 without gradient_checkpointing: each layer keeps its "
        "gathered weight until its backward pass, so every rank holds the whole base",
        remedy="set gradient_checkpointing: auto, or zero_stage: 2",
        source="bitsandbytes 0.50.2 autograd/_functions.py:357",
    ),
    Rule(
        id="4bit-storage",
        level="refuse",
        applies=_stores_4_bits_in_another_type,
        reason="bnb_4bit_quant_storage is neither uint8 nor the training dtype: DeepSpeed casts "
        "such weights to the training dtype, which corrupts the packed bits",
        remedy="leave it out, or set it to the training dtype",
        source="DeepSpeed 0.19.8 runtime/engine.py:1851",
    ),
    Rule(
        id="4bit-moe",
        level="warn",
        applies=_unquantised_experts,
        reason="load_in_4bit or load_in_8bit with a mixture of experts saves little memory: the "
        "experts are fused parameters, which bitsandbytes does not quantise",
        remedy="compare with a plan for the 16-bit base",
        source="transformers 5.23.0 integrations/bitsandbytes.py:184",
    ),
    Rule(
        id="bf16-old-gpu",
        level="refuse",
        applies=_is_too_old_for_bf16,
        reason="bf16: a GPU with a compute capability below 8.0 only emulates bfloat16",
        remedy="set fp16: true",
        source=issue("deepspeedai/DeepSpeedExamples", 418),
    ),
    Rule(
        id="fp16-for-bf16-model",
        level="warn",
        applies=lambda run: (
            run.layout.training_dtype == "float16" and run.shape.dtype == "bfloat16"
        ),
        reason="fp16 often overflows with a model that was trained in bfloat16",
        remedy="set bf16: true if the GPU supports it",
        source=issue("deepspeedai/DeepSpeedExamples", 418)
        + ", "
        + issue("ymcui/Chinese-LLaMA-Alpaca", 534),
    ),
    Rule(
        id="rope-original-length",
        level="refuse",
        applies=_exceeds_original_length,
        reason="rope_type longrope or dynamic depends on the longest document in a forward pass, "
        "so shorter documents in the same pack or micro-batch get wrong positions, and so do the "
        "parts of a document that is split over ranks",
        remedy="set max_length to the original length, or packing: false, batch_size: 1 and "
        "sequence_parallel_size: 1",
        source="transformers 5.23.0 modeling_rope_utils.py:38",
    ),
    Rule(
        id="rope-original-length-uncounted",
        level="warn",
        applies=_may_exceed_original_length,
        reason="rope_type longrope or dynamic: the run is refused once the data is counted, if a "
        "document exceeds the model's original length and shares a pack or micro-batch with "
        "others, or is split over ranks",
        remedy="set max_length to the original length, or packing: false, batch_size: 1 and "
        "sequence_parallel_size: 1",
        source="transformers 5.23.0 modeling_rope_utils.py:38",
    ),
    Rule(
        id="beyond-positions",
        level="warn",
        applies=_exceeds_positions,
        reason="documents exceed the number of positions that the model was trained with: "
        "attention is unreliable beyond it, and no rope setting in config.json extends it",
        remedy="set max_length to the number of positions, and over_length: split to keep the text",
        source="max_position_embeddings and rope_parameters in config.json",
    ),
    Rule(
        id="router-loss",
        level="warn",
        applies=lambda run: run.shape.has_router_loss,
        reason="output_router_logits: true in config.json makes other trainers add a "
        "load-balancing loss; this run trains without it, because routers are frozen",
        remedy="nothing to do",
        source="transformers 5.23.0 models/mixtral/modeling_mixtral.py",
    ),
    Rule(
        id="base-dropout",
        level="warn",
        applies=lambda run: ", ".join(run.shape.dropouts),
        reason="the base's config.json sets dropout or noise, which is active in training in "
        "addition to lora_dropout; the predicted memory does not include the masks",
        remedy="to train without it, set it to 0 in a copy of the model folder",
        source="transformers 5.23.0 models/phi/modeling_phi.py",
    ),
    Rule(
        id="zero1-bf16-accumulation",
        level="warn",
        applies=lambda run: (
            run.layout.zero_stage == 1
            and run.layout.training_dtype == "bfloat16"
            and run.layout.accumulation_steps > 1
        ),
        reason="ZeRO-1 in bf16 accumulates the gradients of micro-batches in bf16",
        remedy="set zero_stage: 2, which accumulates in fp32 and needs at most a few MB more",
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
