"""Traits: facts about a setting for use by other packages, stored on the setting's Field."""

from typing import Literal

from pydantic.config import JsonDict

# Effect of a changed value when the run in `output_dir` is started again.
Change = Literal[
    "result",  # changes the trained adapter: the run is not resumed
    "selection",  # "result" if the held-out loss selects the adapter or ends the run, else "run"
    "run",  # changes only how the run is executed, monitored or saved: it is resumed
    "base",  # another base model, detected by its fingerprint; accept_changes: [base] allows it
    "files",  # other data, detected by its content; accept_changes: [data] allows it
    "documents",  # other documents from the same data; accept_changes: [data] allows it
    "total_steps",  # another end of the learning rate schedule; accept_changes: [total_steps]
]


def traits(
    *,
    change: Change = "result",
    layout: str = "",
    deepspeed: str = "",
    peers: str = "",
    is_path: bool = False,
) -> JsonDict:
    """The `json_schema_extra` of a setting's Field.

    `layout`: field of the plan's Layout that the setting fixes. `deepspeed`: DeepSpeed config key
    with the same meaning, in dotted form. `peers`: names of the setting in other training
    programs, separated by spaces; an unknown key with such a name gets a hint. `is_path`: the
    value may be a path, in which `~` and `$NAME` are expanded.
    """
    return {
        "change": change,
        "layout": layout,
        "deepspeed": deepspeed,
        "peers": [*peers.split()],
        "is_path": is_path,
    }
