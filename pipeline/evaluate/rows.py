"""Rows on which models are scored: their documents, for the loss, and their questions.

Documents are those of training: rendered with the run's chat template, and cut at `max_length`.
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
from pipeline.rows.sources import read_lines, resolve_sources

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A held-out prompt and its expected answer."""

    prompt: str  # rendered with the chat template
    last_user_message: str  # shown in reports instead of the whole prompt
    expected: str


@dataclass(frozen=True)
class ScoredRow:
    """A row as one tokenizer encodes it. `documents`: those of training, for the loss.

    `question`: None if the row has no prompt with an answer. `is_cut`: whether the documents end
    before the row does, at `max_length`.
    """

    documents: tuple[Window, ...]
    question: Question | None
    is_cut: bool

    @property
    def tokens(self) -> int:
        """Number of supervised tokens."""
        return sum(int(document.supervised.sum()) for document in self.documents)


def question_of(example: Example, encoder: Encoder) -> Question:
    """Split an example into a prompt and its last answer, which is the expected one.

    Raises RowError if the example has no prompt with an answer.
    """
    prompt, expected = encoder.last_answer(example)
    if not prompt:
        raise RowError("the prompt is empty")
    if not isinstance(example, Conversation):
        return Question(prompt, prompt, expected)
    last_user = (m.content for m in reversed(example.messages) if m.role == "user")
    return Question(prompt, next(last_user, ""), expected)


class RowEncoder:
    """Tokenizer and chat template of a model, which encode examples as in training."""

    def __init__(self, settings: RunSettings) -> None:
        self.tokenizer: Any = run_tokenizer(settings)
        self._encoder = Encoder(self.tokenizer, settings)
        self._settings = settings
        self.ends = self._encoder.ends

    def encode(self, example: Example) -> ScoredRow:
        """Encode an example. Raises RowError if training would not use it."""
        length, over_length = self._settings.max_length, self._settings.over_length
        documents, is_cut = [], False
        for document in self._encoder.encode(example):
            size = len(document.ids)
            if over_length in ("fail", "drop") and size > length:
                raise RowError(
                    f"longer than max_length ({length}), and over_length is not truncate"
                )
            is_cut |= size > length and over_length == "truncate"
            documents += windows(document.ids, document.supervised, length, over_length)
        if not documents:
            raise RowError("no supervised token")
        try:
            question = question_of(example, self._encoder)
        except RowError:
            question = None
        return ScoredRow(tuple(documents), question, is_cut)

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
    """The examples of `--data`, and an error in the place of each row that cannot be read."""
    for source in resolve_sources([DataSource(path=path)], "--data"):
        for line in read_lines(source):
            _, read = read_line(line, settings)
            yield RowError(read) if isinstance(read, str) else read.example


def encode_rows(
    examples: Iterable[Example | RowError], encoders: Sequence[RowEncoder], limit: int
) -> list[list[ScoredRow]]:
    """The first `limit` rows that every encoder can encode; for each encoder the list of its rows.

    Logs how many rows before the last one were skipped, with the reasons. Raises UserError if no
    row can be encoded.
    """
    rows: list[list[ScoredRow]] = [[] for _ in encoders]
    rejected: Counter[str] = Counter()
    for example in examples:
        try:
            if isinstance(example, RowError):
                raise example
            encoded = [encoder.encode(example) for encoder in encoders]
        except RowError as error:
            rejected[str(error)] += 1
            continue
        for of_encoder, row in zip(rows, encoded, strict=True):
            of_encoder.append(row)
        if rows and len(rows[0]) == limit:
            break
    if rejected:
        logger.info("%d rows skipped (%s)", rejected.total(), _reasons(rejected))
    if not rows[0]:
        reasons = f" ({_reasons(rejected)})" if rejected else ""
        raise UserError(f"there is no usable row to score on{reasons}")
    if num_cut := sum(row.is_cut for row in rows[0]):
        logger.info(
            "%d of %d rows are longer than max_length: their loss is that of the first tokens",
            num_cut, len(rows[0]),
        )  # fmt: skip
    return rows


def digest_of(rows: Sequence[ScoredRow]) -> str:
    """SHA-256 of token ids, loss masks, prompts and expected answers."""
    digest = hashlib.sha256()
    for row in rows:
        question = row.question
        texts = None if question is None else [question.prompt, question.expected]
        sizes = [len(document.ids) for document in row.documents]
        digest.update(json.dumps([texts, sizes]).encode())
        for document in row.documents:
            digest.update(document.ids.tobytes())
            digest.update(document.supervised.tobytes())
    return digest.hexdigest()


def _reasons(rejected: Counter[str]) -> str:
    return "; ".join(f"{count}: {reason}" for reason, count in rejected.most_common(3))
