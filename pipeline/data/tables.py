"""Parquet and Arrow files -> lines, through `datasets`, a thousand rows in memory at a time."""

import glob
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pipeline.config.data_files import compression_of, open_data
from pipeline.data.rows import Line
from pipeline.errors import UserError

_ROWS_AT_ONCE = 1000


def table_rows(file: Path, kind: Literal["parquet", "arrow"]) -> Iterator[Line]:
    """The table's rows. Raises UserError where the file is damaged: what follows cannot be read."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
    # The size of its batches is else that of the first row group, which may be the whole file.
    options: dict[str, Any] = {"batch_size": _ROWS_AT_ONCE} if kind == "parquet" else {}
    number = 0
    try:
        with _seekable(file) as (path, cache):
            table = datasets.load_dataset(
                kind,
                data_files=glob.escape(str(path)),
                split="train",
                streaming=True,  # reads where the file lies; writes nothing but a lock
                cache_dir=cache,
                **options,
            )
            for number, row in enumerate(table.decode(False), start=1):
                yield Line(file, number, None, row)
    except Exception as error:  # noqa: BLE001 - each version of the library wraps in another one
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        name = kind.capitalize()
        raise UserError(f"{file}: not readable as {name} after row {number}: {said}") from None


@contextmanager
def _seekable(file: Path) -> Iterator[tuple[Path, str]]:
    """The file, unpacked if it is compressed as a whole, and a folder that is gone afterwards."""
    with TemporaryDirectory(prefix="rankzero-") as folder:
        if compression_of(file) is None:
            yield file.absolute(), folder
            return
        unpacked = Path(folder) / "table"
        with open_data(file) as packed, unpacked.open("wb") as into:
            shutil.copyfileobj(packed, into)
        yield unpacked, folder
