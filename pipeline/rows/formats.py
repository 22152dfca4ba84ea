"""Rows of the known formats -> Example. No torch.

A reason is the same for all rows that share it: it names columns and roles, never contents.
"""

from collections.abc import Mapping
from functools import lru_cache
from itertools import compress
from typing import Any, get_args

from pipeline.config.data_names import DataFormat
from pipeline.config.settings import Auto
from pipeline.rows.conversations import alpaca, messages, prompt_and_completion, sharegpt, text_of
from pipeline.rows.examples import (
    ROLES,
    Completion,
    Conversation,
    Example,
    Message,
    Role,
    RowError,
    Text,
    Tokens,
)
from pipeline.rows.lines import Row, json_name

__all__ = [
    "FORMATS",
    "ROLES",
    "Completion",
    "Conversation",
    "Example",
    "Message",
    "Role",
    "RowError",
    "Text",
    "Tokens",
    "detect_format",
    "format_of",
    "to_example",
]

FORMATS: tuple[DataFormat, ...] = get_args(DataFormat)
_LARGEST_ID = 2**31 - 1  # as they are kept; what the model has is looked at later
_IGNORED = -100  # the label of a token that does not count, as everywhere in PyTorch
# The columns that say which format a row has.
_SIGNS: dict[DataFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "pre-tokenised": ("input_ids", "labels"),
    "text": ("text",),
}
_SIGNS_BUT_TEXT = [signs for name, signs in _SIGNS.items() if name != "text"]
_SIGNING = {column for signs in _SIGNS.values() for column in signs}
_KNOWN = "; ".join(
    f"{name} ({', '.join(f'`{column}`' for column in columns)})" for name, columns in _SIGNS.items()
)


def to_example(
    row: Row, data_format: DataFormat | Auto = "auto", columns: Mapping[str, str] | None = None
) -> Example:
    """The row's example; raises RowError with the reason where it has none.

    `columns`: name of the format's column -> name that it has in the data.
    """
    value = _renamed(row.value, columns or {})
    found = _format_of(value, data_format)
    if found == "messages":
        return messages(value)
    if found == "sharegpt":
        return sharegpt(value)
    if found == "alpaca":
        return alpaca(value)
    if found == "prompt-completion":
        return prompt_and_completion(value)
    return _text(value) if found == "text" else _tokens(value)


def format_of(
    row: Row, data_format: DataFormat | Auto = "auto", columns: Mapping[str, str] | None = None
) -> DataFormat:
    """The format of the row; raises RowError for one with the columns of none, or of several."""
    return _format_of(_renamed(row.value, columns or {}), data_format)


def detect_format(columns: Mapping[str, Any]) -> DataFormat:
    """The one format whose columns are all there and not null; RowError for none or several.

    Columns that belong to no format do not count, nor does `text` beside another format: it is
    then what somebody made of the other columns.
    """
    found = list(_with_columns(tuple(filter(_SIGNING.__contains__, columns))))
    if len(found) > 1:
        filled = [
            name for name in found if all(columns[column] is not None for column in _SIGNS[name])
        ]
        found = filled or found
    if len(found) > 1 and found[-1] == "text":
        found.pop()
    if columns.get("messages") is not None and columns.get("completion") is not None:
        raise RowError("both `messages` and `completion`: name one with data_format or columns")
    if len(found) == 1:
        return found[0]
    if found:
        raise RowError(f"the columns of {' and of '.join(found)}; name one with data_format")
    known = f"expected one of {_KNOWN}, or their names in `columns`"
    raise RowError(f"no known format: {_found(columns)}; {known}")


@lru_cache  # asked for each row, and rows have few sets of columns
def _with_columns(columns: tuple[str, ...]) -> tuple[DataFormat, ...]:
    """The formats whose columns are all there."""
    return tuple(name for name, signs in _SIGNS.items() if set(signs) <= set(columns))


def _format_of(value: Mapping[str, Any], data_format: DataFormat | Auto) -> DataFormat:
    if data_format == "auto":
        return detect_format(value)
    if missing := [column for column in _SIGNS[data_format] if column not in value]:
        names = ", ".join(f"`{column}`" for column in missing)
        raise RowError(f"no {names}, which data_format {data_format} needs: {_found(value)}")
    return data_format


def _renamed(value: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with the names of the format; what has none of them keeps its own.

    A row without any named column is of another source, if it has a format by itself. Not if that
    is `text`: many rows have one beside what they are, and a name in `columns` may be misspelt.
    """
    if not columns or (
        not _SIGNING.isdisjoint(columns)  # they say of which format rows are; these have another
        and not any(there in value for there in columns.values())
        and any(all(sign in value for sign in signs) for signs in _SIGNS_BUT_TEXT)
    ):
        return value
    for name, there in columns.items():
        if there not in value:
            raise RowError(f"no column `{there}`, named for {name} in `columns`: {_found(value)}")
    taken = set(columns.values())
    kept = {name: item for name, item in value.items() if name not in taken}
    return kept | {name: value[there] for name, there in columns.items()}


def _found(columns: Mapping[str, Any]) -> str:
    return f"found the columns {', '.join(sorted(columns)[:8]) or 'none'}"


def _text(value: Mapping[str, Any]) -> Text:
    text = text_of(value["text"], "`text`")
    if not text.strip():
        raise RowError("`text` is empty")
    return Text(text)


def _tokens(value: Mapping[str, Any]) -> Tokens:
    """Ids and labels of one length; what an attention mask hides at either end is cut off."""
    ids, labels = _whole_numbers(value, "input_ids"), _whole_numbers(value, "labels")
    if len(ids) != len(labels):
        raise RowError("`input_ids` and `labels` are not of one length")
    if (positions := value.get("position_ids")) is not None and positions != [*range(len(ids))]:
        raise RowError("`position_ids` that do not count from 0: one row is one document")
    if value.get("attention_mask") is not None:
        seen = _whole_numbers(value, "attention_mask")
        shown = bytes(bit == 1 for bit in seen)
        if len(seen) != len(ids) or not set(seen) <= {0, 1} or b"\0" in shown.strip(b"\0"):
            raise RowError("`attention_mask` is not as long as `input_ids`, ones, padding 0")
        if any(label != _IGNORED for label, bit in zip(labels, seen, strict=True) if not bit):
            raise RowError("`labels` count tokens that `attention_mask` hides")
        ids, labels = list(compress(ids, seen)), list(compress(labels, seen))
    if min(ids, default=0) < 0:
        raise RowError("`input_ids` has a negative number")
    if max(ids, default=0) > _LARGEST_ID:
        raise RowError("`input_ids` has a number that is no token's")
    if not ids:
        raise RowError("`input_ids` is empty")
    supervised = tuple(label != _IGNORED for label in labels)
    if any(label != token for token, label in compress(zip(ids, labels, strict=True), supervised)):
        raise RowError(f"`labels` are neither {_IGNORED} nor the ids (not shifted by one)")
    return Tokens(tuple(ids), supervised)


def _whole_numbers(value: Mapping[str, Any], column: str) -> list[int]:
    found = value[column]
    if not isinstance(found, list):
        raise RowError(f"`{column}` is {json_name(found)}; expected a list of whole numbers")
    for item in found:
        if type(item) is not int:
            raise RowError(f"`{column}` holds {json_name(item)}; expected whole numbers")
    return found
