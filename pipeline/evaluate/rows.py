"""Rows on which models are scored: documents for the loss, and prompts with expected answers.

The documents are the same as in training: rendered with the run's chat template, and truncated at
`max_length`. A question is a prompt, which ends before the last answer of the row, and this answer.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.data_names import DataSource
from pipeline.config.settings import RunSettings
from pipeline.data.chat.encoder import Encoder
from pipeline.data.chat.tokenizer import run_tokenizer
from pipeline.data.dataset.reader import DataIndex
from pipeline.data.prepare.lines import read_line
from pipeline.data.prepare.prepare import eval_examples
from pipeline.data.prepare.truncation import Window, windows
from pipeline.errors import UserError
from pipeline.rows.examples import Conversation, Example, RowError
from pipeline.rows.sources import Source, read_lines, resolve_sources

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A held-out prompt and its expected answer."""

    prompt: str  # rendered with the chat template
    last_user_message: str  # shown in reports instead of the whole prompt
    expected: str


@dataclass(frozen=True)
class EncodedRow:
    """A row, encoded with the tokenizer of one model.

    `documents`: token ids and loss mask of each document that training would make of the row.
    `question`: None if the row has no prompt with an answer. `is_truncated`: whether a document was
    truncated at `max_length`.
    """

    documents: tuple[Window, ...]
    question: Question | None
    is_truncated: bool

    @property
    def tokens(self) -> int:
        """Number of supervised tokens."""
        return sum(int(document.supervised.sum()) for document in self.documents)


def question_of(example: Example, encoder: Encoder) -> Question:
    """Split an example into a prompt and its last answer, which is the expected answer.

    Raises RowError if the example has no prompt with an answer.
    """
    prompt, expected = encoder.last_answer(example)
    if not prompt:
        raise RowError("the prompt is empty")
    if not isinstance(example, Conversation):
        return Question(prompt, prompt, expected)
    user_messages = [message.content for message in example.messages if message.role == "user"]
    return Question(prompt, user_messages[-1] if user_messages else "", expected)


class RowEncoder:
    """Tokenizer and chat template of a model, which encode examples as in training.

    `end_ids`: ids of the tokens that end an answer.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.tokenizer: Any = run_tokenizer(settings)
        self._encoder = Encoder(self.tokenizer, settings)
        self._settings = settings
        self.end_ids = self._encoder.end_ids

    def encode(self, example: Example) -> EncodedRow:
        """Encode an example. Raises RowError if training would not use it."""
        max_length, over_length = self._settings.max_length, self._settings.over_length
        documents, is_truncated = [], False
        for document in self._encoder.encode(example):
            is_too_long = len(document.ids) > max_length
            if is_too_long and over_length in ("fail", "drop"):
                raise RowError(
                    f"longer than max_length ({max_length}), and over_length is not truncate"
                )
            is_truncated |= is_too_long and over_length == "truncate"
            # A document longer than max_length is truncated or split.
            documents += windows(document.ids, document.supervised, max_length, over_length)
        if not documents:
            raise RowError("no supervised token")
        try:
            question = question_of(example, self._encoder)
        except RowError:
            question = None
        return EncodedRow(tuple(documents), question, is_truncated)

    def prompt_of(self, example: Example) -> str:
        """The prompt of the last answer of an example. Raises RowError if it has none."""
        return question_of(example, self._encoder).prompt

    def num_tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)


def held_out_examples(run_folder: Path, settings: RunSettings) -> Iterator[Example]:
    """The examples of a run's held-out rows. Raises UserError if the run has none."""
    index = None if settings.eval_data is None else DataIndex.load(run_folder / "data").eval
    if index is None:
        raise UserError(f"{run_folder}: the run has no eval_data; name rows with --data FILE")
    return eval_examples(settings, index)


def examples_of_file(path: str, settings: RunSettings) -> Iterator[Example | RowError]:
    """The examples in the file of `--data`; for a row that cannot be read, a RowError instead.

    Raises UserError at once if there is no such file.
    """
    sources = resolve_sources([DataSource(path=path)], "--data")
    return _examples_of(sources, settings)


def _examples_of(sources: Sequence[Source], settings: RunSettings) -> Iterator[Example | RowError]:
    for source in sources:
        for line in read_lines(source):
            _, example_or_reason = read_line(line, settings)
            if isinstance(example_or_reason, str):
                yield RowError(example_or_reason)
            else:
                yield example_or_reason.example


def encode_rows(
    examples: Iterable[Example | RowError], encoders: Sequence[RowEncoder], limit: int
) -> list[list[EncodedRow]]:
    """Encode the first `limit` rows that every encoder can encode; a list for each encoder.

    Logs how many rows were skipped until `limit` was reached, with the reasons. Raises UserError if
    no row can be encoded.
    """
    rows: list[list[EncodedRow]] = [[] for _ in encoders]
    rejected: Counter[str] = Counter()
    for example in examples:
        try:
            if isinstance(example, RowError):
                raise example
            encoded = [encoder.encode(example) for encoder in encoders]
        except RowError as error:
            rejected[str(error)] += 1
            continue
        for encoder_rows, row in zip(rows, encoded, strict=True):
            encoder_rows.append(row)
        if rows and len(rows[0]) == limit:
            break
    if rejected:
        logger.info("%d rows skipped (%s)", rejected.total(), _reasons(rejected))
    if not rows[0]:
        reasons = f" ({_reasons(rejected)})" if rejected else ""
        raise UserError(f"there is no usable row to score on{reasons}")
    if num_truncated := sum(row.is_truncated for row in rows[0]):
        logger.info(
            "%d of %d rows are longer than max_length: their loss is that of the first tokens",
            num_truncated, len(rows[0]),
        )  # fmt: skip
    return rows


def digest_of(rows: Sequence[EncodedRow]) -> str:
    """SHA-256 of the rows' token ids, loss masks, prompts and expected answers."""
    digest = hashlib.sha256()
    for row in rows:
        question = row.question
        texts = None if question is None else [question.prompt, question.expected]
        lengths = [len(document.ids) for document in row.documents]
        digest.update(json.dumps([texts, lengths]).encode())
        for document in row.documents:
            digest.update(document.ids.tobytes())
            digest.update(document.supervised.tobytes())
    return digest.hexdigest()


def _reasons(rejected: Counter[str]) -> str:
    """The most frequent reasons as text, e.g. `12: no supervised token; 3: the prompt is empty`."""
    return "; ".join(f"{count}: {reason}" for reason, count in rejected.most_common(3))
