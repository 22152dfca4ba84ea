"""LoRA adapter: its peft configuration, its attachment to the base, its trainable parameters.

Experts are "fused" if one tensor holds the weights of all experts of a block.
"""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from pipeline.config.settings import RunSettings
from pipeline.model.base import DTYPES
from pipeline.model.checkpoint_names import model_on_meta
from pipeline.model.token_rows import add_rows
from pipeline.plan.given.adapter_counts import adapted_layers
from pipeline.plan.given.new_tokens import token_rows
from pipeline.plan.given.saved_modules import saved_modules
from pipeline.plan.given.shape import EXPERTS, read_shape
from pipeline.plan.plan import Plan


def lora_config(settings: RunSettings) -> LoraConfig:
    """The peft configuration of the adapter.

    If fused experts are among the targets, `lora_dropout` is 0: peft does not support dropout for
    experts, and a configuration has one dropout for all layers. `attach_adapter` then sets the
    dropout of the linear layers.
    """
    shape = read_shape(str(settings.model_folder), trust_remote_code=settings.trust_remote_code)
    experts, saved = _target_parameters(settings), saved_modules(shape, settings)
    rows = token_rows(shape, settings)
    # With pissa, olora or loftq, peft would change the base while it attaches the adapter.
    # split_base.py and loftq.py set the initial values instead.
    initial: Any = "gaussian" if settings.init_lora_weights == "gaussian" else True
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft only divides it by r
        lora_dropout=0.0 if experts else settings.lora_dropout,
        target_modules=_target_modules(settings),
        target_parameters=experts or None,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=initial,
        modules_to_save=[module.name for module in saved] or None,
        ensure_weight_tying=any(module.tied_name for module in saved),
        trainable_token_indices=None if rows is None else dict.fromkeys(rows.modules, rows.indices),
        bias="none",
    )


def _target_modules(settings: RunSettings) -> list[str]:
    """Value of `target_modules` in peft's configuration, for the layers that the plan counted.

    The result is always a list of names. Not every serving engine supports `all-linear` or a
    regular expression, and with these peft 0.21.2 would also adapt the fused experts and routers of
    a mixture of experts (utils/transformers_weight_conversion.py).

    A name is the last part of the full name, such as q_proj. Full names are used in three cases:

    - The model has other modules with the same last part, as in a vision tower.
    - The last part is an index: `0` would also match the block `model.layers.0`.
    - The settings exclude some layers.
    """
    shape = read_shape(str(settings.model_folder), trust_remote_code=settings.trust_remote_code)
    targets = shape.without_auto(settings.lora_target_modules)
    needs_full_names = (
        shape.has_other_towers
        or settings.layers_to_transform
        or settings.exclude_modules
        or any(name.rsplit(".", 1)[-1].isdigit() for name in shape.linears)
    )
    if not isinstance(targets, str) and not needs_full_names:
        return sorted({target for target in targets if target != EXPERTS})
    names = [layer.name for layer in adapted_layers(shape, settings)]
    if targets in ("auto", "all-linear") and not needs_full_names:
        names = [name.rsplit(".", 1)[-1] for name in names]
    return sorted(set(names))


def _target_parameters(settings: RunSettings) -> list[str]:
    """Value of `target_parameters` in peft's configuration: the adapted fused tensors.

    The names are relative to their block, or full names if the model has a vision tower.
    """
    shape = read_shape(str(settings.model_folder), trust_remote_code=settings.trust_remote_code)
    experts = shape.targeted_experts(settings.lora_target_modules)
    return sorted({name if shape.has_other_towers else tensor.name for name, tensor in experts})


def attach_adapter(base: PreTrainedModel, plan: Plan) -> PeftModel:
    """Attach a new adapter in the training dtype to the base. It is identical on all ranks.

    The dtype is set explicitly, because otherwise it would depend on how the base was loaded: fp32
    at ZeRO-3, 16 bits at other stages (DeepSpeed 0.19.8 runtime/engine.py:1859).
    """
    torch.manual_seed(plan.settings.seed)
    model = get_peft_model(base, lora_config(plan.settings), autocast_adapter_dtype=False)
    assert isinstance(model, PeftModel)
    dropout = plan.settings.lora_dropout
    if dropout > 0 and _target_parameters(plan.settings):  # see lora_config
        for module in model.modules():
            if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
                module.lora_dropout["default"] = nn.Dropout(dropout)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[plan.training_dtype])
    counted = sum(parameter.numel() for parameter in trainable(model).values())
    assert counted == plan.trainable, f"planned {plan.trainable} trainable, peft has {counted}"
    return model


def trainable(model: PeftModel) -> dict[str, nn.Parameter]:
    """Key in peft's adapter file -> trainable parameter, in the same order on all ranks.

    peft itself provides the keys: the key of a LoRA matrix does not contain the adapter's name, and
    other kinds of parameters have other names in the file than in the module tree. A tied weight is
    one parameter, with the key of the embeddings.
    """
    named = dict(sorted(model.named_parameters(remove_duplicate=False)))
    in_file = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    key_by_id: dict[int, str] = {}
    for key, parameter in in_file.items():  # in the order of modules: embeddings before the head
        key_by_id.setdefault(id(parameter), key)
    trained_by_id = {id(p): p for p in named.values() if p.requires_grad}
    return {key_by_id[i]: parameter for i, parameter in trained_by_id.items()}


def expected_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the adapter file, from the model's class on the meta device."""
    settings = plan.settings
    base = model_on_meta(settings.model_folder, trust_remote_code=settings.trust_remote_code)
    rows = token_rows(plan.shape, settings)
    with torch.device("meta"):
        if rows is not None:
            add_rows(base, rows)
        model = get_peft_model(base, lora_config(settings))
    assert isinstance(model, PeftModel)
    return {key: tuple(parameter.shape) for key, parameter in trainable(model).items()}


@torch.no_grad()
def frozen_checksum(model: nn.Module) -> int:
    """Sum of the bytes of this rank's frozen weights, with which a run detects their change."""
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            shard = getattr(parameter, "ds_tensor", parameter).detach().contiguous()
            total += int(shard.flatten().view(torch.uint8).sum(dtype=torch.int64))
    return total
