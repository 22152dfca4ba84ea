"""The beginning of a data file -> tokens of its rows, by rule of thumb. No torch, no `datasets`."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pipeline.config.settings import RunSettings
from pipeline.rows.files import kind_of, open_data

# UTF-8 bytes of content for each token. The quickstart's rows, half of them JSON, have 3.2 with a
# vocabulary of 49 152; plain English has more, code and most other languages less. An assumption.
BYTES_PER_TOKEN = 3.5
# What a chat template adds to a message: role, markers and newline (5.3 in the quickstart).
_TOKENS_PER_MESSAGE = 5
_ROWS_AT_ONCE = 100
_UNPACKED = 4  # times the sample, to see how far a compressed file shrinks: it is read in blocks
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Tokens of the documents at the beginning of a file, and which share of it they are."""

    tokens: list[int]
    share: float
    read_bytes: int


def read_sample(file: Path, allowed: int, settings: RunSettings) -> Sample:
    """The rows in the file's first `allowed` bytes. Raises OSError, EOFError or ValueError."""
    kind = kind_of(file)
    if kind == "parquet" or kind == "arrow":
        return _sample_of_table(file, kind, allowed, settings)
    with file.open("rb") as raw, open_data(file, raw) as stream:
        read = stream.read(allowed)
        is_whole = not stream.read(1)
        share = 1.0 if is_whole else len(read) / _size(raw, stream, len(read) + 1)
    rows, part = _rows(read.removeprefix(_BYTE_ORDER_MARK), kind, is_whole=is_whole)
    if not part:  # one row that is longer than the sample
        return Sample(tokens=[settings.max_length], share=share, read_bytes=len(read))
    return Sample(tokens=_documents(rows, settings), share=share * part, read_bytes=len(read))


def _size(raw: BinaryIO, stream: BinaryIO, read_bytes: int) -> float:
    """Bytes of the file, unpacked; of a large compressed one as its beginning suggests."""
    size = os.fstat(raw.fileno()).st_size
    if raw is stream:
        return size
    assert isinstance(stream, io.BufferedReader)
    unpacked = read_bytes
    while unpacked < _UNPACKED * read_bytes:
        more = len(stream.read(2**16))
        if not more:
            return unpacked
        unpacked += more
    return (unpacked + len(stream.peek())) * size / raw.tell()


def _rows(
    read: bytes, kind: Literal["jsonl", "json", "csv"], *, is_whole: bool
) -> tuple[Iterable[Any], float]:
    """Rows that are there as a whole, and which part of the bytes they are; 0 where none ends."""
    if kind == "json" and not _is_object(next(filter(bytes.strip, read.split(b"\n")), b"")):
        text = read.decode("utf-8", "ignore")
        rows, end = _values(text)
        return rows, 1.0 if is_whole else end / len(text)
    end = len(read) if is_whole else read.rfind(b"\n") + 1
    if kind == "csv":
        return _csv_rows(read[:end].decode("utf-8", "replace")), end / max(len(read), 1)
    return map(_parsed, read[:end].split(b"\n")), 1.0 if is_whole else end / len(read)


def _csv_rows(text: str) -> Iterator[Any]:
    with suppress(csv.Error):  # quotes that do not match: the rows before tell enough
        yield from csv.DictReader(io.StringIO(text, newline=""))


def _values(text: str) -> tuple[list[Any], int]:
    """Values of a list, or one after another, and where the last of them ends."""
    decoder, end = json.JSONDecoder(), 0
    rows: list[Any] = []
    while True:
        at = end
        while at < len(text) and text[at] in " \t\r\n,[]":
            at += 1
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return rows, end
        rows.append(value)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_object(line: bytes) -> bool:
    return isinstance(_parsed(line), dict)


