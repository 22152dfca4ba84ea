"""Difference between a merged model and base plus adapter, on held-out rows, block by block."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pipeline.adapter.merge_plan import TrainedBase, WeightedAdapter
from pipeline.adapter.trained_on import WEIGHTS
from pipeline.cluster.progress import Work, show_progress
from pipeline.data.dataset.reader import DataIndex, open_split
from pipeline.data.order.batches import Batch, build_batch
from pipeline.errors import UserError
from pipeline.model.base import DTYPES, Quantisation
from pipeline.model.loss import IGNORED, SummedLoss, class_logits
from pipeline.model.streamed import StreamedWeights, Transform, streamed_model
from pipeline.plan.given.shape import read_shape

_SEQUENCES = 8  # of the held-out split
_NAME = "merged{}"  # peft's name of the attached adapter with this number
_LOGITS_BYTES = 2**28  # limit of one model's logits in fp32, and so of the compared positions


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """A merged model, and the base and adapters that it was merged from.

    `trained`: how the base was quantised in training; None if it was not.
    """

    folder: Path
    base: Path
    adapters: Sequence[WeightedAdapter]
    trained: TrainedBase | None
    trust_remote_code: bool = False


def compare_merged(run_folder: Path, merged: MergedModel) -> dict[str, Any]:
    """Differences of the merged model to base plus adapter, by the name of the base.

    If training quantised the base, there are two bases: the stored one and the quantised one.
    Raises UserError if the run has no held-out rows.
    """
    batch = _held_out_batch(run_folder)
    quantised = _round_trip(merged)
    bases: dict[str, Transform | None] = {"base": None}
    if merged.trained is not None:
        bits = "4-bit" if merged.trained.settings.load_in_4bit else "8-bit"
        bases = {"16-bit base": None, f"{bits} base": quantised}
    size = sum(path.stat().st_size for path in merged.base.glob("*.safetensors"))
    with (
        show_progress("comparing", size * (1 + len(bases)), in_bytes=True) as work,
        torch.no_grad(),
    ):
        logits = partial(_logits, batch, work, merged.trust_remote_code)
        ours = logits(merged.folder, (), None)
        theirs = {name: logits(merged.base, merged.adapters, each) for name, each in bases.items()}
    targets = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORED][: len(ours)]
    return {
        "positions": len(ours),
        "loss": float(F.cross_entropy(ours, targets)),
        **{
            f"to {name} + adapter": _difference(ours, each, targets)
            for name, each in theirs.items()
        },
    }


def _difference(
    ours: torch.Tensor, theirs: torch.Tensor, targets: torch.Tensor
) -> dict[str, float]:
    """Differences of logits (positions, vocabulary). `kl`: KL(theirs || ours) of a position."""
    difference = ours - theirs
    first, second = ours.log_softmax(-1), theirs.log_softmax(-1)
    return {
        "relative": float(difference.norm() / theirs.norm()),
        "mean_logit": float(difference.abs().mean()),
        "largest_logit": float(difference.abs().max()),
        "kl": float(F.kl_div(first, second, reduction="batchmean", log_target=True)),
        "loss": float(F.cross_entropy(theirs, targets)),
    }


def _held_out_batch(run_folder: Path) -> Batch:
    index = DataIndex.load(run_folder / "data").eval
    if index is None:
        raise UserError(f"--check: {run_folder} has no held-out rows (eval_data)")
    split = open_split(index)
    return build_batch(split, range(min(_SEQUENCES, index.sequences)))


def _round_trip(merged: MergedModel) -> Transform | None:
    """Transform of the layers that training quantised; None if it quantised none."""
    if merged.trained is None:
        return None
    settings = merged.trained.settings
    shape = read_shape(str(merged.base), trust_remote_code=merged.trust_remote_code)
    dtype = DTYPES[merged.trained.dtype]
    quantisation = Quantisation(settings=settings, shape=shape, dtype=dtype)
    model = streamed_model(merged.base, trust_remote_code=merged.trust_remote_code)
    layers = quantisation.layers(model)

    def transform(layer: str, module: nn.Module, weight: torch.Tensor) -> None:
        if layer not in layers or weight.dim() != 2:
            return
        stored = weight.T.contiguous() if isinstance(module, Conv1D) else weight
        quantisation.round_trip(stored)
        weight.copy_(stored.T if isinstance(module, Conv1D) else stored)

    return transform


class _Logits(SummedLoss):
    """Logits at the supervised positions, at most as many as fit into `_LOGITS_BYTES`."""

    def _loss_sum(self, causal: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        vocab_size = causal.config.get_text_config().vocab_size
        count = max(1, _LOGITS_BYTES // (4 * vocab_size))
        return class_logits(causal)(hidden[:count]).float()


def _logits(
    batch: Batch,
    work: Work,
    trust_remote_code: bool,
    folder: Path,
    *variant: Any,
) -> torch.Tensor:
    """Logits of a model folder; `variant`: adapters, and a transform of its weights."""
    adapters, transform = variant
    causal = streamed_model(folder, trust_remote_code=trust_remote_code)
    weights = StreamedWeights(folder, causal, work.advance, transform)
    model: Any = causal
    if adapters:
        model = _with_adapters(causal, adapters)
        weights.adapters = {
            _NAME.format(number): load_file(each.folder / WEIGHTS)
            for number, each in enumerate(adapters)
        }
    with weights.attached(model):
        logits: torch.Tensor = _Logits(model)(batch.input_ids, batch.labels, batch.documents)
    return logits


def _add_rows(causal: Any, indices: dict[str, list[int]] | list[int] | None) -> None:
    """Add rows for the new tokens of an adapter, without values."""
    lists = indices.values() if isinstance(indices, dict) else [indices or []]
    num_rows = max((index + 1 for each in lists for index in each), default=0)
    if num_rows > causal.get_input_embeddings().weight.shape[0]:
        causal.resize_token_embeddings(num_rows, mean_resizing=False)


def _with_adapters(causal: Any, adapters: Sequence[WeightedAdapter]) -> PeftModel:
    """The model with all adapters active, each with its weight, without values."""
    names = [_NAME.format(number) for number in range(len(adapters))]
    model: Any = None
    for name, adapter in zip(names, adapters, strict=True):
        config = LoraConfig.from_pretrained(str(adapter.folder), inference_mode=True)
        config.init_lora_weights = False
        _add_rows(causal, config.trainable_token_indices)
        if model is None:
            model = PeftModel(causal, config, name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, adapter in zip(names, adapters, strict=True):
                module.set_scale(name, adapter.weight)
    return model.eval()  # type: ignore[no-any-return]
