"""Parquet and Arrow files -> Lines, a thousand rows or some megabytes in memory at a time.

`datasets` does not read these: through it a Parquet file of one row group, as pyarrow writes it
by default, is in memory as a whole (docs/formats.md has the figures).
"""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Literal, NamedTuple

from pipeline.errors import RankZeroError, UserError
from pipeline.rows import lines as rows
from pipeline.rows.content import compression_of, open_data
from pipeline.rows.lines import Line
from pipeline.rows.values import DECODER

_ROWS_AT_ONCE, _BYTES_AT_ONCE, _BUFFER_BYTES = 1000, 2**22, 2**20
_Convert = Callable[[Any], Any]


class _Table(NamedTuple):
    num_rows: int
    schema: Any
    batches: Iterator[Any]


def table_rows(file: Path, kind: Literal["parquet", "arrow"]) -> Iterator[Line]:
    """The table's rows; one that is too long or not UTF-8 is one bad row.

    Raises UserError where the file is damaged, so that what follows cannot be read.
    """
    import pyarrow

    number = 0
    try:
        with _seekable(file) as path, _open(path, kind) as table:
            convert = _converter(pyarrow.struct(table.schema))
            for batch in table.batches:
                for row in _rows(batch):
                    number += 1
                    columns, fault = ({}, row) if isinstance(row, str) else (row, "")
                    columns = columns if convert is None else convert(columns)
                    yield Line(file, number, None, columns, fault)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise RankZeroError(
                f"{gettempdir()}: no room to unpack {file}; set TMPDIR to a larger disk, or "
                "unpack it"
            ) from None
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        name = kind.capitalize()
        raise UserError(f"{file}: not readable as {name} behind row {number}: {reason}") from None


def num_rows(file: Path, kind: Literal["parquet", "arrow"]) -> int:
    """Rows of a table that is not compressed as a whole, from its metadata.

    Raises OSError or ValueError where it is damaged.
    """
    with _open(file, kind) as table:
        return table.num_rows


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a record batch; a text is the reason why a row is bad."""
    count, size = batch.num_rows, batch.nbytes
    if count > 1 and size > _BYTES_AT_ONCE:
        yield from _rows(batch.slice(0, count // 2))
        yield from _rows(batch.slice(count // 2))
        return
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:
        if count == 1:
            yield "not valid UTF-8"
            return
        for i in range(count):
            yield from _rows(batch.slice(i, 1))
        return
    for row in values:
        # `size` includes dictionary values that rows share: it may exceed the size of the rows.
        is_long = size > rows.MAX_ROW_BYTES and rows.size_of(row) > rows.MAX_ROW_BYTES
        yield rows.too_long() if is_long else row


def _converter(kind: Any) -> _Convert | None:
    """The conversion of a type's Python values to those of JSON; None if they need none.

    Text of the extension type `arrow.json`, as `datasets` writes it, is parsed at any depth; a map
    becomes an object.
    """
    import pyarrow
    from pyarrow import types

    if isinstance(kind, pyarrow.BaseExtensionType):
        is_json = kind.extension_name == "arrow.json"
        return _optional(_parsed_text) if is_json else _converter(kind.storage_type)
    if types.is_struct(kind):
        fields = {field.name: _converter(field.type) for field in kind}
        changed = {name: convert for name, convert in fields.items() if convert is not None}
        return _optional(lambda value: _with_converted(value, changed)) if changed else None
    if types.is_map(kind):
        item = _converter(kind.item_type) or _unchanged
        return _optional(lambda pairs: {key: item(value) for key, value in pairs})
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _converter(kind.value_type)
    if types.is_nested(kind) and hasattr(kind, "value_type"):  # the kinds of list
        item_of = _converter(kind.value_type)
        return None if item_of is None else _optional(lambda items: [item_of(i) for i in items])
    return None


def _optional(convert: _Convert) -> _Convert:
    return lambda value: None if value is None else convert(value)


def _unchanged(value: Any) -> Any:
    return value


def _with_converted(value: dict[str, Any], changed: dict[str, _Convert]) -> dict[str, Any]:
    return {key: changed.get(key, _unchanged)(item) for key, item in value.items()}


def _parsed_text(text: Any) -> Any:
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


@contextmanager
def _open(path: Path, kind: Literal["parquet", "arrow"]) -> Iterator[_Table]:
    import pyarrow

    if kind == "parquet":
        from pyarrow.parquet import ParquetFile

        # Buffered: without that, each column of a row group is read as a whole first.
        with ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
            meta = table.metadata
            groups = [meta.row_group(i) for i in range(table.num_row_groups)]
            row_bytes = max((g.total_byte_size // max(g.num_rows, 1) for g in groups), default=0)
            at_once = min(max(_BYTES_AT_ONCE // max(row_bytes, 1), 1), _ROWS_AT_ONCE)
            yield _Table(meta.num_rows, table.schema_arrow, table.iter_batches(at_once))
        return
    with pyarrow.memory_map(str(path)) as source:  # mapped, so that a list of batches is not read
        try:
            reader = pyarrow.ipc.open_stream(source)
            batches = list(reader)
        except pyarrow.ArrowInvalid:  # the file format rather than the stream format
            reader = pyarrow.ipc.open_file(source)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        slices = (
            batch.slice(start, _ROWS_AT_ONCE)
            for batch in batches
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE)
        )
        yield _Table(sum(batch.num_rows for batch in batches), reader.schema, slices)


@contextmanager
def _seekable(file: Path) -> Iterator[Path]:
    """The file; where it is compressed as a whole, an unpacked copy that is removed afterwards."""
    if compression_of(file) is None:
        yield file
        return
    with TemporaryDirectory(prefix="rankzero-") as folder:
        unpacked = Path(folder) / "table"
        with open_data(file) as packed, unpacked.open("wb") as into:
            shutil.copyfileobj(packed, into)
        yield unpacked
