"""Estimate of the size of the training data from a sample, before prepare has counted it."""

import json
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pipeline.config.data_names import DataSource
from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.given.data_size import DataSize, LengthLoss
from pipeline.rows.examples import Completion, Conversation, Example, RowError, Text
from pipeline.rows.files import find_files
from pipeline.rows.formats import read_example
from pipeline.rows.sources import Row, parse_line, sample_file

SAMPLE_BYTES = 1_000_000
_MAX_FILES = 64  # files sampled per source; the other files are assumed to be similar
# UTF-8 bytes of content per token: an assumption. The quickstart's rows, of which half are JSON,
# have 3.2 with a vocabulary of 49 152 tokens. Plain English has more; code and most other languages
# have less.
BYTES_PER_TOKEN = 3.5
# Tokens that a chat template adds to a message: role, markers, newline (5.3 in the quickstart).
_TOKENS_PER_MESSAGE = 5


@dataclass(frozen=True, kw_only=True)
class _FileSample:
    """A sample from the beginning of a file.

    `tokens`: number of tokens of each document. `lengths`: the same before `over_length` is
    applied. `share`: fraction of the file that was read.
    """

    tokens: list[int]
    lengths: list[int]
    share: float


def estimate(settings: RunSettings) -> DataSize | None:
    """The estimated size of the training data, from the beginnings of its files.

    At most SAMPLE_BYTES are read. The result is None if a file cannot be read, if the sample has no
    row, or if a source is on the hub. The rows of a file that is read completely are counted
    exactly; tokens are always estimated. `split_turns` is not applied.
    """
    try:
        files = [find_files(source.path, "train_data").files for source in settings.train_sources]
        samples = _samples(files, settings)
    except (OSError, EOFError, ValueError, UserError):  # ValueError: an impossible file name
        return None
    sizes = [
        _size_of_source(source, source_files, samples)
        for source, source_files in zip(settings.train_sources, files, strict=True)
    ]
    documents = sum(size[0] for size in sizes)
    rows = sum(
        _num_rows(source_files, samples) * _used_share(source, source_files, samples)
        for source, source_files in zip(settings.train_sources, files, strict=True)
    )
    train_share = _train_share(settings, rows)
    if round(documents * train_share) < 1:
        return None
    is_whole = all(file in samples and samples[file].share == 1 for each in files for file in each)
    return DataSize(
        documents=round(documents * train_share),
        tokens=round(sum(size[1] for size in sizes) * train_share),
        longest=max(chain(*(one.tokens for one in samples.values()))) if is_whole else None,
        is_exact=False,
        length_loss=_length_loss(settings, files, samples, train_share),
    )


def _length_loss(
    settings: RunSettings,
    files: list[list[Path]],
    samples: dict[Path, _FileSample],
    train_share: float,
) -> LengthLoss:
    """The estimated loss by `max_length`: each sampled document stands for many of its length."""
    documents: defaultdict[int, float] = defaultdict(float)  # their number by length
    for source, source_files in zip(settings.train_sources, files, strict=True):
        share = train_share * source.weight * _used_share(source, source_files, samples)
        scale = share * _scale(source_files, samples)
        for sample in (samples[file] for file in source_files if file in samples):
            for length in sample.lengths:
                documents[length] += scale / sample.share
    total = sum(length * count for length, count in documents.items())

    def kept(limit: int) -> float:
        """Tokens that this `max_length` keeps: the first of each longer document, or none of it."""
        if settings.over_length == "truncate":
            return sum(min(length, limit) * count for length, count in documents.items())
        return sum(length * count for length, count in documents.items() if length <= limit)

    lengths = range(1, max(documents) + 1)
    keeps_99 = lengths[bisect_left(lengths, 0.99 * total, key=kept)]
    is_split = settings.over_length == "split"
    return LengthLoss(
        documents=round(sum(documents.values())),
        longer=round(sum(n for length, n in documents.items() if length > settings.max_length)),
        tokens=round(total),
        lost=0 if is_split else round(total - kept(settings.max_length)),
        keeps_99=keeps_99,
        keeps_all=max(documents),
    )


