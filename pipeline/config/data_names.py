"""Types and validators of `train_data`, `eval_data`, `columns` and the chat template's settings."""

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Positive = Annotated[int, Field(ge=1, le=10**9)]
# With more, the lists of the sequences of a step or an epoch do not fit in memory.
MAX_SEQUENCES, MAX_PASSES = 10**6, 10**6
DataFormat = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text", "pre-tokenised"]

# Columns of the formats; the setting `columns` may map each to another name in the data.
COLUMNS = (
    "messages",
    "conversations",
    "tools",
    "functions",
    "system",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "text",
    "input_ids",
    "labels",
    "attention_mask",
    "position_ids",
)


_DETECTED = "remove it, the format of each row is detected (data_format, columns)"
_SPLIT = "name the split in the path: ORG/NAME:train"
# Keys that other programs have for a source -> what to write here.
_PEERS_OF_A_SOURCE = {
    "type": _DETECTED, "ds_type": _DETECTED, "format": _DETECTED, "formatting": _DETECTED,
    "conversation": _DETECTED, "roles": _DETECTED, "chat_template": "set it for the whole run",
    "split": _SPLIT, "train_on_split": _SPLIT, "name": "name the files of the configuration",
    "subset": "name the files of the configuration", "data_files": "name the files in path",
    "revision": "name it in the path: ORG/NAME@REVISION:train", "shards": "limit takes first rows",
    "field_messages": "columns: {messages: NAME}", "num_samples": "limit takes first rows",
    "message_property_mappings": _DETECTED, "columns": "columns is set for the whole run",
    "dataset_path": "path", "dataset": "path",
}  # fmt: skip


class DataSource(BaseModel):
    """One source of rows: a file, folder, glob or hub split, its weight and its row limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    path: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(gt=0, le=MAX_PASSES)] = 1.0
    limit: Positive | None = None


DataNames = str | DataSource | list[str | DataSource]


def parse_train_data(value: Any) -> Any:
    """Validate `train_data`; mappings become DataSource objects. Raises ValueError."""
    return _as_names(value, "expected a file, a folder, a glob, org/name:split, or a list")


def parse_eval_data(value: Any) -> Any:
    """Validate `eval_data`: names, a share, or a number of rows. Raises ValueError."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_share = isinstance(value, float) and 0 < value < 1
    is_percentage = isinstance(value, str) and re.fullmatch(r"[\d.]+ *%", value)
    if is_percentage or (is_number and not is_share and type(value) is not int):
        raise ValueError("a share is a number above 0 and below 1, such as 0.05")
    if is_number and not is_share and value < 1:
        raise ValueError("a number of rows is at least 1; a share is written as 0.05")
    if value is None or is_number:
        return value
    return _as_names(value, "expected names as in train_data, a share (0.05) or rows (200)")


def check_columns(value: dict[str, str]) -> dict[str, str]:
    """Validate `columns`. Raises ValueError for an unknown column or a name used twice."""
    if unknown := [name for name in value if name not in COLUMNS]:
        raise ValueError(f"no format has a column {unknown[0]}; known: {', '.join(COLUMNS)}")
    if duplicates := [name for name in value.values() if [*value.values()].count(name) > 1]:
        raise ValueError(f"{duplicates[0]} is given for two columns")
    return value


def sources(names: DataNames | None) -> list[DataSource]:
    """Convert the value of a data setting to a list of DataSource objects."""
    listed = names if isinstance(names, list) else [] if names is None else [names]
    return [DataSource(path=name) if isinstance(name, str) else name for name in listed]


def _as_names(value: Any, expected: str) -> Any:
    """Convert mappings to DataSource objects. Raises ValueError with a message of one line."""
    if isinstance(value, list):
        return [
            _as_name(name, "expected a list of names or {path, weight, limit}") for name in value
        ]
    return _as_name(value, expected)


def _as_name(value: Any, expected: str) -> str | DataSource:
    if isinstance(value, str | DataSource) and value != "":
        return value
    if not isinstance(value, dict):
        raise ValueError(expected)
    known = list(DataSource.model_fields)
    unknown = [str(key) for key in value if key not in known]
    if told := [
        f"{key}: {_PEERS_OF_A_SOURCE[key]}" for key in unknown if key in _PEERS_OF_A_SOURCE
    ]:
        raise ValueError(f"of a source, {'; '.join(told)}")
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
        raise ValueError(f"{wrong[0]} is set from each row, so it cannot be set here")
    return value
