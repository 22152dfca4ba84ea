"""DataSize: how much there is to train on; before prepare has run, estimated from a sample."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.settings import RunSettings

SAMPLE_BYTES = 1_000_000
# UTF-8 bytes of content for each token. The quickstart's rows, half of them JSON, have 3.2 with a
# vocabulary of 49 152; plain English has more, code and most other languages less. An assumption.
BYTES_PER_TOKEN = 3.5
# What a chat template adds to a message: role, markers and newline (5.3 in the quickstart).
_TOKENS_PER_MESSAGE = 5
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Documents of an epoch and their tokens, cut to `max_length`, without padding.

    `longest`: tokens of the longest one, None where not all of them have been seen. `is_exact`:
    counted by prepare rather than estimated. `sequences` of an epoch, None before prepare.
    """

    documents: int
    tokens: int
    longest: int | None
    is_exact: bool
    sequences: int | None = None

    @property
    def mean_tokens(self) -> float:
        """Tokens of a document."""
        return self.tokens / self.documents


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Rows in the first lines of a file and their tokens; the lines are this share of its bytes."""

    tokens: list[int]
    share: float


def estimate(settings: RunSettings) -> DataSize | None:
    """Estimate from the beginnings of the training files, SAMPLE_BYTES in all; no error.

    None where a file cannot be read or no row is found in the sample. Rows of files that are read
    whole are counted; their tokens are estimates all the same. Rows that prepare would refuse for
    what their contents are count too.
    """
    files = [Path(source.path) for source in settings.train_sources]
    try:
        if not all(file.is_file() for file in files):
            return None
        samples = [sample for sample in _samples(files, settings.max_length) if sample.tokens]
    except (OSError, ValueError):  # ValueError: no file has such a name
        return None
    if not samples:
        return None
    documents = round(sum(len(sample.tokens) / sample.share for sample in samples))
    tokens = round(sum(sum(sample.tokens) / sample.share for sample in samples))
    is_whole = all(sample.share == 1 for sample in samples)
    longest = max(count for sample in samples for count in sample.tokens) if is_whole else None
    return DataSize(documents=documents, tokens=tokens, longest=longest, is_exact=False)


def _samples(files: list[Path], max_length: int) -> list[_Sample]:
    """A sample of each file: all of the small ones, an equal part of the rest."""
    sizes = {file: file.stat().st_size for file in files}
    left, samples = SAMPLE_BYTES, []
    by_size = sorted(files, key=lambda file: sizes[file])
    for index, file in enumerate(by_size):
        allowed = left // (len(by_size) - index)
        with file.open("rb") as stream:
            read = stream.read(allowed)
        left -= len(read)
        samples.append(_sample(read, sizes[file], max_length))
    return samples


def _sample(read: bytes, size: int, max_length: int) -> _Sample:
    """The rows of the whole lines that have been read."""
    if len(read) < size:  # the last line is cut; where it is the only one, it counts as a row
        end = read.rfind(b"\n") + 1
        if not end:
            return _Sample(tokens=[max_length] if read.strip() else [], share=len(read) / size)
        read = read[:end]
    lines = read.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    counts = (_tokens(line) for line in lines)
    tokens = [min(count, max_length) for count in counts if count]
    return _Sample(tokens=tokens, share=len(read) / size if size else 1.0)


def _tokens(line: bytes) -> int:
    """Tokens of the row in this line, 0 where it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return 0
    contents = _contents(row) if isinstance(row, dict) else []
    if not contents:
        return 0
    template = _TOKENS_PER_MESSAGE * len(contents) if "messages" in row else 0
    num_bytes = sum(len(content.encode("utf-8", "replace")) for content in contents)
    return max(1, round(num_bytes / BYTES_PER_TOKEN)) + template


def _contents(row: dict[str, Any]) -> list[str]:
    """Texts of the row's messages, or of its prompt and completion."""
    messages = row.get("messages")
    if isinstance(messages, list):
        found = [message.get("content") for message in messages if isinstance(message, dict)]
        return [content for content in found if isinstance(content, str)]
    pair = [row.get("prompt"), row.get("completion")]
    return [text for text in pair if isinstance(text, str)] if None not in pair else []
