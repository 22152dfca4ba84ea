"""Traits: facts about a setting for use by other packages, stored on the setting's Field."""

from typing import Literal, TypedDict, Unpack

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


class Traits(TypedDict, total=False):
    """Facts about a setting; a trait that is left out is empty, and `change` is then "result"."""

    change: Change
    layout: str  # field of the plan's Layout that the setting fixes
    deepspeed: str  # DeepSpeed config key with the same meaning, in dotted form
    peers: str  # its names in other programs, separated by spaces, for the message on such a key
    replaces: str  # setting whose default or preset value does not apply if this one is set
    needs: str  # conditions without which the setting has no effect, separated by spaces: `KEY` (it
    # has a value), `!KEY`, `KEY=A|B` (one of these values), `KEY!=A|B`
    is_path: bool  # the value may be a path, in which `~` and `$NAME` are expanded


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
