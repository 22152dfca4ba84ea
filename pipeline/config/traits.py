"""Traits: facts about a setting that other rooms need; each stands on its Field in settings.py."""

from typing import Literal

from pydantic.config import JsonDict

# What a changed value means for a run that is already in `output_dir`.
Change = Literal[
    "result",  # another adapter would come out: the run is not resumed
    "selection",  # as "result" where the held-out loss selects the adapter or the end; else "run"
    "run",  # only how it is run, watched or saved
    "base",  # another base model, identified by its fingerprint; accept_changes: [base]
    "files",  # other data, identified by its content; accept_changes: [data]
    "documents",  # other documents of the same data, in its key; accept_changes: [data]
    "total_steps",  # another length of the learning rate schedule; accept_changes: [total_steps]
]


def traits(
    *,
    change: Change = "result",
    layout: str = "",
    deepspeed: str = "",
    peers: str = "",
    is_path: bool = False,
) -> JsonDict:
    """`json_schema_extra` of a setting's Field.

    `layout`: the field of the plan's Layout that the setting fixes. `deepspeed`: the key of a
    DeepSpeed JSON with the same meaning, its blocks joined by dots. `peers`: names of the setting
    in other training programs, divided by spaces, for the message about an unknown key.
    `is_path`: the text may be a path, in which `~` and `$NAME` are expanded.
    """
    return {
        "change": change,
        "layout": layout,
        "deepspeed": deepspeed,
        "peers": [*peers.split()],
        "is_path": is_path,
    }
