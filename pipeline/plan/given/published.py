"""Published models: sizes that ship with the package, to plan by name before any download.

published_models.json has the keys of each model's config.json that give its sizes, with source and
date. published_shapes.json has the sizes of models whose type is not in families.py, counted on the
model class; `python -m pipeline.cli.shapes` writes it.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.plan.given.families import FAMILIES, Config
from pipeline.plan.given.shape import ModelShape, shape_of

MODELS_FILE = Path(__file__).with_name("published_models.json")
SHAPES_FILE = Path(__file__).with_name("published_shapes.json")


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A model on the hub. `also`: other models with the same sizes.

    `billions`: published number of parameters. `billions_not_loaded`: parameters included in it
    that the text model's class does not have. `counted_as`: the `model_type` whose class is counted
    instead if transformers has no class for the model's own type.
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
        """Whether the sizes were counted on the model class (its type is not in families.py)."""
        return self.config["model_type"] not in FAMILIES

    def shape(self, name: str | None = None) -> ModelShape:
        """The shape of the model, under its own name or one of the names in `also`."""
        counted = _counted_shapes()[self.name] if self.needs_class else None
        source = f"{self.source}, {self.date}"
        return shape_of(self.config, name or self.name, counted=counted, source=source)


@cache
def published_models() -> tuple[PublishedModel, ...]:
    """All published models, in the order of the file."""
    entries = read_json(MODELS_FILE)["models"]
    return tuple(PublishedModel(**{**entry, "also": tuple(entry["also"])}) for entry in entries)


def published_shape(name: str) -> ModelShape:
    """The shape of a model by its name on the hub. Raises UserError for an unknown name."""
    by_name = {each: model for model in published_models() for each in (model.name, *model.also)}
    if name in by_name:
        return by_name[name].shape(name)
    raise UserError(
        f"model: {name} is not a folder, nor a hub model in the local cache, nor a model whose "
        f"sizes ship with this package{_near(name, list(by_name))}; bring one with `hf download "
        "NAME`, or `hf download NAME --local-dir FOLDER` and give that folder (config.json alone "
        "is enough for a plan); `launch/plan.py --fits` lists the models that ship"
    )


def _near(name: str, known: list[str]) -> str:
    """A hint with known names similar to this one, compared with and without the owner."""
    keys: dict[str, str] = {}
    for each in known:
        keys.setdefault(each.casefold(), each)
        keys.setdefault(each.casefold().rpartition("/")[2], each)
    close = difflib.get_close_matches(name.casefold(), keys, n=3)
    close += difflib.get_close_matches(name.casefold().rpartition("/")[2], keys, n=3)
    names = list(dict.fromkeys(keys[key] for key in close))[:3]
    return f" (did you mean {', '.join(names)}?)" if names else ""


@cache
def _counted_shapes() -> Mapping[str, Any]:
    shapes: Mapping[str, Any] = read_json(SHAPES_FILE)["shapes"]
    return shapes
