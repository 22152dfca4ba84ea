"""Rows of the known formats -> examples, with the names of the columns that were not read."""

import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import compress
from typing import Any, NamedTuple, get_args

from pipeline.config.data_keys import Auto
from pipeline.config.data_names import DataFormat
from pipeline.rows.conversations import (
    CONTEXT_COLUMNS,
    alpaca,
    messages,
    prompt_and_completion,
    sharegpt,
)
from pipeline.rows.examples import (
    ROLES,
    Completion,
    Conversation,
    Example,
    Message,
    ReadExample,
    Role,
    RowError,
    Text,
    Tokens,
    printable,
)
from pipeline.rows.lines import Row
from pipeline.rows.values import has_value, json_name, text_of

__all__ = [
    "FORMATS",
    "ROLES",
    "Completion",
    "Conversation",
    "Example",
    "Message",
    "ReadExample",
    "Role",
    "RowError",
    "Text",
    "Tokens",
    "read_example",
]

FORMATS: tuple[DataFormat, ...] = get_args(DataFormat)
_LARGEST_ID = 2**31 - 1  # the prepared set holds int32; the model's vocabulary is checked there
_IGNORED = -100  # PyTorch's label of a token that does not count in the loss
# The columns that identify each format, and its optional columns.
_REQUIRED: dict[DataFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "pre-tokenised": ("input_ids", "labels"),
    "text": ("text",),
}
_OPTIONAL: dict[DataFormat, tuple[str, ...]] = {
    "messages": CONTEXT_COLUMNS,
    "sharegpt": CONTEXT_COLUMNS,
    "alpaca": ("input", "history", *CONTEXT_COLUMNS),
    "prompt-completion": CONTEXT_COLUMNS,
    "pre-tokenised": ("attention_mask", "position_ids"),
    "text": (),
}
_READ = {name: {*_REQUIRED[name], *_OPTIONAL[name]} for name in FORMATS}
_IDENTIFYING = {column for columns in _REQUIRED.values() for column in columns}
_KNOWN = "; ".join(
    f"{name} ({', '.join(f'`{column}`' for column in columns)})"
    for name, columns in _REQUIRED.items()
)
# Columns with which the text of a row is not the whole example: the row is rejected.
_MEDIA = re.compile(
    r"(image|img|picture|photo|audio|sound|speech|video)s?"
    r"(_(path|url|uri|file|bytes|base64|b64|data|list)s?)?"
    r"|pixel_values|documents",
    re.IGNORECASE,
)
_PREFERENCE = re.compile(
    r"(chosen|rejected)(_(response|message|answer|completion|conversation|output|text)s?)?"
    r"|(response|message|answer|completion|conversation|output|text)s?_(chosen|rejected)",
    re.IGNORECASE,
)


# Columns that mark the answer of a row as desirable or not, as in data for KTO.
_VERDICTS = re.compile(r"label|kto_tag|(is_)?(un)?desirable", re.IGNORECASE)


class _Columns(NamedTuple):
    """Candidate formats for the names of a row's columns, and columns whose values are checked."""

    formats: tuple[DataFormat, ...]
    media: tuple[str, ...]
    preference: tuple[str, ...]
    verdicts: tuple[str, ...]


def read_example(
    row: Row, data_format: DataFormat | Auto = "auto", columns: Mapping[str, str] | None = None
) -> ReadExample:
    """The example of a row, and the names of the columns that were not read.

    `columns`: name of the format's column -> its name in the data. Raises RowError with the reason
    if no example can be made of the row.
    """
    value, unread = _renamed(row.value, columns or {})
    _refuse_other_meanings(value, columns or {})
    name = _format_of(value, data_format)
    if name != "text":  # there, `label` is the class of a text
        _refuse_undesirable(value)
    for column in value.keys() - _READ[name]:
        if has_value(value[column]):
            unread.add(columns.get(column, column) if columns else column)
    example = _example(name, value, unread)
    return ReadExample(example, name, tuple(sorted(map(printable, unread))))


def _detect_format(columns: Mapping[str, Any]) -> DataFormat:
    """The one format whose columns all exist and are not null. RowError for none or several.

    Other columns are ignored, and so is `text` in a row of another format: it is usually the
    rendered conversation.
    """
    formats = list(_columns(tuple(columns)).formats)
    if len(formats) > 1:
        filled = [
            name for name in formats if all(columns[key] is not None for key in _REQUIRED[name])
        ]
        formats = filled or formats
    if len(formats) > 1 and formats[-1] == "text":
        formats.pop()
    if columns.get("messages") is not None and columns.get("completion") is not None:
        raise RowError("both `messages` and `completion`: name one with data_format or columns")
    if len(formats) == 1:
        return formats[0]
    if formats:
        raise RowError(f"the columns of {' and of '.join(formats)}; name one with data_format")
    known = f"expected one of {_KNOWN}, or their names in `columns`"
    raise RowError(f"no known format: {_listed(columns)}; {known}")


@lru_cache(maxsize=1024)  # a data set has few different sets of columns
def _columns(names: tuple[str, ...]) -> _Columns:
    formats = (name for name, required in _REQUIRED.items() if set(required) <= set(names))
    return _Columns(
        tuple(formats),
        tuple(filter(_MEDIA.fullmatch, names)),
        tuple(filter(_PREFERENCE.fullmatch, names)),
        tuple(filter(_VERDICTS.fullmatch, names)),
    )


