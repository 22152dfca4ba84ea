"""LoftQ: the initial A and B correct the error of 4-bit quantisation in each weight.

Their product is the best approximation of the error with LoRA's r. The files of the base have the
weights before quantisation. They are read one by one on rank 0. The base in memory does not change,
so the adapter belongs to the quantised base.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.utils.loftq_utils import _low_rank_decomposition
from transformers.pytorch_utils import Conv1D

from pipeline.cluster.progress import show_progress
from pipeline.cluster.session import Session
from pipeline.model.base import DTYPES, Quantisation
from pipeline.model.streamed import StreamedWeights, streamed_model
from pipeline.plan.given.adapter_counts import AdaptedLayer, adapted_layers
from pipeline.plan.plan import Plan


@torch.no_grad()
def correct_quantisation(model: PeftModel, plan: Plan, session: Session) -> None:
    """Set A and B of each quantised layer such that their product corrects its weight. Collective.

    It must be called before DeepSpeed shards the trained weights. Layers that are not quantised
    keep their initial values.
    """
    layers = [x for x in adapted_layers(plan.shape, plan.settings) if x.linear.is_quantised]
    errors = _QuantisationErrors(plan, session.device) if session.is_rank_zero else None
    with show_progress("corrections of the 4-bit weights", total=len(layers)) as work:
        for layer in layers:
            module: Any = model.get_submodule(f"base_model.model.{layer.name}")
            a, b = (matrix["default"].weight for matrix in (module.lora_A, module.lora_B))
            values = [torch.zeros_like(matrix, dtype=torch.float32) for matrix in (a, b)]
            if errors is not None:
                values = low_rank_factors(errors.of(layer.name), layer)
            for matrix, value in zip((a, b), values, strict=True):
                session.all_reduce_sum(value)  # zero on the other ranks
                matrix.copy_(value)
            work.advance(1)


def low_rank_factors(error: torch.Tensor, layer: AdaptedLayer) -> list[torch.Tensor]:
    """A and B whose product, times the scaling of the layer, is nearest to the error.

    peft's `replace_lora_weights_loftq` (0.21.2 utils/loftq_utils.py) computes the same, but leaves
    out the scaling: with `lora_alpha` = 2 r its product is twice the error. It also runs only on
    CUDA, and needs the whole quantised weights on each rank.
    """
    # peft's names: the error is nearly L R, so R is A and L is B. The scaling is divided equally.
    factors = _low_rank_decomposition(error, reduced_rank=layer.r)  # type: ignore[no-untyped-call]
    scale = layer.scaling**-0.5
    return [(scale * factors[name]).contiguous() for name in ("R", "L")]


class _QuantisationErrors:
    """The difference between each weight in the base's files and its value in training, in fp32."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        settings = plan.settings
        self._model = streamed_model(
            settings.model_folder, trust_remote_code=settings.trust_remote_code
        )
        self._weights = StreamedWeights(
            settings.model_folder, self._model, on_read=lambda num_bytes: None, transform=None
        )
        self._quantisation = Quantisation(
            settings=settings, shape=plan.shape, dtype=DTYPES[plan.training_dtype]
        )
        self._device = device

    def of(self, layer: str) -> torch.Tensor:
        """The error of a linear layer's weight, (d_out, d_in), on the device."""
        weight = self._weights.parameter(f"{layer}.weight").to(self._device)
        if isinstance(self._model.get_submodule(layer), Conv1D):
            weight = weight.T.contiguous()
        in_training = weight.clone()
        self._quantisation.round_trip(in_training)
        return weight.sub_(in_training)
