"""Detect the format of a row and build its example.

The formats are messages, sharegpt, alpaca, prompt-completion, pre-tokenised and text. In this file
`value` is the row's dict from column names to values.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import compress
from math import isnan
from typing import Any, NamedTuple, get_args

from pipeline.config.data_keys import Auto
from pipeline.config.data_names import DataFormat
from pipeline.rows.conversations import (
    CONTEXT_COLUMNS,
    alpaca_example,
    completion_example,
    messages_example,
    sharegpt_example,
)
from pipeline.rows.examples import (
    Example,
    ReadExample,
    RowError,
    Text,
    Tokens,
    printable,
)
from pipeline.rows.lines import Row
from pipeline.rows.other_apis import with_messages
from pipeline.rows.values import has_value, json_type, require_text

FORMATS: tuple[DataFormat, ...] = get_args(DataFormat)
_MAX_TOKEN_ID = 2**31 - 1  # prepared token ids are int32; prepare checks the model's vocabulary
_IGNORED_LABEL = -100  # PyTorch's label of a token that does not count in the loss
# Format -> the columns that identify it; all of them are required.
_REQUIRED: dict[DataFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "pre-tokenised": ("input_ids", "labels"),
    "text": ("text",),
}
# Format -> its other columns.
_OPTIONAL: dict[DataFormat, tuple[str, ...]] = {
    "messages": CONTEXT_COLUMNS,
    "sharegpt": CONTEXT_COLUMNS,
    "alpaca": ("input", "history", *CONTEXT_COLUMNS),
    "prompt-completion": CONTEXT_COLUMNS,
    "pre-tokenised": ("attention_mask", "position_ids"),
    "text": (),
}
_KNOWN_COLUMNS = {name: {*_REQUIRED[name], *_OPTIONAL[name]} for name in FORMATS}
_IDENTIFYING = {column for columns in _REQUIRED.values() for column in columns}
_FORMATS_TEXT = "; ".join(
    f"{name} ({', '.join(f'`{column}`' for column in columns)})"
    for name, columns in _REQUIRED.items()
)
# Names of columns with media. A row with a value in one is rejected, because its text is not the
# whole example.
_MEDIA = re.compile(
    # Not media: counts and flags such as num_images, and images of machines such as docker_image.
    r"(?!(num|n|has|is|docker|container|vm|disk)_)"
    r"(([a-z0-9]+_)*(image|img|picture|photo|screenshot|audio|video)|sound|speech|media)s?(_?\d+)?"
    r"(_(path|url|uri|file|bytes|base64|b64|data|list)s?)?"
    r"|pixel_values|documents|multi_?modal_data|mm_data",
    re.IGNORECASE,
)
# An image of a container with its tag, such as `python:3.11`, in rows of coding agents. A file in
# an archive, such as `images.tar:1.jpg`, has the same form.
_CONTAINER_IMAGE = re.compile(
    r"(?!.*\.(?:avif|bmp|flac|gif|jpe?g|mkv|mov|mp[34]|ogg|png|tiff?|wav|webm|webp)$)"
    r"(?:[\w.-]+(?::\d+)?/)*[\w.-]+:\w[\w.-]*",
    re.IGNORECASE,
)
_MEDIA_FIELDS, _SOUND_FIELDS = {"bytes", "path"}, {"array", "sampling_rate"}  # of `datasets`
_DATA_URI = re.compile("data:(image|audio|video)/", re.IGNORECASE)
# Names of columns with a chosen or rejected answer, as in preference data for DPO.
_PREFERENCE = re.compile(
    r"(chosen|rejected)(_(response|message|answer|completion|conversation|output|text)s?)?"
    r"|(response|message|answer|completion|conversation|output|text)s?_(chosen|rejected)",
    re.IGNORECASE,
)
# Columns that say which tokens or turns count in the loss.
_LOSS_MASK = re.compile(
    r"(loss|assistant|completion|answer|response|train(ing)?)_masks?", re.IGNORECASE
)
# Columns with the weight of a row in the loss, or with the weights of its messages or tokens. A
# prefix of the group `loss` says that it is one; other columns may have a fact about the row.
_WEIGHT = re.compile(
    r"(?:(?P<loss>(sample|example|instance|row|data|loss|train(ing)?|importance)_)"
    r"|(?P<other>\w+_))?weights?",
    re.IGNORECASE,
)
# Columns of a pre-tokenised row with a value for each document that it consists of, and with the
# number of the document for each token.
_DOCUMENT_SIZES = re.compile(
    r"(\w*(seq|sequence|doc|document)s?_?)?(len|length|start)s?(_ids?)?|cu_?seq_?lens?(_[qk])?",
    re.IGNORECASE,
)
_DOCUMENT_NUMBERS = re.compile(
    r"(segment|doc|document|seq|sequence)_?(ids?|idx|index)", re.IGNORECASE
)
# Columns that mark the answer of a row as desirable or undesirable, as in data for KTO.
_DESIRABILITY = re.compile(r"label|kto_tag|(is_)?(un)?desirable", re.IGNORECASE)


class _ColumnSet(NamedTuple):
    """The formats whose required columns a row has, and its columns that may refuse the row."""

    formats: tuple[DataFormat, ...]
    media: tuple[str, ...]
    preference: tuple[str, ...]
    desirability: tuple[str, ...]


def read_example(
    row: Row, data_format: DataFormat | Auto = "auto", columns: Mapping[str, str] | None = None
) -> ReadExample:
    """Build the example of a row. Raises a RowError with the reason if that is impossible.

    `columns`: the setting; it maps columns of the format to their names in the data.
    """
    value, unread = _rename_columns(with_messages(row.value), columns or {})
    _refuse_media_and_preferences(value, columns or {})
    name = _select_format(value, data_format)
    if name != "text":  # in a row of `text`, `label` may be the class of the text
        _refuse_undesirable(value)
    for column in value.keys() - _KNOWN_COLUMNS[name]:
        if has_value(value[column]):
            _refuse_loss_column(column, value[column])
            if name == "pre-tokenised":
                _refuse_packed(column, value[column])
            if media := _media_name(value[column], column):
                raise RowError(_no_media(media))
            unread.add(columns.get(column, column) if columns else column)
    example = _build_example(name, value, unread)
    is_renamed = columns is not None and any(column in row.value for column in columns.values())
    return ReadExample(example, name, tuple(sorted(map(printable, unread))), is_renamed)


def _detect_format(columns: Mapping[str, Any]) -> DataFormat:
    """The format whose identifying columns the row has.

    If these are several formats, columns with null do not count. If there are still several, the
    column `text` does not count: in a row of another format it is usually the rendered
    conversation. Raises RowError if no format or several formats remain.
    """
    formats = list(_inspect_columns(tuple(columns)).formats)
    if len(formats) > 1:
        without_null = [
            name for name in formats if all(columns[key] is not None for key in _REQUIRED[name])
        ]
        formats = without_null or formats
    if len(formats) > 1 and formats[-1] == "text":
        formats.pop()
    if columns.get("messages") is not None and columns.get("completion") is not None:
        raise RowError("both `messages` and `completion`; choose one with data_format or columns")
    if len(formats) == 1:
        return formats[0]
    if formats:
        raise RowError(f"the columns of {' and of '.join(formats)}; choose one with data_format")
    known = (
        f"expected one of {_FORMATS_TEXT}; if columns have other names, name them, for example "
        "with `columns: {instruction: question, output: answer}`"
    )
    raise RowError(f"no known format: {_found_columns(columns)}; {known}")


@lru_cache(maxsize=1024)  # most rows of a data set have the same columns
def _inspect_columns(names: tuple[str, ...]) -> _ColumnSet:
    """The formats whose required columns are among `names`, and the columns to be refused."""
    formats = (name for name, required in _REQUIRED.items() if set(required) <= set(names))
    return _ColumnSet(
        tuple(formats),
        tuple(filter(_MEDIA.fullmatch, names)),
        tuple(filter(_PREFERENCE.fullmatch, names)),
        tuple(filter(_DESIRABILITY.fullmatch, names)),
    )


def _refuse_media_and_preferences(value: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Raise RowError if the row has media or a preference pair.

    A preference pair is allowed if the setting `columns` selects one of its two answers.
    """
    _, media, preference, _ = _inspect_columns(tuple(value))
    for column in media:
        if _is_media(value[column]):
            raise RowError(_no_media(column))
    if not preference or any(map(_PREFERENCE.fullmatch, columns.values())):
        return
    for column in preference:
        if has_value(value[column]):
            raise RowError(
                f"`{column}` has a value, but preference pairs are not supported; to train on one "
                "of the answers, select it, for example with `columns: {completion: chosen}`"
            )


