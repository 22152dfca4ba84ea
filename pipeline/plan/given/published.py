"""Published models: their sizes ship with this package, so that planning needs no download.

published_models.json has, for each model, the keys of config.json that determine its sizes, with
source and date. published_shapes.json has the sizes of models whose type is not in families.py,
derived from the model's class; `python -m pipeline.cli.shapes` writes this file.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.commands import command
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.plan.given.families import FAMILIES, Config
from pipeline.plan.given.shape import ModelShape, shape_of

MODELS_FILE = Path(__file__).with_name("published_models.json")
SHAPES_FILE = Path(__file__).with_name("published_shapes.json")


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A model on the hub.

    `billions`: published number of parameters. `source`: where the sizes were published. `date`:
    when they were read there. `config`: the keys of config.json that determine the sizes. `also`:
    names of other models with the same sizes. `billions_not_loaded`: the part of `billions` that
    the class of the text model does not have. `counted_as`: if transformers has no class for this
    model's type, the `model_type` whose class is counted instead.
    """

    name: str
    billions: float
    source: str
    date: str
    config: Config
    also: tuple[str, ...] = ()
    billions_not_loaded: float = 0.0
    counted_as: str | None = None

    @property
    def needs_class(self) -> bool:
        """Whether families.py lacks the model's type, so that its class was counted."""
        return self.config["model_type"] not in FAMILIES

    @property
    def refusal(self) -> str:
        """Why the model's class cannot be trained; empty if it can."""
        return _shapes_by_name()[self.name].get("refused", "") if self.needs_class else ""

    def shape(self, name: str | None = None) -> ModelShape:
        """The shape of the model, under its own name or one of the names in `also`.

        Raises UserError if the model's class cannot be trained.
        """
        if self.refusal:
            raise UserError(
                f"model: the class of {name or self.name} cannot be trained: {self.refusal}"
            )
        class_sizes = _shapes_by_name()[self.name] if self.needs_class else None
        source = f"{self.source}, {self.date}"
        return shape_of(self.config, name or self.name, class_sizes=class_sizes, source=source)


@cache
def published_models() -> tuple[PublishedModel, ...]:
    """All published models, in the order of the file."""
    entries = read_json(MODELS_FILE)["models"]
    return tuple(PublishedModel(**{**entry, "also": tuple(entry["also"])}) for entry in entries)


def published_shape(name: str) -> ModelShape:
    """The shape of a model by its name on the hub. Raises UserError for an unknown name."""
    by_name: dict[str, PublishedModel] = {}
    for model in published_models():
        by_name |= dict.fromkeys((model.name, *model.also), model)
    if name in by_name:
        return by_name[name].shape(name)
    raise UserError(
        f"model: {name} is neither a folder, nor a hub model in the local cache, nor a model whose "
        f"sizes ship with this package{_similar_names(name, list(by_name))}; download it with "
        "`hf download NAME`, or with `hf download NAME --local-dir FOLDER` and set model to FOLDER "
        f"(for a plan, config.json is enough); `{command('plan')} --fits` lists the models whose "
        "sizes ship with this package"
    )


def _similar_names(name: str, known: list[str]) -> str:
    """A hint with up to three similar names; owners (`OWNER/MODEL`) may differ."""
    known_by_key: dict[str, str] = {}  # name in lower case, with and without owner -> known name
    for known_name in known:
        known_by_key.setdefault(known_name.casefold(), known_name)
        known_by_key.setdefault(known_name.casefold().rpartition("/")[2], known_name)
    close = difflib.get_close_matches(name.casefold(), known_by_key, n=3)
    close += difflib.get_close_matches(name.casefold().rpartition("/")[2], known_by_key, n=3)
    names = list(dict.fromkeys(known_by_key[key] for key in close))[:3]
    return f" (did you mean {', '.join(names)}?)" if names else ""


@cache
def _shapes_by_name() -> Mapping[str, Any]:
    """Name of a published model -> its sizes as class_shape.py derived them."""
    shapes: Mapping[str, Any] = read_json(SHAPES_FILE)["shapes"]
    return shapes
