"""Types and validators of `train_data`, `eval_data`, `columns` and the chat template's settings.

A validator gets the value from the run file and returns it, or raises ValueError.
"""

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Positive = Annotated[int, Field(ge=1, le=10**9)]
ProperFraction = Annotated[float, Field(gt=0, lt=1)]
# Largest batch size in sequences, and largest number of epochs. With larger values, the list of all
# sequences of a step or an epoch does not fit in memory.
MAX_SEQUENCES, MAX_EPOCHS = 10**6, 10**6
DataFormat = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text", "pre-tokenised"]

# Columns of all formats; the setting `columns` may map each to another name in the data.
COLUMNS = (
    "messages", "conversations", "tools", "functions", "system", "instruction", "input", "output",
    "prompt", "completion", "text", "input_ids", "labels", "attention_mask", "position_ids",
)  # fmt: skip

_DETECTED = "remove it; the format of each row is detected"
_SPLIT = "name the split in the path: ORG/NAME:train"
# Key of a data source in other training programs -> advice for a run file.
_SOURCE_KEY_ADVICE = {
    "type": _DETECTED, "ds_type": _DETECTED, "format": _DETECTED, "formatting": _DETECTED,
    "conversation": _DETECTED, "roles": _DETECTED, "chat_template": "set it for the whole run",
    "split": _SPLIT, "train_on_split": _SPLIT, "name": "give the configuration's files as path",
    "subset": "give the configuration's files as path", "data_files": "give the files as path",
    "revision": "name it in the path: ORG/NAME@REVISION:train",
    "shards": "limit: N reads the first N rows", "num_samples": "limit: N reads the first N rows",
    "field_messages": "set columns: {messages: NAME} for the whole run",
    "message_property_mappings": _DETECTED, "columns": "set it for the whole run",
    "dataset_path": "here it is path", "dataset": "here it is path",
}  # fmt: skip


class DataSource(BaseModel):
    """One source of rows: a file, folder, glob or hub split.

    `weight`: how often each row is used per epoch; fractions are allowed. `limit`: only this many
    rows from the start are read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    path: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(gt=0, le=MAX_EPOCHS)] = 1.0
    limit: Positive | None = None


DataNames = str | DataSource | list[str | DataSource]


def parse_train_data(value: Any) -> Any:
    """Validate `train_data`; mappings become DataSource objects. Raises ValueError."""
    return _parse_sources(value, "expected a file, a folder, a glob, org/name:split, or a list")


def parse_eval_data(value: Any) -> Any:
    """Validate `eval_data`: names, a share, or a number of rows. Raises ValueError."""
    is_percentage = isinstance(value, str) and re.fullmatch(r"[\d.]+ *%", value)
    if is_percentage or (isinstance(value, float) and not 0 < value < 1):
        raise ValueError("a share is a number above 0 and below 1, such as 0.05")
    if type(value) is int and value < 1:
        raise ValueError("a number of rows is at least 1; a share is written as 0.05")
    if value is None or type(value) is int or isinstance(value, float):
        return value
    return _parse_sources(value, "expected names as in train_data, a share (0.05) or rows (200)")


def check_columns(value: dict[str, str]) -> dict[str, str]:
    """Validate `columns`. Raises ValueError for an unknown column or a name used twice."""
    if unknown := [name for name in value if name not in COLUMNS]:
        raise ValueError(f"no format has a column {unknown[0]}; columns: {', '.join(COLUMNS)}")
    if duplicates := [name for name in value.values() if [*value.values()].count(name) > 1]:
        raise ValueError(f"{duplicates[0]} is given for two columns")
    return value


def sources(names: DataNames | None) -> list[DataSource]:
    """Convert the value of a data setting to a list of DataSource objects."""
    if names is None:
        return []
    items = names if isinstance(names, list) else [names]
    return [DataSource(path=item) if isinstance(item, str) else item for item in items]


def _parse_sources(value: Any, expected: str) -> Any:
    """Convert mappings to DataSource objects. Raises ValueError with a message of one line.

    `expected`: the message for a value that is neither text nor a mapping nor a list.
    """
    if value == []:
        raise ValueError(f"the list is empty; {expected}")
    if isinstance(value, list):
        message = "expected a list of names or {path, weight, limit}"
        return [_parse_source(item, message) for item in value]
    return _parse_source(value, expected)


def _parse_source(value: Any, expected: str) -> str | DataSource:
    """One item of a data setting as a name or DataSource. Raises ValueError for other values."""
    if isinstance(value, str | DataSource) and value != "":
        return value
    if not isinstance(value, dict):
        raise ValueError(expected)
    known = list(DataSource.model_fields)
    unknown = [str(key) for key in value if key not in known]
    advice = [f"{key} ({_SOURCE_KEY_ADVICE[key]})" for key in unknown if key in _SOURCE_KEY_ADVICE]
    if advice:
        raise ValueError(f"unknown keys of a source: {', '.join(advice)}")
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"a source has {', '.join(known)}"
        raise ValueError(f"{unknown[0]}: unknown key of a source; {hint}")
    try:
        return DataSource.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        reason = problem["msg"].replace("Input should be", "must be")
        raise ValueError(f"{problem['loc'][0]} of a source: {reason}") from None


def check_chat_template(value: str) -> str:
    """Validate `chat_template`. Raises ValueError if it names no template."""
    if value in ("model", "chatml") or value.endswith((".jinja", ".jinja2", ".j2")):
        return value
    raise ValueError(f"no template is named {value}; give model, chatml or a file (FILE.jinja)")


def check_template_kwargs(value: dict[str, Any]) -> dict[str, Any]:
    """Validate `chat_template_kwargs`. Raises ValueError for variables that depend on the row."""
    set_per_row = {"messages", "tools", "documents", "add_generation_prompt"}
    if wrong := sorted(set_per_row & value.keys()):
        raise ValueError(f"{wrong[0]} comes from each row and cannot be set here; remove it")
    return value
