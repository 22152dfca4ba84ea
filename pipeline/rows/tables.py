"""Parquet and Arrow files -> lines, a thousand rows or some megabytes in memory at a time.

`datasets` does not read these: through it a Parquet file of one row group, as pyarrow writes it
by default, is in memory as a whole (docs/formats.md has the figures).
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Literal

from pipeline.errors import RankZeroError, UserError
from pipeline.rows import lines as rows
from pipeline.rows.files import compression_of, open_data
from pipeline.rows.lines import Line

_ROWS_AT_ONCE, _BYTES_AT_ONCE, _BUFFER_BYTES = 1000, 2**22, 2**20


def table_rows(file: Path, kind: Literal["parquet", "arrow"]) -> Iterator[Line]:
    """The table's rows; one that is too long or not UTF-8 is one bad row.

    Raises UserError where the file is damaged: what follows cannot be read.
    """
    import pyarrow

    number = 0
    try:
        with _seekable(file) as path:
            for batch in _parquet(path) if kind == "parquet" else _arrow(path):
                for row in _rows(batch):
                    number += 1
                    columns, fault = ({}, row) if isinstance(row, str) else (row, "")
                    yield Line(file, number, None, columns, fault)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise RankZeroError(
                f"{gettempdir()}: no room to unpack {file}; set TMPDIR to a larger disk, or "
                "unpack it"
            ) from None
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        name = kind.capitalize()
        raise UserError(f"{file}: not readable as {name} behind row {number}: {said}") from None


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a record batch, or why a row is bad."""
    count, size = batch.num_rows, batch.nbytes
    if count > 1 and size > _BYTES_AT_ONCE:
        yield from _rows(batch.slice(0, count // 2))
        yield from _rows(batch.slice(count // 2))
        return
    try:
        found = batch.to_pylist()
    except UnicodeDecodeError:
        if count == 1:
            yield "not valid UTF-8"
            return
        for i in range(count):
            yield from _rows(batch.slice(i, 1))
        return
    for row in found:
        # `size` counts a dictionary of values that rows share, so that it may be more than theirs.
        is_long = size > rows.MAX_ROW_BYTES and rows.size_of(row) > rows.MAX_ROW_BYTES
        yield rows.too_long() if is_long else row


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    # Buffered: without that, each column of a row group is read as a whole first.
    with ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        row_bytes = max(
            (group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0
        )
        at_once = _BYTES_AT_ONCE // max(row_bytes, 1)
        yield from table.iter_batches(min(max(at_once, 1), _ROWS_AT_ONCE))


def _arrow(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            batches = iter(pyarrow.ipc.open_stream(source))
        except pyarrow.ArrowInvalid:  # the other of the two forms
            table = pyarrow.ipc.open_file(source)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield batch.slice(start, _ROWS_AT_ONCE)


@contextmanager
def _seekable(file: Path) -> Iterator[Path]:
    """The file; where it is compressed as a whole, an unpacked one that is gone afterwards."""
    if compression_of(file) is None:
        yield file
        return
    with TemporaryDirectory(prefix="rankzero-") as folder:
        unpacked = Path(folder) / "table"
        with open_data(file) as packed, unpacked.open("wb") as into:
            shutil.copyfileobj(packed, into)
        yield unpacked