def _samples(files: list[list[Path]], settings: RunSettings) -> dict[Path, _FileSample]:
    """A sample of each file. Small files are read completely; the rest of the budget is shared."""
    chosen = {file for each in files for file in each[:: 1 + (len(each) - 1) // _MAX_FILES]}
    budget, samples = SAMPLE_BYTES, {}
    by_size = sorted(chosen, key=lambda file: (file.stat().st_size, file))
    for index, file in enumerate(by_size):
        lines, share, num_bytes = sample_file(file, budget // (len(by_size) - index))
        budget -= num_bytes
        rows = (row for row in map(parse_line, lines) if isinstance(row, Row))
        lengths = [length for row in rows for length in _document_length(row, settings)]
        tokens = [count for length in lengths for count in _trained_lengths(length, settings)]
        samples[file] = _FileSample(tokens=tokens, lengths=lengths, share=share)
    return samples


def _size_of_source(
    source: DataSource, files: list[Path], samples: dict[Path, _FileSample]
) -> tuple[float, float]:
    """Number of documents and number of tokens that a source has in an epoch."""
    scale = _scale(files, samples)
    not_empty = [samples[file] for file in files if file in samples and samples[file].tokens]
    documents = scale * sum(len(one.tokens) / one.share for one in not_empty)
    tokens = scale * sum(sum(one.tokens) / one.share for one in not_empty)
    share = source.weight * _used_share(source, files, samples)
    return documents * share, tokens * share


def _used_share(source: DataSource, files: list[Path], samples: dict[Path, _FileSample]) -> float:
    """Fraction of the rows of a source that are read: its `limit` may be lower."""
    if source.limit is None:
        return 1.0
    return min(1.0, source.limit / max(_num_rows(files, samples), 1))


def _num_rows(files: list[Path], samples: dict[Path, _FileSample]) -> float:
    """Number of rows of a source that have a document."""
    sampled = [samples[file] for file in files if file in samples and samples[file].lengths]
    return _scale(files, samples) * sum(len(one.lengths) / one.share for one in sampled)


def _scale(files: list[Path], samples: dict[Path, _FileSample]) -> float:
    """Bytes of all files of a source relative to the bytes of its sampled files."""
    return _num_bytes(files) / _num_bytes([file for file in files if file in samples])


def _num_bytes(files: list[Path]) -> int:
    """Total size of files in bytes, at least 1."""
    return max(1, sum(file.stat().st_size for file in files))


def _train_share(settings: RunSettings, rows: float) -> float:
    """Fraction of the rows that are not held out for evaluation."""
    held_out = settings.held_out
    if held_out is None:
        return 1.0
    return 1 - (held_out if isinstance(held_out, float) else min(1.0, held_out / max(rows, 1)))


def _document_length(row: Row, settings: RunSettings) -> list[int]:
    """Estimated tokens of a row's document; empty if the row is bad."""
    try:
        return [_num_tokens(read_example(row, settings.data_format, settings.columns).example)]
    except RowError:
        return []


def _trained_lengths(length: int, settings: RunSettings) -> list[int]:
    """Tokens of each document that `over_length` makes from a document of this length."""
    longest = settings.max_length
    if length <= longest or settings.over_length in ("truncate", "fail"):
        return [min(length, longest)]
    if settings.over_length == "drop":
        return []
    whole, rest = divmod(length, longest)
    return [longest] * whole + ([rest] if rest else [])


def _num_tokens(example: Example) -> int:
    """Estimated number of tokens of an example; exact if the row has token ids."""
    messages = 0
    if isinstance(example, Conversation):
        texts = [message.content for message in example.messages]
        others = [message.others for message in example.messages if message.others]
        texts += [json.dumps(value, ensure_ascii=False) for value in (*others, *example.tools)]
        messages = len(example.messages)
    elif isinstance(example, Completion):
        texts = [example.prompt, example.completion]
    elif isinstance(example, Text):
        texts = [example.text]
    else:
        return len(example.ids)
    num_bytes = sum(len(text.encode()) for text in texts)
    return max(1, round(num_bytes / BYTES_PER_TOKEN)) + _TOKENS_PER_MESSAGE * messages
