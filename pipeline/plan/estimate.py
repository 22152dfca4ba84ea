"""Estimate of the size of the training data from a sample, before prepare has counted it."""

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pipeline.config.data_names import DataSource
from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.given.data_size import DataSize
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

    `tokens`: number of tokens of each document. `share`: fraction of the file that was read.
    """

    tokens: list[int]
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
    train_share = _train_share(settings, documents)
    if round(documents * train_share) < 1:
        return None
    is_whole = all(file in samples and samples[file].share == 1 for each in files for file in each)
    return DataSize(
        documents=round(documents * train_share),
        tokens=round(sum(size[1] for size in sizes) * train_share),
        longest=max(chain(*(one.tokens for one in samples.values()))) if is_whole else None,
        is_exact=False,
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
        tokens = [count for row in rows for count in _document_tokens(row, settings)]
        samples[file] = _FileSample(tokens=tokens, share=share)
    return samples


def _size_of_source(
    source: DataSource, files: list[Path], samples: dict[Path, _FileSample]
) -> tuple[float, float]:
    """Number of documents and number of tokens that a source has in an epoch."""
    sampled = [file for file in files if file in samples]
    scale = _num_bytes(files) / _num_bytes(sampled)
    not_empty = [samples[file] for file in sampled if samples[file].tokens]
    documents = scale * sum(len(one.tokens) / one.share for one in not_empty)
    tokens = scale * sum(sum(one.tokens) / one.share for one in not_empty)
    used_share = 1.0 if source.limit is None else min(1.0, source.limit / max(documents, 1))
    return documents * used_share * source.weight, tokens * used_share * source.weight


def _num_bytes(files: list[Path]) -> int:
    """Total size of files in bytes, at least 1."""
    return max(1, sum(file.stat().st_size for file in files))


def _train_share(settings: RunSettings, documents: float) -> float:
    """Fraction of the documents that are not held out for evaluation."""
    held_out = settings.held_out
    if held_out is None:
        return 1.0
    return 1 - (held_out if isinstance(held_out, float) else min(1.0, held_out / max(documents, 1)))


def _document_tokens(row: Row, settings: RunSettings) -> list[int]:
    """Estimated tokens of each document made from a row, with `over_length` applied."""
    try:
        count = _num_tokens(read_example(row, settings.data_format, settings.columns).example)
    except RowError:
        return []
    longest = settings.max_length
    if count <= longest or settings.over_length in ("truncate", "fail"):
        return [min(count, longest)]
    if settings.over_length == "drop":
        return []
    whole, rest = divmod(count, longest)
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
