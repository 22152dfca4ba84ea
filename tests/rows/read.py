"""Read rows and examples in tests of the readers."""

from pathlib import Path

from pipeline.config.data_names import DataSource
from pipeline.rows.formats import read_example
from pipeline.rows.sources import Row, read_rows, resolve_sources


def row_of(value):
    """A row with this value."""
    return Row(Path("rows.jsonl"), 1, value)


def resolved(*paths, key="train_data", **values):
    """The resolved sources of these paths."""
    return resolve_sources([DataSource(path=str(path), **values) for path in paths], key)


def read_file(path):
    """The rows and bad rows of a file or folder."""
    return list(read_rows(resolved(path)))


def examples_of(path):
    """The examples of a file or folder without bad rows."""
    return [read_example(row).example for row in read_file(path)]
