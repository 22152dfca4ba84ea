"""Rows for tests of the readers."""

from pathlib import Path

from pipeline.rows.sources import Row


def row_of(value):
    """A row with this value."""
    return Row(Path("rows.jsonl"), 1, value)