def _refuse_other_meanings(value: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Raise RowError for media and for preference pairs, unless `columns` names one answer."""
    _, media, preference, _ = _columns(tuple(value))
    for column in media:
        if has_value(value[column]):
            raise RowError(f"`{column}` has a value: only text is trained on")
    if not preference or any(map(_PREFERENCE.fullmatch, columns.values())):
        return
    for column in preference:
        if has_value(value[column]):
            raise RowError(
                f"`{column}` has a value: pairs of answers are not trained on; name the column of "
                "one answer in `columns`, such as {completion: chosen}"
            )


def _refuse_undesirable(value: Mapping[str, Any]) -> None:
    """Raise RowError if a column says, by true or false, that the answer is undesirable."""
    for column in _columns(tuple(value)).verdicts:
        verdict = str(value[column]).strip().lower()  # a CSV file has text
        if verdict == ("true" if "undesirable" in column.lower() else "false"):
            raise RowError(
                f"`{column}` is {verdict}: the answer is marked as undesirable, so it is not "
                "trained on; remove the column if it means something else"
            )


def _format_of(value: Mapping[str, Any], data_format: DataFormat | Auto) -> DataFormat:
    if data_format == "auto":
        return _detect_format(value)
    if missing := [column for column in _REQUIRED[data_format] if column not in value]:
        names = ", ".join(f"`{column}`" for column in missing)
        raise RowError(f"no {names}, which data_format {data_format} needs: {_listed(value)}")
    return data_format


def _renamed(value: dict[str, Any], columns: Mapping[str, str]) -> tuple[dict[str, Any], set[str]]:
    """The row with the format's column names, and the names of columns that were replaced.

    A row without any column that `columns` names, but with all columns of a format, is not renamed:
    it is from another source. `text` is no such format, as many rows have an additional `text`.
    """
    if not columns or (
        not _IDENTIFYING.isdisjoint(columns)
        and not any(column in value for column in columns.values())
        and any(name != "text" for name in _columns(tuple(value)).formats)
    ):
        return value, set()
    for name, column in columns.items():
        if column not in value:
            raise RowError(f"no column `{column}`, named for {name} in `columns`: {_listed(value)}")
    taken = set(columns.values())
    kept = {name: item for name, item in value.items() if name not in taken}
    replaced = {name for name in columns if name in kept and has_value(kept[name])}
    return kept | {name: value[column] for name, column in columns.items()}, replaced


def _listed(columns: Mapping[str, Any]) -> str:
    return f"found the columns {', '.join(f'`{name}`' for name in sorted(columns)[:8]) or 'none'}"


def _example(name: DataFormat, value: dict[str, Any], unread: set[str]) -> Example:
    if name == "messages":
        return messages(value, unread)
    if name == "sharegpt":
        return sharegpt(value, unread)
    if name == "alpaca":
        return alpaca(value, unread)
    if name == "prompt-completion":
        return prompt_and_completion(value, unread)
    return _text(value) if name == "text" else _tokens(value)


def _text(value: Mapping[str, Any]) -> Text:
    text = text_of(value["text"], "`text`")
    if not text.strip():
        raise RowError("`text` is empty")
    return Text(text)


def _tokens(value: Mapping[str, Any]) -> Tokens:
    """Ids and labels; tokens at either end that the attention mask hides are removed."""
    ids, labels = _whole_numbers(value, "input_ids"), _whole_numbers(value, "labels")
    if len(ids) != len(labels):
        raise RowError("`input_ids` and `labels` differ in length")
    if (positions := value.get("position_ids")) is not None and positions != [*range(len(ids))]:
        raise RowError("`position_ids` are not 0, 1, 2, ...: each row must be one document")
    if value.get("attention_mask") is not None:
        mask = _whole_numbers(value, "attention_mask")
        is_one = bytes(bit == 1 for bit in mask)
        if len(mask) != len(ids) or not set(mask) <= {0, 1} or b"\0" in is_one.strip(b"\0"):
            raise RowError(
                "`attention_mask` must be as long as `input_ids`: ones, with 0 for padding at the "
                "ends"
            )
        if any(label != _IGNORED for label, bit in zip(labels, mask, strict=True) if not bit):
            raise RowError("`labels` supervise tokens that `attention_mask` hides")
        ids, labels = list(compress(ids, mask)), list(compress(labels, mask))
    if min(ids, default=0) < 0:
        raise RowError("`input_ids` has a negative number")
    if max(ids, default=0) > _LARGEST_ID:
        raise RowError(f"`input_ids` has a number above {_LARGEST_ID}, which is no token id")
    if not ids:
        raise RowError("`input_ids` is empty")
    supervised = tuple(label != _IGNORED for label in labels)
    if any(label != token for token, label in compress(zip(ids, labels, strict=True), supervised)):
        raise RowError(f"`labels` must be {_IGNORED} or equal to `input_ids` (not shifted by one)")
    return Tokens(tuple(ids), supervised)


def _whole_numbers(value: Mapping[str, Any], column: str) -> list[int]:
    numbers = value[column]
    if not isinstance(numbers, list):
        raise RowError(f"`{column}` is {json_name(numbers)}; expected a list of whole numbers")
    for number in numbers:
        if type(number) is not int:
            raise RowError(f"`{column}` holds {json_name(number)}; expected whole numbers")
    return numbers
