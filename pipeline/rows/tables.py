"""Reader of Parquet and Arrow files that holds at most 1000 rows, or about 4 MiB, in memory.

`datasets` is not used, because it loads whole row groups, and a Parquet file is often one row
group. docs/formats.md compares the memory of both.
"""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Literal, NamedTuple

from pipeline.errors import RankZeroError, UserError
from pipeline.rows import lines as row_limits
from pipeline.rows.content import detect_compression, open_data
from pipeline.rows.lines import Line
from pipeline.rows.values import DECODER

_ROWS_AT_ONCE, _BYTES_AT_ONCE = 1000, 2**22  # limits on the rows in memory
_BUFFER_BYTES = 2**20  # pyarrow's read buffer for each column
_Convert = Callable[[Any], Any]


class _Table(NamedTuple):
    """An open table. `batches`: pyarrow record batches of limited size."""

    num_rows: int
    schema: Any
    batches: Iterator[Any]


def table_rows(file: Path, kind: Literal["parquet", "arrow"]) -> Iterator[Line]:
    """The rows of a table. If a row is too long or has invalid UTF-8, its `fault` says so.

    Raises UserError if the rest of the file cannot be read.
    """
    import pyarrow

    number = 0
    try:
        with _decompressed(file) as path, _open_table(path, kind) as table:
            convert = _converter(pyarrow.struct(table.schema))
            for batch in table.batches:
                for row in _batch_rows(batch):
                    number += 1
                    columns, fault = ({}, row) if isinstance(row, str) else (row, "")
                    columns = columns if convert is None else convert(columns)
                    yield Line(file, number, None, columns, fault)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise RankZeroError(
                f"{gettempdir()}: no space to decompress {file}; set TMPDIR to a folder with more "
                "space, or decompress the file yourself"
            ) from None
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{file}: cannot be read as {kind.capitalize()} after row {number}: {reason}"
        ) from None


def num_rows(file: Path, kind: Literal["parquet", "arrow"]) -> int:
    """Number of rows of a table, from its metadata.

    Raises OSError or ValueError if the file is damaged or compressed (such as *.parquet.gz).
    """
    with _open_table(file, kind) as table:
        return table.num_rows


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a record batch; for a bad row, the reason as a string."""
    count, size = batch.num_rows, batch.nbytes
    if count > 1 and size > _BYTES_AT_ONCE:
        yield from _batch_rows(batch.slice(0, count // 2))
        yield from _batch_rows(batch.slice(count // 2))
        return
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:
        if count == 1:
            yield "not valid UTF-8"
            return
        for i in range(count):
            yield from _batch_rows(batch.slice(i, 1))
        return
    for row in values:
        # `size` includes dictionary values that rows share, so it may exceed the rows' own size.
        is_long = (
            size > row_limits.MAX_ROW_BYTES and row_limits.size_of(row) > row_limits.MAX_ROW_BYTES
        )
        yield row_limits.too_long() if is_long else row


def _converter(arrow_type: Any) -> _Convert | None:
    """A function that converts Python values of an Arrow type to JSON values; None if not needed.

    Two types need a conversion, also within other types: text of the extension type `arrow.json`,
    which `datasets` writes, is parsed; a map, which pyarrow returns as pairs, becomes a dict.
    """
    import pyarrow
    from pyarrow import types

    if isinstance(arrow_type, pyarrow.BaseExtensionType):
        if arrow_type.extension_name == "arrow.json":
            return _unless_null(_parse_json_text)
        return _converter(arrow_type.storage_type)
    if types.is_struct(arrow_type):
        return _struct_converter(arrow_type)
    if types.is_map(arrow_type):
        convert_value = _converter(arrow_type.item_type) or _identity
        return _unless_null(lambda pairs: {key: convert_value(value) for key, value in pairs})
    if types.is_dictionary(arrow_type) or types.is_run_end_encoded(arrow_type):
        return _converter(arrow_type.value_type)
    if types.is_nested(arrow_type) and hasattr(arrow_type, "value_type"):  # all kinds of lists
        convert_item = _converter(arrow_type.value_type)
        if convert_item is not None:
            return _unless_null(lambda items: [convert_item(item) for item in items])
    return None


def _struct_converter(struct_type: Any) -> _Convert | None:
    """The function of `_converter` for a struct.

    Raises ValueError for two fields of one name: a dict would keep only one of them.
    """
    names = [field.name for field in struct_type]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two columns or fields have the name {', '.join(twice[:5])}")
    converters: dict[str, _Convert] = {}
    for field in struct_type:
        if (convert := _converter(field.type)) is not None:
            converters[field.name] = convert
    return _unless_null(lambda row: _convert_fields(row, converters)) if converters else None


def _unless_null(convert: _Convert) -> _Convert:
    """The function `convert`, except that it returns None for None."""
    return lambda value: None if value is None else convert(value)


def _identity(value: Any) -> Any:
    return value


def _convert_fields(value: dict[str, Any], converters: dict[str, _Convert]) -> dict[str, Any]:
    """The value with its fields converted by the functions in `converters`, by field name."""
    return {key: converters.get(key, _identity)(item) for key, item in value.items()}


def _parse_json_text(text: Any) -> Any:
    """The value of JSON text; the text itself if it is not valid JSON."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


@contextmanager
def _open_table(path: Path, kind: Literal["parquet", "arrow"]) -> Iterator[_Table]:
    """Open a table for reading in batches of limited size."""
    import pyarrow

    if kind == "parquet":
        from pyarrow.parquet import ParquetFile

        # With `buffer_size`, columns are read in parts instead of a whole row group at a time.
        with ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
            metadata = table.metadata
            groups = [metadata.row_group(i) for i in range(table.num_row_groups)]
            # Mean bytes of a row in the row group where it is largest.
            row_bytes = max(
                (group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0
            )
            batch_rows = min(max(_BYTES_AT_ONCE // max(row_bytes, 1), 1), _ROWS_AT_ONCE)
            yield _Table(metadata.num_rows, table.schema_arrow, table.iter_batches(batch_rows))
        return
    with pyarrow.memory_map(str(path)) as source:  # the batches refer to the mapped file
        try:
            reader = pyarrow.ipc.open_stream(source)
            batches = list(reader)
        except pyarrow.ArrowInvalid:  # the file has Arrow's file format, not its stream format
            reader = pyarrow.ipc.open_file(source)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        slices = (
            batch.slice(start, _ROWS_AT_ONCE)
            for batch in batches
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE)
        )
        yield _Table(sum(batch.num_rows for batch in batches), reader.schema, slices)


@contextmanager
def _decompressed(file: Path) -> Iterator[Path]:
    """Yield a path to the file or, if it is compressed, to a temporary decompressed copy."""
    if detect_compression(file) is None:
        yield file
        return
    with TemporaryDirectory(prefix="rankzero-") as folder:
        copy = Path(folder) / "table"
        with open_data(file) as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
        yield copy
