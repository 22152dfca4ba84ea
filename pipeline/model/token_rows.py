"""Rows of new tokens in the embeddings and the head of a base, before an adapter is attached.

peft trains copies of these rows (`trainable_token_indices`), which start with the values set here.
The files of the base are not changed.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.plan.given.new_tokens import TokenRows, token_rows
from pipeline.plan.plan import Plan

_NOISE = 0.1  # standard deviation of the noise, relative to that of the base's rows


@torch.no_grad()
def set_token_rows(model: PreTrainedModel, plan: Plan) -> None:
    """Add rows for new tokens to a base, in place, and set the rows of all new tokens.

    At ZeRO-3 embeddings and head are whole on each rank afterwards, because peft reads their rows.
    DeepSpeed shards them later together with the adapter. All ranks must call this function.
    """
    rows = token_rows(plan.shape, plan.settings)
    if rows is None:
        return
    _gather([model.get_submodule(name) for name in rows.modules], model)
    num_rows = plan.shape.vocab_size - plan.shape.added_rows
    _require_known_layers(model, rows, num_rows)
    add_rows(model, rows)
    generator = torch.Generator().manual_seed(plan.settings.seed)
    for name in rows.modules:
        weight: Any = model.get_submodule(name).weight
        if not plan.shape.added_rows:
            weight.data = weight.data.clone()  # a loaded tensor may be a read-only memory map
        trained = weight[:num_rows]
        mean = trained.mean(0, dtype=torch.float32)
        # without an fp32 copy of the rows
        mean_square = torch.linalg.vector_norm(trained, dim=0, dtype=torch.float32) ** 2 / num_rows
        deviation = (mean_square - mean**2).clamp(min=0).sqrt()
        noise = torch.randn(len(rows.ids), weight.shape[1], generator=generator).to(mean.device)
        weight[rows.indices] = (mean + _NOISE * deviation * noise).to(weight.dtype)


def add_rows(model: PreTrainedModel, rows: TokenRows) -> None:
    """Enlarge embeddings and head if necessary; the added rows have no defined values."""
    embeddings: Any = model.get_input_embeddings()
    if rows.vocab_size > embeddings.weight.shape[0]:
        model.resize_token_embeddings(rows.vocab_size, mean_resizing=False)


def _gather(modules: list[nn.Module], model: nn.Module) -> None:
    """Replace sharded weights of modules by whole ones, in all modules that share them."""
    from deepspeed.runtime.zero import GatheredParameters

    for module in modules:
        sharded: Any = module.weight
        if not hasattr(sharded, "ds_id"):
            continue
        with GatheredParameters([sharded]):
            whole = nn.Parameter(sharded.data.clone(), requires_grad=False)
        for each in model.modules():
            if each._parameters.get("weight") is sharded:
                each.register_parameter("weight", whole)


def _require_known_layers(model: nn.Module, rows: TokenRows, num_rows: int) -> None:
    """Raise UserError if peft or transformers would compute wrongly with trained rows.

    `num_rows`: rows of the embeddings in the model's files.
    """
    problem = ""
    for name in rows.modules:
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            # peft calls F.embedding instead of the layer's forward method. It knows `embed_scale`.
            is_known = type(module) is nn.Embedding or hasattr(module, "embed_scale")
        else:
            is_known = type(module) is nn.Linear
        if not is_known:
            problem = f"{name} is a {type(module).__name__}, which computes more than peft does"
    whole = {id(model.get_submodule(name).weight) for name in rows.modules}
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) == 2 and shape[0] == num_rows and id(parameter) not in whole:
            problem = f"{name} also has a row for each token, but would get none for new tokens"
    if problem:
        raise UserError(
            f"new_tokens: not possible with this model: {problem}; leave new_tokens out"
        )
