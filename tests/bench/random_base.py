"""Bases with random weights that are created on the device, for benchmarks: no weight files."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from pipeline.model.base import DTYPES, Quantisation, attention_name, freeze_base
from pipeline.model.checkpoint_names import model_on_meta


def random_base(plan, device):
    """The base of a plan with random weights, in 32, 16, 8 or 4 bits, frozen as in a run.

    The model folder needs only config.json. Not for ZeRO-3, where loading shards the base.
    """
    settings, dtype = plan.settings, DTYPES[plan.training_dtype]
    config = AutoConfig.from_pretrained(settings.model_folder, local_files_only=True)
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention_name(plan)
        )
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(std=0.02)
    model.config.use_cache = False
    if settings.is_quantised:
        quantisation = Quantisation(settings=settings, shape=plan.shape, dtype=dtype)
        for name in quantisation.layers(model_on_meta(settings.model_folder)):
            model.set_submodule(name, _quantised(model.get_submodule(name), settings, dtype))
    return freeze_base(model, plan)


def _quantised(linear, settings, dtype):
    """A linear layer of bitsandbytes with the weight of `linear`."""
    import bitsandbytes as bnb

    d_out, d_in = linear.weight.shape
    weight, device = linear.weight.data, linear.weight.device
    if settings.load_in_8bit:
        layer = bnb.nn.Linear8bitLt(d_in, d_out, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(d_in, d_out, bias=False, compute_dtype=dtype)
        layer.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            quant_type=settings.bnb_4bit_quant_type,
            compress_statistics=settings.bnb_4bit_use_double_quant,
            module=layer,
        )
    layer.bias = linear.bias
    return layer.to(device)
