"""Estimate of the size of the training data from samples of its files.

It is used until prepare (pipeline/data/prepare) has tokenised the data and counted it. Tokens are
estimated from the bytes of the texts, because a plan does not load the tokenizer.
"""

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
# UTF-8 bytes of content per token: an assumption. The rows of launch/quickstart/, of which half are
# JSON, have 3.2 with a vocabulary of 49 152 tokens. Plain English has more; code and most other
# languages have less.
BYTES_PER_TOKEN = 3.5
# Tokens that a chat template adds to a message: role, markers, newline (5.3 in the quickstart).
_TOKENS_PER_MESSAGE = 5


@dataclass(frozen=True, kw_only=True)
class _FileSample:
    """The documents at the beginning of a file.

    `lengths`: tokens of each document. `trained_lengths`: tokens of each document after
    `over_length` has truncated, dropped or split the documents longer than `max_length`. `share`:
    fraction of the file that was read.
    """

    lengths: list[int]
    trained_lengths: list[int]
    share: float


@dataclass(frozen=True, kw_only=True)
class _SampledSource:
    """A source of `train_data` with samples of its files.

    `samples`: the samples that have at least one document. `scale`: bytes of all files of the
    source, divided by the bytes of the files that were sampled. `is_whole`: whether all files were
    read completely.
    """

    source: DataSource
    samples: list[_FileSample]
    scale: float
    is_whole: bool

    @property
    def num_rows(self) -> float:
        """Number of rows with a document, before `limit` is applied."""
        return self.scale * sum(len(sample.lengths) / sample.share for sample in self.samples)

    @property
    def used_share(self) -> float:
        """Fraction of the rows that are used, because `limit` may be less than their number."""
        if self.source.limit is None:
            return 1.0
        return min(1.0, self.source.limit / max(self.num_rows, 1))

    def documents_per_sampled(self, sample: _FileSample) -> float:
        """Number of documents of an epoch for which each document of a sample stands."""
        return self.source.weight * self.used_share * self.scale / sample.share


def estimate(settings: RunSettings) -> DataSize | None:
    """The estimated size of the training data, from the beginnings of its files.

    At most SAMPLE_BYTES are read. The result is None if a file cannot be read, if the sample has no
    row, or if a source is on the hub. The rows of a file that is read completely are counted
    exactly; tokens are always estimated. `split_turns` is not applied.
    """
    try:
        sources = _sampled_sources(settings)
    except (OSError, EOFError, ValueError, UserError):  # ValueError: an impossible file name
        return None
    documents = tokens = 0.0
    for source in sources:
        for sample in source.samples:
            stands_for = source.documents_per_sampled(sample)
            documents += stands_for * len(sample.trained_lengths)
            tokens += stands_for * sum(sample.trained_lengths)
    train_share = _train_share(settings, sum(each.num_rows * each.used_share for each in sources))
    if round(documents * train_share) < 1:
        return None
    samples = [sample for source in sources for sample in source.samples]
    longest = max(chain.from_iterable(sample.trained_lengths for sample in samples))
    return DataSize(
        documents=round(documents * train_share),
        tokens=round(tokens * train_share),
        longest=longest if all(source.is_whole for source in sources) else None,
        is_exact=False,
        length_loss=_length_loss(settings, sources, train_share),
    )


def _length_loss(
    settings: RunSettings, sources: list[_SampledSource], train_share: float
) -> LengthLoss:
    """The estimated tokens that are lost because of `max_length`."""
    documents: defaultdict[int, float] = defaultdict(float)  # length -> number of documents
    for source in sources:
        for sample in source.samples:
            for length in sample.lengths:
                documents[length] += train_share * source.documents_per_sampled(sample)
    total = sum(length * count for length, count in documents.items())

    def kept_tokens(max_length: int) -> float:
        """Tokens that remain if longer documents are truncated, or else left out."""
        if settings.over_length == "truncate":
            return sum(min(length, max_length) * count for length, count in documents.items())
        return sum(length * count for length, count in documents.items() if length <= max_length)

    longest = max(documents)
    keeps_99 = 1 + bisect_left(range(1, longest + 1), 0.99 * total, key=kept_tokens)
    longer = sum(count for length, count in documents.items() if length > settings.max_length)
    is_split = settings.over_length == "split"
    return LengthLoss(
        documents=round(sum(documents.values())),
        longer=round(longer),
        tokens=round(total),
        lost=0 if is_split else round(total - kept_tokens(settings.max_length)),
        keeps_99=keeps_99,
        keeps_all=longest,
    )


