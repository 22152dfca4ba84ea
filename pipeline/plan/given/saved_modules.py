"""Modules that are trained in full (`modules_to_save`): the embeddings and the head of a model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.given.shape import ModelShape, is_or_ends_with


@dataclass(frozen=True, kw_only=True)
class SavedModule:
    """A module that is trained in full.

    `is_head`: whether it computes the logits. `shapes`: name of each parameter in the module -> its
    shape. `tied_name`: for embeddings, name of the head that has the same weight; empty if there is
    none.
    """

    name: str
    is_head: bool
    shapes: Mapping[str, tuple[int, ...]]
    tied_name: str = ""

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def saved_modules(shape: ModelShape, settings: RunSettings) -> tuple[SavedModule, ...]:
    """The modules of `modules_to_save`. Raises UserError for a name of any other module.

    If embeddings and head share their weight, naming one of them trains both.
    """
    known = [name for name in (shape.embeddings_name, shape.head_name) if name]
    names = set()
    for entry in settings.modules_to_save:
        matches = [name for name in known if is_or_ends_with(name, entry)]
        if not entry or not matches:
            trainable = f"this model has {' and '.join(known)}" if known else "this model has none"
            raise UserError(
                f"modules_to_save: {entry!r}: only embeddings and head of the width of the blocks "
                f"can be trained in full, and {trainable}; linear layers of the blocks can get an "
                "adapter: lora_target_modules"
            )
        names.update(matches)
    matrix: dict[str, tuple[int, ...]] = {"weight": (shape.vocab_size, shape.hidden_size)}
    if shape.is_tied:
        tied = SavedModule(
            name=shape.embeddings_name, is_head=True, shapes=matrix, tied_name=shape.head_name
        )
        return (tied,) if names else ()
    bias: dict[str, tuple[int, ...]] = {"bias": (shape.vocab_size,)} if shape.has_head_bias else {}
    modules = (
        SavedModule(name=shape.embeddings_name, is_head=False, shapes=matrix),
        SavedModule(name=shape.head_name, is_head=True, shapes=matrix | bias),
    )
    return tuple(module for module in modules if module.name in names)


def saved_parameters(shape: ModelShape, settings: RunSettings) -> int:
    """Number of parameters of the modules that are trained in full."""
    return sum(module.parameters for module in saved_modules(shape, settings))


def trained_head(shape: ModelShape, settings: RunSettings) -> SavedModule | None:
    """The module of `modules_to_save` that computes the logits; None if the head is frozen."""
    return next((module for module in saved_modules(shape, settings) if module.is_head), None)


def has_head_gradient(shape: ModelShape, settings: RunSettings) -> bool:
    """Whether the weight of the head, or some of its rows, get a gradient."""
    return trained_head(shape, settings) is not None or bool(settings.new_tokens)
