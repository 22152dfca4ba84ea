"""Traits: facts about a setting for use by other packages, stored on the setting's pydantic Field.

Example: lr: float = Field(..., json_schema_extra=traits(peers="learning_rate")).
"""

from typing import Literal, TypedDict, Unpack

from pydantic.config import JsonDict

# Effect of a changed value when the run in `output_dir` is started again.
Change = Literal[
    # The value affects the trained adapter. The run is not resumed.
    "result",
    # The value affects how the run is executed, monitored or saved. The run is resumed.
    "run",
    # Like "result" if the held-out loss selects the adapter or ends the run, else like "run".
    "selection",
    # The run is resumed if the base model has the same fingerprint. `accept_changes: [base]` allows
    # another base model.
    "base",
    # The run is resumed if the data has the same content. `accept_changes: [data]` allows other
    # data.
    "files",
    # Other documents are built from the same data. The run is resumed only with
    # `accept_changes: [data]`.
    "documents",
    # The schedule of the learning rate may have another length. The run is then resumed only with
    # `accept_changes: [total_steps]`.
    "total_steps",
]


class Traits(TypedDict, total=False):
    """Facts about a setting; the defaults are "result" for `change`, and empty for the others.

    `layout`: field of the plan's Layout that the setting fixes. `deepspeed`: key of a DeepSpeed
    config with the same meaning, e.g. "optimizer.params.lr". `peers`: names of the setting in other
    training programs, separated by spaces; a run file with such a name gets a message with the name
    used here. `replaces`: name of another setting whose default or preset value does not apply if
    this setting is set, e.g. "epochs" for `max_steps`. `needs`: conditions, separated by spaces,
    without which the setting has no effect: `KEY` (that setting has a value), `KEY=A|B` (it has one
    of these values), and their opposites `!KEY` and `KEY!=A|B`. `is_path`: whether the value may be
    a path, in which `~` and `$NAME` are expanded.
    """

    change: Change
    layout: str
    deepspeed: str
    peers: str
    replaces: str
    needs: str
    is_path: bool


def traits(**given: Unpack[Traits]) -> JsonDict:
    """The `json_schema_extra` of a setting's Field."""
    return {
        "change": given.get("change", "result"),
        "layout": given.get("layout", ""),
        "deepspeed": given.get("deepspeed", ""),
        "peers": [*given.get("peers", "").split()],
        "replaces": given.get("replaces", ""),
        "needs": [*given.get("needs", "").split()],
        "is_path": given.get("is_path", False),
    }
