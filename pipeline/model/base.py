"""Load the frozen base: 16- or 32-bit, 8-bit or 4-bit, whole or sharded as it is read.

The only importer of bitsandbytes (through transformers). Collective under ZeRO-3: every rank.
"""

import gc
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.model.attention import FLASH, WITHIN_DOCUMENTS
from pipeline.plan.plan import Plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORAGE = DTYPES | {"uint8": torch.uint8}


def load_base(plan: Plan, device: torch.device) -> PreTrainedModel:
    """The base on its device, frozen, with checkpointing as planned.

    At ZeRO-3 an unquantised base is sharded while it is read; a quantised one is whole on every
    rank until DeepSpeed takes it over (transformers 5.23 skips sharding for it), or where the plan
    says so in host memory, from which it is shared out.
    """
    settings, dtype = plan.settings, DTYPES[plan.training_dtype]
    is_staged = plan.layout.loads_through_host
    options: dict[str, Any] = {}
    sharding = None
    if settings.is_quantised:
        options["quantization_config"] = _quantization(plan)
    if settings.is_quantised or plan.layout.zero_stage < 3:
        options["device_map"] = {"": torch.device("cpu") if is_staged else device}
    else:
        sharding = _sharding(plan)  # transformers shards on loading only while this object lives
    model = load_plain(
        settings.model_folder,
        dtype=dtype,
        attention=FLASH if settings.use_flash_attention is True else WITHIN_DOCUMENTS,
        trust_remote_code=settings.trust_remote_code,
        **options,
    )
    del sharding
    gc.collect()
    model.requires_grad_(False)
    for module in model.modules():
        # On a CPU with AVX512-BF16 a 4-bit layer repacks its weight when it first meets eval mode;
        # the copies that ZeRO shards and our tests compare must stay as they are (bitsandbytes
        # 0.50.2 nn/modules.py:613).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - of a library's class
    if is_staged:
        _share_out(model, plan, device)
    _checkpoint_activations(model, plan)
    return model


def _share_out(model: PreTrainedModel, plan: Plan, device: torch.device) -> None:
    """Shard a base that lies whole in host memory, one tensor on the device at a time.

    Collective: every rank. What is no parameter follows whole, since DeepSpeed moves nothing of a
    base that is sharded already (0.19.8 runtime/engine.py:1859): buffers, and 4-bit constants.
    """
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path=dict(plan.deepspeed))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            state.to(device)


def load_plain(
    folder: Path,
    *,
    dtype: torch.dtype,
    attention: str = WITHIN_DOCUMENTS,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A causal language model from a folder, without any network."""
    disable_progress_bar()  # type: ignore[no-untyped-call]  # one a rank otherwise
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model: {folder} cannot be loaded: {error}") from error
    assert isinstance(model, PreTrainedModel)
    model.config.use_cache = False
    return model


def tile_error(settings: RunSettings, device: torch.device) -> float:
    """Mean error, in standard deviations, of normal numbers after 4 bits and back on a device.

    Raises what bitsandbytes raises where its library does not run there.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    tile = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = quantize_4bit(
        tile,
        quant_type=settings.bnb_4bit_quant_type,
        compress_statistics=settings.bnb_4bit_use_double_quant,
    )
    return float((dequantize_4bit(packed, state) - tile).abs().mean())


def _quantization(plan: Plan) -> BitsAndBytesConfig:
    settings = plan.settings
    if settings.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    asked = settings.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=DTYPES[plan.training_dtype if asked == "auto" else asked],
        bnb_4bit_quant_storage=STORAGE[settings.bnb_4bit_quant_storage],  # rule 4bit-storage
    )


def _sharding(plan: Plan) -> Any:
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(dict(plan.deepspeed))  # type: ignore[no-untyped-call]


def _checkpoint_activations(model: PreTrainedModel, plan: Plan) -> None:
    count = plan.layout.checkpointed_layers
    if not count:
        return
    # At ZeRO-3 re-entrant: the recomputed forward of a block and its backward then share one gather
    # (otherwise DeepSpeed 0.19.8 lets go of the block after the first of its backward modules,
    # partitioned_param_coordinator.py:473, and gathers it a third time), and 4-bit layers do not
    # keep the gathered base (rule 4bit-zero3-unchecked). Elsewhere the other kind is PyTorch's
    # recommendation.
    is_reentrant = plan.layout.is_sharded
    model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})  # type: ignore[no-untyped-call]
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert count <= len(layers), f"planned {count} checkpointed blocks of {len(layers)}"
    for layer in layers[count:]:
        layer.gradient_checkpointing = False


def forget_input_gradients(model: PreTrainedModel) -> None:
    """Undo what transformers and peft asked of the embedding, each for itself, with a hook.

    Before `deepspeed.initialize`, whose hooks are to stay.
    """
    model.get_input_embeddings()._forward_hooks.clear()


def require_input_gradients(model: PreTrainedModel) -> None:
    """Let gradients into re-entrant blocks, which pass none on where no input needs one.

    After `deepspeed.initialize`: what is asked for before makes ZeRO-3 gather the embedding once
    more, for a backward that has nothing to do.
    """

    def require(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        del module, inputs
        output.requires_grad_(True)

    model.get_input_embeddings().register_forward_hook(require)