def _refuse_loss_column(column: str, value: Any) -> None:
    """Raise RowError if an unread column says which tokens count in the loss, or how much."""
    if _LOSS_MASK.fullmatch(column) or _has_weights_of_parts(column, value):
        raise RowError(
            f"`{column}` has a value and is not read; use `weight: 0` in the messages that "
            "do not count in the loss, or `input_ids` and `labels`"
        )
    if _has_weight_of_row(column, value):
        raise RowError(
            f"`{column}` is not 1, and only messages and sources have a weight: leave out rows of "
            "weight 0, set `weight` in messages or in train_data, or remove the column if it means "
            "something else"
        )


def _has_weights_of_parts(column: str, value: Any) -> bool:
    """Whether a column has weights of messages or tokens, of which one is not 1."""
    match = _WEIGHT.fullmatch(column)
    if match is None or match["other"] or not isinstance(value, list):
        return False
    return bool({*_numbers(value)} - {1.0})


def _has_weight_of_row(column: str, value: Any) -> bool:
    """Whether a column has a weight of the row in the loss that is not 1.

    A number in other columns is a fact about the row, such as kilograms, unless it is 0.
    """
    match = _WEIGHT.fullmatch(column)
    if match is None or isinstance(value, list):
        return False
    numbers = _numbers(value)
    return numbers == [0.0] or (match["loss"] is not None and numbers not in ([], [1.0]))


