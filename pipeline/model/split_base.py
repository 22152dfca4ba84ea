"""PiSSA and OLoRA: the product of A and B starts as a part of the base, not as 0.

This part is subtracted from the base, so that training starts at the outputs of the unchanged base.
peft computes the initial matrices A0 and B0 of each layer, once, on rank 0. Checkpoints contain
them, so that a resumed run subtracts the same products. The published adapter is B A - B0 A0, which
is a LoRA of twice the r, and belongs to the unchanged base. All these products include the scaling
of the layer.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from torch import nn

from pipeline.cluster.progress import show_progress
from pipeline.cluster.session import Session
from pipeline.plan.given.adapter_counts import AdaptedLayer, adapted_layers
from pipeline.plan.plan import Plan

Tensors = dict[str, torch.Tensor]  # by key in the adapter file


@torch.no_grad()
def split_base(
    model: PeftModel, plan: Plan, session: Session, stored: Mapping[str, torch.Tensor] | None
) -> Tensors:
    """Set A and B of each layer to A0 and B0, and subtract scaling * B0 A0 from the base.

    `stored`: A0 and B0 of a checkpoint, on every rank; None to compute them. Returns A0 and
    B0 on rank 0, in fp32 on the CPU, by their keys in the adapter file, and an empty dict on other
    ranks. All ranks must call this function.
    """
    initial: Tensors = {}
    layers = adapted_layers(plan.shape, plan.settings)
    torch.manual_seed(plan.settings.seed)
    with show_progress("initial matrices", total=len(layers)) as work:
        for layer in layers:
            module: Any = model.get_submodule(f"base_model.model.{layer.name}")
            a, b = (matrix["default"].weight for matrix in (module.lora_A, module.lora_B))
            prefix = f"base_model.model.{layer.name}"
            keys = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
            with _whole(module.get_base_layer().weight) as weight:
                if stored is not None:
                    a.copy_(stored[keys[0]])
                    b.copy_(stored[keys[1]])
                else:
                    _set_matrices((a, b), weight, layer, plan.settings.init_lora_weights, session)
                product = layer.scaling * (b.float() @ a.float())
                weight.copy_((weight.float() - product).to(weight.dtype))
            if session.is_rank_zero:
                for key, matrix in zip(keys, (a, b), strict=True):
                    initial[key] = matrix.detach().to("cpu", torch.float32, copy=True)
            work.advance(1)
    return initial


@contextmanager
def _whole(parameter: Any) -> Iterator[torch.Tensor]:
    """The whole weight of a parameter, to be changed in place; then ZeRO-3 shards it again."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            yield parameter.data
        return
    parameter.data = parameter.data.clone()  # a loaded tensor may be a read-only memory map
    yield parameter.data


def _set_matrices(
    matrices: tuple[torch.Tensor, torch.Tensor],
    weight: torch.Tensor,
    layer: AdaptedLayer,
    init_lora_weights: Any,
    session: Session,
) -> None:
    """Compute A0 and B0 of a layer on rank 0, and copy them into `matrices` on every rank."""
    # in fp32; ranks other than 0 have zeros
    full = [torch.zeros_like(matrix, dtype=torch.float32) for matrix in matrices]
    if session.is_rank_zero:
        base = nn.Linear(layer.linear.d_in, layer.linear.d_out, bias=False, device="meta")
        base.weight = nn.Parameter(weight.clone(), requires_grad=False)
        config = LoraConfig(init_lora_weights=init_lora_weights)
        # peft divides lora_alpha by r, so that its scaling is `layer.scaling`.
        alpha: Any = layer.scaling * layer.r
        computed: Any = Linear(base, "default", r=layer.r, lora_alpha=alpha, config=config)
        a, b = computed.lora_A["default"], computed.lora_B["default"]
        full = [a.weight.data.float(), b.weight.data.float()]
    for matrix, values in zip(matrices, full, strict=True):
        session.all_reduce_sum(values)  # the sum is the value of rank 0
        matrix.copy_(values)