def _sampled_sources(settings: RunSettings) -> list[_SampledSource]:
    """The sources of the training data. Raises an error if a file cannot be found or read."""
    sources = settings.train_sources
    files_by_source = [find_files(source.path, "train_data").files for source in sources]
    samples = _sample_files(files_by_source, settings)
    result = []
    for source, files in zip(sources, files_by_source, strict=True):
        sampled = [file for file in files if file in samples]
        is_whole = all(file in samples and samples[file].share == 1 for file in files)
        result.append(
            _SampledSource(
                source=source,
                samples=[samples[file] for file in sampled if samples[file].lengths],
                scale=_num_bytes(files) / _num_bytes(sampled),
                is_whole=is_whole,
            )
        )
    return result


def _sample_files(
    files_by_source: list[list[Path]], settings: RunSettings
) -> dict[Path, _FileSample]:
    """Samples of at most _MAX_FILES files of each source, SAMPLE_BYTES together.

    Small files are read completely; the other files share the remaining bytes equally.
    """
    chosen: set[Path] = set()
    for files in files_by_source:
        step = 1 + (len(files) - 1) // _MAX_FILES
        chosen.update(files[::step])
    remaining_bytes, samples = SAMPLE_BYTES, {}
    by_size = sorted(chosen, key=lambda file: (file.stat().st_size, file))
    for index, file in enumerate(by_size):
        num_unread = len(by_size) - index
        lines, share, num_bytes = sample_file(file, remaining_bytes // num_unread)
        remaining_bytes -= num_bytes
        rows = (row for row in map(parse_line, lines) if isinstance(row, Row))
        lengths = [length for row in rows for length in _document_length(row, settings)]
        trained = chain.from_iterable(_trained_lengths(length, settings) for length in lengths)
        samples[file] = _FileSample(lengths=lengths, trained_lengths=list(trained), share=share)
    return samples


def _num_bytes(files: list[Path]) -> int:
    """Total size of files in bytes, at least 1."""
    return max(1, sum(file.stat().st_size for file in files))


def _train_share(settings: RunSettings, rows: float) -> float:
    """Fraction of the rows that are not held out for evaluation."""
    held_out = settings.held_out
    if held_out is None:
        return 1.0
    if isinstance(held_out, float):  # a fraction of the rows; an int is a number of rows
        return 1 - held_out
    return 1 - min(1.0, held_out / max(rows, 1))


def _document_length(row: Row, settings: RunSettings) -> list[int]:
    """Estimated tokens of a row's document, as a list of one; empty if the row is rejected."""
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
    num_full, remainder = divmod(length, longest)
    return [longest] * num_full + ([remainder] if remainder else [])


def _num_tokens(example: Example) -> int:
    """Estimated number of tokens of an example; exact if the row has token ids."""
    num_messages = 0
    if isinstance(example, Conversation):
        texts = [message.content for message in example.messages]
        # The chat template prints these as JSON: other keys of messages (tool calls), and tools.
        values = [message.others for message in example.messages if message.others]
        values += example.tools
        texts += [json.dumps(value, ensure_ascii=False) for value in values]
        num_messages = len(example.messages)
    elif isinstance(example, Completion):
        texts = [example.prompt, example.completion]
    elif isinstance(example, Text):
        texts = [example.text]
    else:
        return len(example.ids)
    num_bytes = sum(len(text.encode()) for text in texts)
    return max(1, round(num_bytes / BYTES_PER_TOKEN)) + _TOKENS_PER_MESSAGE * num_messages
