"""Loading of the frozen base model in 32, 16, 8 or 4 bits, replicated or sharded.

Only this file and sharded_loading.py use bitsandbytes. At ZeRO-3 all ranks must load together.
"""

import copy
import gc
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.model.attention import FLASH, WITHIN_DOCUMENTS, WITHIN_DOCUMENTS_FP32
from pipeline.model.complete import Difference, require_no_difference
from pipeline.model.host_activations import HostActivations
from pipeline.model.load_fixes import corrected_loading
from pipeline.model.quantised_checkpoint import checkpoint_tensors
from pipeline.model.quantised_files import is_dequantised
from pipeline.model.sharded_loading import sharded_while_loading
from pipeline.model.structure import blocks
from pipeline.model.token_rows import set_token_rows
from pipeline.plan.given.fast_paths import FP32_KERNELS
from pipeline.plan.given.shape import DEQUANTISED, ModelShape, quantization_of
from pipeline.plan.plan import Plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORAGE = DTYPES | {"uint8": torch.uint8}
MapFunction = Callable[..., Iterable[Any]]  # `map`, or the method `map` of a pool of threads
_VALUES_PER_PART = 2**20  # number of values that are quantised at a time


def load_base(plan: Plan, device: torch.device) -> PreTrainedModel:
    """Load the base on its device, frozen, with activation checkpointing as planned.

    If the run has `new_tokens`, embeddings and head have rows for them. At ZeRO-3 the base is
    sharded while it is read.
    """
    settings, dtype = plan.settings, DTYPES[plan.training_dtype]
    options: dict[str, Any] = {"device_map": {"": device}}
    if settings.is_quantised:
        options["quantization_config"] = _quantization(settings, plan.shape, dtype)
    with sharded_while_loading(plan, device) if plan.layout.is_sharded else nullcontext():
        model = load_plain(
            settings.model_folder,
            dtype=dtype,
            attention=attention_name(plan),
            trust_remote_code=settings.trust_remote_code,
            **options,
        )
    gc.collect()
    freeze_base(model, plan)
    set_token_rows(model, plan)
    return model


def attention_name(plan: Plan) -> str:
    """Name of the run's attention function, for transformers' `attn_implementation`."""
    if plan.settings.use_flash_attention is True:
        return FLASH
    return WITHIN_DOCUMENTS if plan.fast_paths[FP32_KERNELS] else WITHIN_DOCUMENTS_FP32


def freeze_base(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Freeze a base in place, and enable activation checkpointing as planned; returns the base."""
    model.requires_grad_(False)
    for module in model.modules():
        # On a CPU with AVX512-BF16 a 4-bit layer repacks its weight in its first forward pass in
        # eval mode; ZeRO's shards need the original layout (bitsandbytes 0.50.2 nn/modules.py:613).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - of a library's class
    _checkpoint_activations(model, plan)
    return model


def load_plain(
    folder: Path,
    *,
    dtype: torch.dtype,
    attention: str = WITHIN_DOCUMENTS,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load a language model from a folder, unquantised by default, without network access.

    `attention`: name of the attention function. A checkpoint in mxfp4 or fp8 is dequantised
    tensor by tensor, so that transformers sees a 16-bit checkpoint. Raises UserError if the folder
    cannot be loaded completely.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]  # each rank would show its own
    tensors = None
    if is_dequantised(folder):
        options["config"] = model_config(folder, trust_remote_code=trust_remote_code)
        tensors = checkpoint_tensors(folder)
    try:
        with corrected_loading(tensors):
            model, loaded = auto_class(folder, trust_remote_code).from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model: {folder} cannot be loaded: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"model: {folder}: a tensor of the checkpoint has another shape than in config.json"
        ) from error
    # transformers fills missing weights with random numbers.
    missing, unused = sorted(loaded["missing_keys"]), sorted(loaded["unexpected_keys"])
    require_no_difference(folder, Difference(missing=missing, unused=unused))
    assert isinstance(model, PreTrainedModel)
    model.config.use_cache = False
    return model


def model_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model folder.

    It has no `quantization_config` if the weights are dequantised while they are loaded.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )
    for each in (config, config.get_text_config(decoder=True)):
        options = getattr(each, "quantization_config", None)
        if options and quantization_of({"quantization_config": options})[0] in DEQUANTISED:
            del each.quantization_config
    return config


def auto_class(folder: Path, trust_remote_code: bool) -> Any:
    """Auto class for a model folder: causal LM if possible, else image-text-to-text (Qwen-VL)."""
    config = model_config(folder, trust_remote_code=trust_remote_code)
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if has_own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def quantisation_error(settings: RunSettings, device: torch.device) -> float:
    """Mean absolute error of standard normal numbers after 4-bit quantisation and dequantisation.

    Raises the error of bitsandbytes if its library does not run on this device.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = quantize_4bit(
        weight,
        quant_type=settings.bnb_4bit_quant_type,
        compress_statistics=settings.bnb_4bit_use_double_quant,
    )
    return float((dequantize_4bit(packed, state) - weight).abs().mean())


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """Quantisation of the base in a run. `dtype`: the training dtype."""

    settings: RunSettings
    shape: ModelShape
    dtype: torch.dtype

    def layers(self, model: Any) -> set[str]:
        """Names of the layers that transformers quantises; `model` is on the meta device."""
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        config = _quantization(self.settings, self.shape, self.dtype)
        skipped = [*(config.llm_int8_skip_modules or []), *(model._keep_in_fp32_modules or [])]
        before = dict(model.named_modules())
        replaced = replace_with_bnb_linear(copy.deepcopy(model), skipped, config)
        after = dict(replaced.named_modules())
        return {name for name in before if type(after[name]) is not type(before[name])}

    @torch.no_grad()
    def round_trip(self, weight: torch.Tensor, map_parts: MapFunction = map) -> None:
        """Quantise and dequantise a linear layer's weight (d_out, d_in) in place.

        The result is the weight that training multiplies with. The weight is divided into parts,
        because bitsandbytes needs ten times the memory of its input. `map_parts`: applies a
        function to the parts, for example in several threads.
        """
        from bitsandbytes import functional

        settings, quant_type = self.settings, self.settings.bnb_4bit_quant_type
        rows = max(64, _VALUES_PER_PART // weight.shape[1] // 64 * 64)  # whole blocks of 64 values
        parts = weight.split(rows)  # type: ignore[no-untyped-call]
        if settings.load_in_8bit:
            for part in parts:
                codes, scales, _ = functional.int8_vectorwise_quant(part.to(self.dtype).half())
                part.copy_(functional.int8_vectorwise_dequant(codes, scales).to(self.dtype))
            return

        def quantize(part: torch.Tensor) -> Any:
            return functional.quantize_4bit(part.to(self.dtype), quant_type=quant_type)

        def dequantize(part: torch.Tensor, packed: Any) -> None:
            values, state = packed
            part.copy_(functional.dequantize_4bit(values, state))

        packed = list(map_parts(quantize, parts))
        absmax = torch.cat([state.absmax for _, state in packed])
        if settings.bnb_4bit_use_double_quant:  # as in bitsandbytes' functional.quantize_4bit
            offset = absmax.mean()
            codes, nested = functional.quantize_blockwise(absmax - offset, blocksize=256)
            absmax = functional.dequantize_blockwise(codes, nested) + offset
        for _, state in packed:
            count = len(state.absmax)
            state.absmax, absmax = absmax[:count], absmax[count:]
        list(map_parts(dequantize, parts, packed))


def _quantization(
    settings: RunSettings, shape: ModelShape, dtype: torch.dtype
) -> BitsAndBytesConfig:
    """The quantisation that transformers applies while it loads the base; `dtype`: of training."""
    # Modules outside the text decoder's blocks, such as a vision tower, are not quantised. Neither
    # are layers whose weight is read without a call of the layer.
    not_quantised = [rf"(?!{re.escape(shape.layers_name)}\.).*"]
    not_quantised += [re.escape(name) for name, x in shape.linears.items() if not x.is_quantised]
    if settings.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=not_quantised)  # type: ignore[no-untyped-call]
    compute = settings.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        llm_int8_skip_modules=not_quantised,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype if compute == "auto" else DTYPES[compute],
        bnb_4bit_quant_storage=STORAGE[settings.bnb_4bit_quant_storage],  # rule 4bit-storage
    )


