"""Group rows into chunks for worker processes, and parse them there.

A `Line` (rows/sources.py) is a row before it is parsed, with its file and line number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.config.settings import RunSettings
from pipeline.rows.examples import ReadExample, RowError
from pipeline.rows.formats import read_example
from pipeline.rows.lines import size_of
from pipeline.rows.sources import BadRow, Line, Row, Source, parse_line, read_lines

CHUNK_ROWS = 1000  # most rows of a chunk
_CHUNK_BYTES = 2**18  # a chunk ends with the row that reaches this size


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive rows of one source. `source`: its index."""

    source: int
    lines: list[Line]


def chunks(sources: Sequence[Source], rows: int) -> Iterator[Chunk]:
    """Group the rows of all sources into chunks of at most `rows` rows and about 256 KiB."""
    for number, source in enumerate(sources):
        chunk: list[Line] = []
        size = 0
        for line in read_lines(source):
            chunk.append(line)
            content = line.content
            size += len(content) if isinstance(content, bytes) else size_of(content)
            if len(chunk) == rows or size >= _CHUNK_BYTES:
                yield Chunk(source=number, lines=chunk)
                chunk, size = [], 0
        if chunk:
            yield Chunk(source=number, lines=chunk)


def read_line(line: Line, settings: RunSettings) -> tuple[Row | BadRow, ReadExample | str]:
    """Parse a row: the row, and its example or the reason why it has none."""
    row = parse_line(line)
    if isinstance(row, BadRow):
        return row, row.reason
    try:
        return row, read_example(row, settings.data_format, settings.columns)
    except RowError as error:
        return row, str(error)
