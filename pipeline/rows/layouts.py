"""Refuse JSON files in which one object holds a whole table.

pandas, `datasets` and many APIs write such files. Their rows are under one key, or the table is
stored column by column. The error message has a command that converts the file to JSONL.
"""

import re
import shlex
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.config.data_names import COLUMNS
from pipeline.errors import UserError
from pipeline.rows.content import strip_byte_order_marks
from pipeline.rows.lines import MAX_ROW_BYTES

_SNIFFED_BYTES, _CHUNK_BYTES = 2**16, 2**20
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
# Matches the colon after a key and the first characters of the value. Group 1 has these characters:
# `[[`, `[{` or `["` for a list, `{"` for an object, `{"0":` if its first key is a number, or none.
_KEY = re.compile(r'\s*:\s*(\[\s*[\[{"]?|\{\s*(?:"(?:\d+"\s*:)?)?)?')
# Keys under which files have their list of rows.
_ROWS_KEYS = (
    "data", "rows", "records", "examples", "samples", "instances", "items", "entries", "dataset",
    "results", "train", "training", "test", "validation", "valid", "val", "dev", "eval",
)  # fmt: skip
# Python code of the command in the error message.
_READ = "import json, sys; t = json.load(open(sys.argv[1], encoding='utf-8-sig'))"
_PRINT = "[print(json.dumps(r)) for r in {rows}]"


class _Layout(NamedTuple):
    """A layout of a table: its description, and a Python expression for its rows.

    In the expression, `t` is the parsed file.
    """

    description: str
    rows: str


def refuse_whole_table(file: Path, stream: BinaryIO) -> None:
    """Raise UserError if a JSON file is one object that holds a whole table."""
    beginning = stream.read(_SNIFFED_BYTES)
    values = _first_object(strip_byte_order_marks(beginning).decode("utf-8", "replace"))
    if (layout := _detect_layout(values)) is None or _has_next_row(beginning, stream):
        return
    code = f"{_READ}; {_PRINT.format(rows=layout.rows)}"
    source, target = (shlex.quote(f"{file}{suffix}") for suffix in ("", ".rows.jsonl"))
    raise UserError(
        f"{file}: {layout.description}, not one JSON object for each row; convert it: "
        f'python -c "{code}" {source} > {target}'
    )


def _has_next_row(beginning: bytes, stream: BinaryIO) -> bool:
    """Whether a later line begins with an object. Then the first object is one row of several."""
    num_read, chunk = len(beginning), beginning
    while b"\n{" not in chunk:
        following = stream.read(_CHUNK_BYTES)
        num_read += len(following)
        if not following or num_read > MAX_ROW_BYTES:
            return False
        chunk = chunk[-1:] + following
    return True


def _detect_layout(values: dict[str, str]) -> _Layout | None:
    """The layout of an object; None if the object may be a row.

    `values`: mapping from each key to the first characters of its value (_KEY).
    """
    starts = set(values.values())
    if {"columns", "data"} <= values.keys() and values["data"] in ("[[", "["):
        return _Layout(
            "a table as pandas writes it with orient='split'",
            "(dict(zip(t['columns'], v)) for v in t['data'])",
        )
    if values.keys().isdisjoint(COLUMNS):
        for key in _ROWS_KEYS:
            if values.get(key) == "[{":
                return _Layout(f"a list of rows under the key {key!r}", _rows_under_key(key))
        # An object with one key may be a row with one column, unless the key is a row number.
        are_objects = bool(values) and starts <= {'{"', '{"0":'}
        if are_objects and (len(values) > 1 or all(key.isdigit() for key in values)):
            if starts == {'{"0":'}:
                return _layout_by_column()
            return _Layout("rows as the values of one object", "t.values()")
        return None
    if starts == {'{"0":'}:
        return _layout_by_column()
    if values and starts <= {'["', "[["}:
        return _Layout("one list for each column", "(dict(zip(t, v)) for v in zip(*t.values()))")
    return None


def _rows_under_key(key: str) -> str:
    # The API of the hub's dataset viewer returns {row_idx, row: {...}} for each row.
    return f"(v.get('row', v) for v in t['{key}'])"


def _layout_by_column() -> _Layout:
    """The layout in which each column maps row labels to values."""
    return _Layout(
        "a table as pandas writes it with orient='columns'",
        "({k: v.get(i) for k, v in t.items()} for i in next(iter(t.values())))",
    )


def _first_object(text: str) -> dict[str, str]:
    """Mapping from each key of a file's first object to the first characters of its value.

    `text`: the start of the file. Empty if the file does not begin with an object, or if another
    value follows that object.
    """
    if not text.lstrip().startswith("{"):
        return {}
    values: dict[str, str] = {}
    depth = 0
    for token in _TOKEN.finditer(text):
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
            if not depth:
                return {} if text[token.end() :].strip() else values
        elif depth == 1 and (after := _KEY.match(text, token.end())):
            value = "".join((after[1] or "").split())
            values[token[0][1:-1]] = re.sub(r'"\d+":', '"0":', value)
    return values
