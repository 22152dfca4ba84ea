"""Group the Lines of sources into chunks for worker processes, and read the example of a Line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.config.settings import RunSettings
from pipeline.rows.examples import ReadExample, RowError
from pipeline.rows.formats import read_example
from pipeline.rows.lines import size_of
from pipeline.rows.sources import BadRow, Line, Row, Source, parse_line, read_lines

CHUNK_ROWS = 1000
_CHUNK_BYTES = 2**18


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Lines of one source. `source`: its index."""

    source: int
    lines: list[Line]


def chunks(sources: Sequence[Source], rows: int) -> Iterator[Chunk]:
    """Group all Lines into chunks. A chunk has Lines of one source, at most `rows` or 256 KiB."""
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
    """The row of a Line, and its example or the reason why it has none."""
    row = parse_line(line)
    if isinstance(row, BadRow):
        return row, row.reason
    try:
        return row, read_example(row, settings.data_format, settings.columns)
    except RowError as error:
        return row, str(error)