def _refuse_packed(column: str, value: Any) -> None:
    """Raise RowError if an unread column says that the row consists of several documents."""
    if not isinstance(value, list):
        return
    has_sizes = _DOCUMENT_SIZES.fullmatch(column) and len(value) > 1
    if has_sizes or (_DOCUMENT_NUMBERS.fullmatch(column) and len({*_numbers(value)}) > 1):
        raise RowError(
            f"`{column}` says that the row consists of several documents; each row must be one"
        )


def _numbers(value: Any) -> list[float]:
    """The numbers of a list, or the value itself if it is one; in a CSV file numbers are text.

    NaN stands for a missing value in tables, and is left out.
    """
    numbers = []
    for item in value if isinstance(value, list) else [value]:
        with suppress(TypeError, ValueError, OverflowError):
            numbers.append(float(item))
    return [number for number in numbers if not isnan(number)]


def _no_media(column: str) -> str:
    return f"`{column}` has a value, but only text can be trained on"


def _is_media(value: Any) -> bool:
    """Whether the value of a column that is named as media has content.

    Numbers, flags such as `has_image: true`, and images of containers are not media.
    """
    if isinstance(value, str) and _CONTAINER_IMAGE.fullmatch(value):
        return False
    return has_value(value) and not isinstance(value, int | float)


def _media_name(value: Any, name: str) -> str:
    """The path of the first image, sound or video in a value; empty if there is none.

    `name`: path of the value, such as messages.content. Media are objects as `datasets` represents
    them, data URIs, and values under keys such as `image`.
    """
    if isinstance(value, list):
        return next(filter(None, (_media_name(item, name) for item in value)), "")
    if isinstance(value, dict):
        is_file = value.keys() == _MEDIA_FIELDS and not isinstance(value["bytes"], int)
        if is_file or value.keys() >= _SOUND_FIELDS:
            return name
        for key, item in value.items():
            path = f"{name}.{key}"
            if key != "documents" and _MEDIA.fullmatch(key) and _is_media(item):
                return path
            if media := _media_name(item, path):
                return media
    is_uri = isinstance(value, str) and _DATA_URI.match(value) is not None
    return name if is_uri else ""


def _refuse_undesirable(value: Mapping[str, Any]) -> None:
    """Raise RowError if a boolean column marks the answer as undesirable."""
    for column in _inspect_columns(tuple(value)).desirability:
        flag = str(value[column]).strip().lower()  # in a CSV file booleans are text
        if flag == ("true" if "undesirable" in column.lower() else "false"):
            raise RowError(
                f"`{column}` is {flag}: the answer is marked as undesirable, so it is not "
                "trained on; remove the column if it means something else"
            )


def _select_format(value: Mapping[str, Any], data_format: DataFormat | Auto) -> DataFormat:
    """The format of a row: `data_format`, or else detected. Raises RowError if the row lacks it."""
    if data_format == "auto":
        return _detect_format(value)
    if missing := [column for column in _REQUIRED[data_format] if column not in value]:
        names = ", ".join(f"`{column}`" for column in missing)
        raise RowError(
            f"no {names}, which data_format {data_format} needs: {_found_columns(value)}"
        )
    return data_format