def _checkpoint_activations(model: PreTrainedModel, plan: Plan) -> None:
    """Enable activation checkpointing in as many blocks as the plan has `checkpointed_layers`."""
    count = plan.layout.checkpointed_layers
    if not count:
        return
    # At ZeRO-3 checkpointing is re-entrant, for two reasons. The recomputed forward pass of a block
    # and its backward pass share one gather; otherwise DeepSpeed 0.19.8 releases the block after
    # the first module of its backward pass (partitioned_param_coordinator.py:473) and gathers it a
    # third time. And 4-bit layers do not save gathered weights for backward (rule
    # 4bit-zero3-unchecked). At other stages the non-re-entrant kind is used, as PyTorch recommends.
    options = {"use_reentrant": plan.layout.is_sharded}
    # Without dropout the recomputation draws no random numbers, so their state is not saved.
    options["preserve_rng_state"] = plan.settings.lora_dropout > 0 or _draws_random_numbers(model)
    model.gradient_checkpointing_enable(options)  # type: ignore[no-untyped-call]
    layers = blocks(model)
    assert count <= len(layers), f"planned {count} checkpointed blocks of {len(layers)}"
    checkpointed = set(layers[:count])
    for module in model.modules():  # also disables it in other blocks and in a vision tower
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = module in checkpointed
    if plan.layout.offload_activations:
        inputs = HostActivations()
        for layer in checkpointed:
            layer._gradient_checkpointing_func = partial(inputs.checkpoint, **options)  # type: ignore[assignment]


def _draws_random_numbers(model: PreTrainedModel) -> bool:
    """Whether blocks of this model use random numbers in training, such as for dropout."""
    probabilities = [
        value
        for key, value in model.config.get_text_config().to_dict().items()
        if re.search("drop|jitter|noise", key) and isinstance(value, int | float)
    ]
    probabilities += [module.p for module in model.modules() if isinstance(module, _DropoutNd)]
    return any(probability > 0 for probability in probabilities)


def remove_input_gradients(model: PreTrainedModel) -> None:
    """Remove the hooks that set `requires_grad` on the output of the embedding.

    transformers and peft register them. Call this function before `deepspeed.initialize`, because
    it would also remove the hooks of DeepSpeed.
    """
    for module in model.get_input_embeddings().modules():  # also the copy in modules_to_save
        module._forward_hooks.clear()


def require_input_gradients(model: PreTrainedModel) -> None:
    """Set `requires_grad` on the output of the embedding, as re-entrant checkpointing requires.

    Call this function after `deepspeed.initialize`. A hook that is registered earlier makes ZeRO-3
    gather the embedding a second time, for a backward pass that computes nothing.
    """

    def require(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        del module, inputs
        output.requires_grad_(True)

    model.get_input_embeddings().register_forward_hook(require)
