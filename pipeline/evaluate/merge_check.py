"""Compare the logits of a merged model with those of base and adapter, on held-out rows.

The weights are read block by block (model/streamed.py), so that large models fit into memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
from pipeline.cluster.progress import show_progress
from pipeline.data.dataset.reader import DataIndex, open_split
from pipeline.data.order.batches import Batch, build_batch
from pipeline.errors import UserError
from pipeline.model.base import DTYPES, Quantisation
from pipeline.model.loss import IGNORED, SummedLoss, class_logits
from pipeline.model.streamed import StreamedWeights, Transform, streamed_model
from pipeline.plan.given.shape import read_shape

_NUM_SEQUENCES = 8  # of the held-out split
_MAX_LOGITS_BYTES = 2**28  # of one model, in fp32; limits the number of compared positions


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """A merged model, and the base and adapters from which it was merged.

    `trained`: how the base was quantised in training; None if it was not quantised.
    """

    folder: Path
    base: Path
    adapters: Sequence[WeightedAdapter]
    trained: TrainedBase | None
    trust_remote_code: bool = False


def compare_merged(run_folder: Path, merged: MergedModel) -> dict[str, Any]:
    """Loss of the merged model, and the differences of its logits to those of base and adapter.

    If training quantised the base, the merged model is compared with two bases: the stored one and
    the quantised one. Raises UserError if the run has no held-out rows.
    """
    batch = _held_out_batch(run_folder)
    # Name of a base -> function that changes its stored weights; None: they are used as stored.
    bases: dict[str, Transform | None] = {"base": None}
    if merged.trained is not None:
        bits = "4-bit" if merged.trained.settings.load_in_4bit else "8-bit"
        bases = {"16-bit base": None, f"{bits} base": _quantise_and_dequantise(merged)}
    # One pass over the weights of each model. The merged model is about as large as its base.
    bytes_per_model = sum(path.stat().st_size for path in merged.base.glob("*.safetensors"))
    num_bytes = bytes_per_model * (1 + len(bases))
    with show_progress("comparing", num_bytes, in_bytes=True) as work, torch.no_grad():

        def logits_of(
            folder: Path, adapters: Sequence[WeightedAdapter], transform: Transform | None
        ) -> torch.Tensor:
            causal = streamed_model(folder, trust_remote_code=merged.trust_remote_code)
            weights = StreamedWeights(folder, causal, work.advance, transform)
            return _logits(batch, causal, weights, adapters)

        logits = logits_of(merged.folder, (), None)
        base_logits = {
            name: logits_of(merged.base, merged.adapters, transform)
            for name, transform in bases.items()
        }
    labels = batch.labels[:, 1:]  # of the next token at each position
    targets = labels[labels != IGNORED][: len(logits)]
    loss = float(F.cross_entropy(logits, targets))
    result: dict[str, object] = {"positions": len(logits), "loss": loss}
    for name, reference in base_logits.items():
        result[f"to {name} + adapter"] = _difference(logits, reference, targets)
    return result


def _difference(
    logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor
) -> dict[str, float]:
    """Differences of two sets of logits (positions, vocabulary); `loss` is that of the reference.

    `relative`: norm of the difference divided by the norm of the reference. `kl`: mean over the
    positions of KL(reference || logits).
    """
    difference = logits - reference
    log_p, reference_log_p = logits.log_softmax(-1), reference.log_softmax(-1)
    return {
        "relative": float(difference.norm() / reference.norm()),
        "mean_logit": float(difference.abs().mean()),
        "largest_logit": float(difference.abs().max()),
        "kl": float(F.kl_div(log_p, reference_log_p, reduction="batchmean", log_target=True)),
        "loss": float(F.cross_entropy(reference, targets)),
    }


def _held_out_batch(run_folder: Path) -> Batch:
    """The first sequences of the run's held-out split."""
    index = DataIndex.load(run_folder / "data").eval
    if index is None:
        raise UserError(f"--check: {run_folder} has no held-out rows (eval_data)")
    split = open_split(index)
    return build_batch(split, range(min(_NUM_SEQUENCES, index.sequences)))


def _quantise_and_dequantise(merged: MergedModel) -> Transform:
    """A function that quantises and dequantises a weight if training quantised its layer."""
    assert merged.trained is not None
    settings = merged.trained.settings
    shape = read_shape(str(merged.base), trust_remote_code=merged.trust_remote_code)
    dtype = DTYPES[merged.trained.dtype]
    quantisation = Quantisation(settings=settings, shape=shape, dtype=dtype)
    model = streamed_model(merged.base, trust_remote_code=merged.trust_remote_code)
    layers = quantisation.layers(model)

    def transform(layer: str, module: nn.Module, weight: torch.Tensor) -> None:
        if layer not in layers or weight.dim() != 2:
            return
        if isinstance(module, Conv1D):  # stores the transpose
            transposed = weight.T.contiguous()
            quantisation.round_trip(transposed)
            weight.copy_(transposed.T)
        else:
            quantisation.round_trip(weight)

    return transform


class _SupervisedLogits(SummedLoss):
    """Module that returns logits at the first supervised positions instead of a loss.

    Their number is limited by `_MAX_LOGITS_BYTES`. The base class computes the hidden states at all
    supervised positions, and returns the result of `_loss_sum`, which is replaced here.
    """

    def _loss_sum(self, causal: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        vocab_size = causal.config.get_text_config().vocab_size
        bytes_per_position = 4 * vocab_size  # in fp32
        num_positions = max(1, _MAX_LOGITS_BYTES // bytes_per_position)
        return class_logits(causal)(hidden[:num_positions]).float()


def _logits(
    batch: Batch, causal: Any, weights: StreamedWeights, adapters: Sequence[WeightedAdapter]
) -> torch.Tensor:
    """Logits of a model with adapters.

    `causal`: the model on the meta device. `weights`: reads its weights during the forward pass.
    """
    model: Any = causal
    if adapters:
        model = _with_adapters(causal, adapters)
        weights.adapters = {
            _adapter_name(i): load_file(adapter.folder / WEIGHTS)
            for i, adapter in enumerate(adapters)
        }
    with weights.attached(model):
        logits_at = _SupervisedLogits(model)
        logits: torch.Tensor = logits_at(batch.input_ids, batch.labels, batch.documents)
    return logits


def _adapter_name(index: int) -> str:
    """Name under which peft knows an adapter of the model."""
    return f"merged{index}"


def _add_embedding_rows(causal: Any, indices: dict[str, list[int]] | list[int] | None) -> None:
    """Add rows for the new tokens of an adapter to embeddings and head, on the meta device.

    `indices`: peft's `trainable_token_indices`: a list of token ids, or module name -> list.
    """
    lists = indices.values() if isinstance(indices, dict) else [indices or []]
    num_rows = max((max(token_ids, default=-1) + 1 for token_ids in lists), default=0)
    if num_rows > causal.get_input_embeddings().weight.shape[0]:
        causal.resize_token_embeddings(num_rows, mean_resizing=False)


def _with_adapters(causal: Any, adapters: Sequence[WeightedAdapter]) -> PeftModel:
    """The model with all adapters active, on the meta device.

    The weight that the user gave an adapter multiplies its LoRA scaling.
    """
    names = [_adapter_name(i) for i in range(len(adapters))]
    model: Any = None
    for name, adapter in zip(names, adapters, strict=True):
        config = LoraConfig.from_pretrained(str(adapter.folder), inference_mode=True)
        config.init_lora_weights = False
        _add_embedding_rows(causal, config.trainable_token_indices)
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