def _rename_columns(
    value: dict[str, Any], columns: Mapping[str, str]
) -> tuple[dict[str, Any], set[str]]:
    """Rename columns of the data to the format's names.

    Returns the renamed row, and the names of columns whose values were replaced by renamed ones.
    `columns` maps the format's names to those in the data. It does not apply to a row that has none
    of the data's names but all columns of a format, because that row comes from another source. The
    format `text` does not count here: rows of other formats often have a column `text` too.
    """
    if not columns:
        return value, set()
    has_mapped_column = any(column in value for column in columns.values())
    if not has_mapped_column and not _IDENTIFYING.isdisjoint(columns):
        formats = _inspect_columns(tuple(value)).formats
        if any(name != "text" for name in formats):
            return value, set()
    for name, column in columns.items():
        if column not in value:
            raise RowError(
                f"no column `{column}`, which `columns` names for {name}: {_found_columns(value)}"
            )
    old_names = set(columns.values())
    others = {name: item for name, item in value.items() if name not in old_names}
    replaced = {name for name in columns if name in others and has_value(others[name])}
    return others | {name: value[column] for name, column in columns.items()}, replaced


def _found_columns(columns: Mapping[str, Any]) -> str:
    """Text with the first column names of a row, for messages."""
    return f"found the columns {', '.join(f'`{name}`' for name in sorted(columns)[:8]) or 'none'}"


def _build_example(name: DataFormat, value: dict[str, Any], unread: set[str]) -> Example:
    """The example of a row in this format. Raises RowError if that is impossible."""
    if name == "messages":
        return messages_example(value, unread)
    if name == "sharegpt":
        return sharegpt_example(value, unread)
    if name == "alpaca":
        return alpaca_example(value, unread)
    if name == "prompt-completion":
        return completion_example(value, unread)
    return _text_example(value) if name == "text" else _tokens_example(value)


def _text_example(value: Mapping[str, Any]) -> Text:
    text = require_text(value["text"], "`text`")
    if not text.strip():
        raise RowError("`text` is empty")
    return Text(text)


def _tokens_example(value: Mapping[str, Any]) -> Tokens:
    """The example of a pre-tokenised row, without padding (tokens with attention_mask 0)."""
    ids, labels = _integers(value, "input_ids"), _integers(value, "labels")
    if len(ids) != len(labels):
        raise RowError("`input_ids` and `labels` differ in length")
    if (positions := value.get("position_ids")) is not None and positions != [*range(len(ids))]:
        raise RowError("`position_ids` are not 0, 1, 2, ...: each row must be one document")
    if value.get("attention_mask") is not None:
        mask = _integers(value, "attention_mask")
        if len(mask) != len(ids) or not _is_padding_mask(mask):
            raise RowError(
                "`attention_mask` must be as long as `input_ids`, with 1 for tokens and 0 for "
                "padding before or after them"
            )
        if any(label != _IGNORED_LABEL for label, bit in zip(labels, mask, strict=True) if not bit):
            raise RowError("`labels` is not -100 for a token whose `attention_mask` is 0")
        ids, labels = list(compress(ids, mask)), list(compress(labels, mask))
    if min(ids, default=0) < 0:
        raise RowError("`input_ids` has a negative number")
    if max(ids, default=0) > _MAX_TOKEN_ID:
        raise RowError(f"`input_ids` has a number above {_MAX_TOKEN_ID}, so it is not a token id")
    if not ids:
        raise RowError("`input_ids` is empty")
    supervised = tuple(label != _IGNORED_LABEL for label in labels)
    if any(label != token for token, label in compress(zip(ids, labels, strict=True), supervised)):
        raise RowError(
            f"each of `labels` must be {_IGNORED_LABEL} or equal to the token at the same position "
            "in `input_ids` (labels are not shifted)"
        )
    return Tokens(tuple(ids), supervised)


def _is_padding_mask(mask: list[int]) -> bool:
    """Whether a mask has ones for consecutive tokens, and zeros before and after them (padding)."""
    if not set(mask) <= {0, 1}:
        return False
    first = mask.index(1) if 1 in mask else 0
    return 0 not in mask[first : first + sum(mask)]


def _integers(value: Mapping[str, Any], column: str) -> list[int]:
    """The value of a column if it is a list of whole numbers. Raises RowError for other values."""
    numbers = value[column]
    if not isinstance(numbers, list):
        raise RowError(f"`{column}` is {json_type(numbers)}; expected a list of whole numbers")
    for number in numbers:
        if type(number) is not int:
            raise RowError(f"`{column}` holds {json_type(number)}; expected whole numbers")
    return numbers
