"""Functions by which tests read rows and examples.

A row is a JSON object of a data file, with its file and line. An example is the conversation or
text that is read from a row. A bad row is a line from which no row can be read.
"""

from pathlib import Path

from pipeline.config.data_names import DataSource
from pipeline.rows.formats import read_example
from pipeline.rows.sources import Row, read_rows, resolve_sources


def row_of(value):
    """A Row with this JSON object."""
    return Row(Path("rows.jsonl"), 1, value)


def resolved(*paths, key="train_data", **values):
    """The sources (files, weight, limit) to which these paths of a run file are resolved."""
    return resolve_sources([DataSource(path=str(path), **values) for path in paths], key)


def read_file(path):
    """The rows and bad rows of a file or folder."""
    return list(read_rows(resolved(path)))


def examples_of(path):
    """The examples of a file or folder without bad rows."""
    return [read_example(row).example for row in read_file(path)]