def _sample_of_table(
    file: Path, kind: Literal["parquet", "arrow"], allowed: int, settings: RunSettings
) -> Sample:
    """The first rows of a table, whose number its own description says. ValueError if damaged."""
    import pyarrow

    if kind == "parquet":
        from pyarrow.parquet import ParquetFile

        # Buffered: a row group may be the whole file.
        with ParquetFile(file, buffer_size=2**18, pre_buffer=False) as table:
            total = table.metadata.num_rows
            return _sample_of(table.iter_batches(_ROWS_AT_ONCE), total, allowed, settings)
    with pyarrow.memory_map(str(file)) as source:
        try:
            stream = pyarrow.ipc.open_stream(source)
            batches = list(stream)  # mapped, not read
        except pyarrow.ArrowInvalid:
            opened = pyarrow.ipc.open_file(source)
            batches = [opened.get_batch(i) for i in range(opened.num_record_batches)]
        total = sum(batch.num_rows for batch in batches)
        cut = (
            batch.slice(start, _ROWS_AT_ONCE)
            for batch in batches
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE)
        )
        return _sample_of(cut, total, allowed, settings)


def _sample_of(batches: Iterable[Any], total: int, allowed: int, settings: RunSettings) -> Sample:
    tokens: list[int] = []
    rows = read_bytes = 0
    for batch in batches:
        tokens += _documents(batch.to_pylist(), settings)
        rows += batch.num_rows
        read_bytes += batch.nbytes
        if read_bytes >= allowed:
            break
    return Sample(tokens=tokens, share=rows / max(total, 1), read_bytes=min(read_bytes, allowed))


def _documents(rows: Iterable[Any], settings: RunSettings) -> list[int]:
    """Tokens of each document, as `over_length` leaves it."""
    longest, found = settings.max_length, list[int]()
    for row in rows:
        count = _tokens(row, settings) if isinstance(row, dict) else 0
        if count <= longest or settings.over_length in ("truncate", "fail"):
            found += [min(count, longest)] if count else []
        elif settings.over_length == "split":
            whole, rest = divmod(count, longest)
            found += [longest] * whole + ([rest] if rest else [])
    return found


def _tokens(row: Mapping[str, Any], settings: RunSettings) -> int:
    """Tokens of the row, 0 where it has no format."""
    if settings.columns:
        named = {name: row[there] for name, there in settings.columns.items() if there in row}
        row = {**row, **named}
    ids = row.get("input_ids")
    if isinstance(ids, list) and settings.data_format in ("auto", "pre-tokenised"):
        return len(ids)
    texts, messages = _contents(row)
    if not texts:
        return 0
    num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return max(1, round(num_bytes / BYTES_PER_TOKEN)) + _TOKENS_PER_MESSAGE * messages


def _contents(row: Mapping[str, Any]) -> tuple[list[str], int]:
    """Texts of the row, and how many of them a chat template wraps."""
    for column, key in (("messages", "content"), ("conversations", "value")):
        if isinstance(row.get(column), list):
            turns = _turns(row[column], key)
            return turns, len(turns)
    if {"instruction", "output"} <= row.keys():
        asked = f"{row['instruction']}{row.get('input') or ''}"
        return [asked, str(row["output"])], 2
    pair = [row.get("prompt"), row.get("completion")]
    if None in pair:
        return [row["text"]] if isinstance(row.get("text"), str) else [], 0
    turns = [turn for side in pair if isinstance(side, list) for turn in _turns(side, "content")]
    return turns or [side for side in pair if isinstance(side, str)], len(turns)


def _turns(messages: list[Any], key: str) -> list[str]:
    """What each message says, its tool calls and what else is in it."""
    found = (message.get(key) for message in messages if isinstance(message, dict))
    texts = [
        said if isinstance(said, str) or said is None else json.dumps(said, default=str)
        for said in found
    ]
    calls = [m.get("tool_calls") for m in messages if isinstance(m, dict) and m.get("tool_calls")]
    return [text for text in texts if text is not None] + [
        json.dumps(c, default=str) for c in calls
    ]
