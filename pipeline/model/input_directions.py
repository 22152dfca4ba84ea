"""EVA: the rows of each A start as the principal directions of the inputs of its layer.

The inputs are those of the base at supervised tokens of training data. B starts at zero, so the
base does not change. Rank 0 computes the directions with peft's incremental PCA. peft's own
function (0.21.2 tuners/lora/eva.py) repeats the data until all directions have converged, and moves
r between layers. Here the number of sequences is limited, and each layer keeps its r.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from peft import EvaConfig, PeftModel
from peft.tuners.lora.eva import SVDHook
from torch import nn

from pipeline.cluster.progress import show_progress
from pipeline.cluster.session import Session
from pipeline.errors import UserError
from pipeline.model.loss import IGNORED, SummedLoss
from pipeline.model.structure import blocks
from pipeline.plan.cost.decompositions import EVA_ROWS, EVA_SEQUENCES, EVA_TOKENS
from pipeline.plan.given.adapter_counts import adapted_layers, input_of
from pipeline.plan.plan import Plan


@torch.no_grad()
def set_input_directions(
    model: PeftModel, plan: Plan, session: Session, sequences: Iterable[Any]
) -> None:
    """Set each A to the principal directions of its layer's inputs. Collective.

    It must be called before DeepSpeed shards the trained weights. `sequences`: training sequences,
    each as a batch. Every rank runs all of them, because at ZeRO-3 each has a shard of the base.
    """
    inputs = _record_inputs(model, plan, session, sequences)
    # Rank 0 may have too few tokens; then all ranks raise its error.
    session.rank_zero_first(lambda: _require_directions(inputs.values()))
    for layer in adapted_layers(plan.shape, plan.settings):
        module: Any = model.get_submodule(f"base_model.model.{layer.name}")
        a = module.lora_A["default"].weight
        values = torch.zeros_like(a, dtype=torch.float32)
        if session.is_rank_zero:
            values.copy_(inputs[input_of(layer.name)].directions[: layer.r])
        session.all_reduce_sum(values)  # the sum is the value of rank 0
        a.copy_(values)


def _record_inputs(
    model: PeftModel, plan: Plan, session: Session, sequences: Iterable[Any]
) -> "dict[str, LayerInput]":
    """Run the base over sequences; returns the inputs by name, which are empty on other ranks.

    It stops as soon as the directions of all inputs on rank 0 have converged.
    """
    summed_loss, device = SummedLoss(model), session.device
    with (
        _recorded_inputs(model, plan, is_recording=session.is_rank_zero) as inputs,
        _gathered_modules(model),
        show_progress("principal directions of inputs", total=EVA_SEQUENCES) as work,
    ):
        for batch in islice(sequences, EVA_SEQUENCES):
            is_supervised = (batch.labels != IGNORED).flatten().to(device)
            for each in inputs.values():
                each.is_supervised = is_supervised
            summed_loss(batch.input_ids.to(device), batch.labels.to(device), batch.documents)
            work.advance(1)
            num_converged = sum(each.has_converged for each in inputs.values())
            if session.sum_over_ranks([num_converged])[0] == len(inputs):
                break
        for each in inputs.values():
            each.add_rows()
    return inputs


def _require_directions(inputs: "Iterable[LayerInput]") -> None:
    """Raise UserError if there were too few tokens for the directions of an input."""
    for each in inputs:
        if each.is_empty:
            raise UserError(
                f"init_lora_weights: eva needs the inputs of {each.layer} at {2 * each.r} "
                "supervised tokens, and the training data has fewer; set init_lora_weights: true, "
                "or a lower lora_r"
            )


@contextmanager
def _gathered_modules(model: PeftModel) -> Iterator[None]:
    """In the body, a base that ZeRO-3 has sharded can run: each module is gathered when it runs.

    These modules are the blocks, and the embeddings, final norm and head outside them. Parameters
    of modules that contain blocks, which are small, are gathered for the whole body.
    """
    causal: Any = model.get_base_model()
    if not any(hasattr(p, "ds_id") for p in causal.parameters()):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    gathers, handles = [], []
    modules = list(_modules_to_gather(causal, set(blocks(causal))))
    in_modules = {id(p) for module in modules for p in module.parameters()}
    others = [p for p in causal.parameters() if id(p) not in in_modules]
    for module in modules:

        def gather(module: nn.Module, arguments: Any) -> None:
            gathers.append(GatheredParameters([*module.parameters()]))
            gathers[-1].__enter__()

        def release(module: nn.Module, arguments: Any, output: Any) -> None:
            gathers.pop().__exit__(None, None, None)

        handles.append(module.register_forward_pre_hook(gather))
        handles.append(module.register_forward_hook(release))
    try:
        with GatheredParameters(others):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _modules_to_gather(module: nn.Module, all_blocks: set[nn.Module]) -> Iterator[nn.Module]:
    """The blocks inside a module, and the largest modules in it without blocks that are called.

    A container such as ModuleList has no forward method; its modules are called instead.
    """
    has_forward = type(module).forward is not nn.Module.forward
    if module in all_blocks or (has_forward and all_blocks.isdisjoint(module.modules())):
        yield module
        return
    for child in module.children():
        yield from _modules_to_gather(child, all_blocks)


@contextmanager
def _recorded_inputs(
    model: PeftModel, plan: Plan, *, is_recording: bool
) -> "Iterator[dict[str, LayerInput]]":
    """In the body, forward passes are without dropout and record the inputs of adapted layers."""
    inputs: dict[str, LayerInput] = {}  # by the name of the input, which several layers may have
    handles, was_training = [], model.training
    for layer in adapted_layers(plan.shape, plan.settings):
        if (name := input_of(layer.name)) not in inputs:
            module: Any = model.get_submodule(f"base_model.model.{layer.name}")
            inputs[name] = LayerInput(layer.name)
            base = module.get_base_layer()
            if is_recording:
                handles.append(base.register_forward_pre_hook(inputs[name].record))
        inputs[name].r = max(inputs[name].r, layer.r)
    model.eval()
    try:
        yield inputs
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


class LayerInput:
    """The input of a layer, and its principal directions so far.

    `layer`: name of the layer. `r`: number of directions. `is_supervised`: for each token of the
    present batch, whether its input counts.
    """

    def __init__(self, layer: str) -> None:
        self.r = 0
        self.is_supervised = torch.empty(0, dtype=torch.bool)
        self.layer = layer
        self._rows: list[torch.Tensor] = []  # inputs at tokens, which are not in the PCA yet
        self._pca: Any = None

    @property
    def has_converged(self) -> bool:
        """Whether the last inputs changed no direction by more than peft's limit."""
        return self._pca is not None and bool(self._pca.converged.all())

    @property
    def directions(self) -> torch.Tensor:
        """The directions (r, width)."""
        directions: torch.Tensor = self._pca.svd.components_
        return directions

    @property
    def is_empty(self) -> bool:
        """Whether there were too few tokens for a PCA."""
        return self._pca is None

    def record(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        """Hook of a layer: add its input at supervised tokens to the PCA.

        If the layer does not get the tokens of the batch, all rows of its input count.
        """
        rows = arguments[0].flatten(0, -2)
        if len(rows) == len(self.is_supervised):
            rows = rows[self.is_supervised]
        step = max(1, -(-len(rows) // EVA_TOKENS))  # at most EVA_TOKENS, evenly spaced
        self._rows.append(rows[::step].float())
        if sum(map(len, self._rows)) >= max(EVA_ROWS, 2 * self.r):
            self.add_rows()

    def add_rows(self) -> None:
        """Add the recorded rows to the PCA, unless they are fewer than it accepts."""
        if sum(map(len, self._rows)) < 2 * self.r:
            return
        if self._pca is None:
            self._pca = SVDHook(
                n_components=self.r,
                sim_thresh=EvaConfig().tau,
                name=self.layer,
                prepare_layer_inputs_fn=lambda inputs, model_input, name: inputs,
                gather_distributed_inputs=False,
            )
        self._pca(None, torch.cat(self._rows), None)
        self._rows.clear()
