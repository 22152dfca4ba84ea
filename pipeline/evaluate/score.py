"""Scores of models side by side on the same rows: loss, perplexity, and shares of right answers.

Each rank holds the whole model and scores some batches. Their results are on the disk as soon as a
batch is done (answers.py), and rank 0 gathers them. No collective is needed.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from regex import Pattern

from pipeline.adapter.trained_on import adapter_sha256
from pipeline.cluster.placement import Placement
from pipeline.cluster.progress import Work, show_progress
from pipeline.cluster.session import Session
from pipeline.errors import UserError
from pipeline.evaluate.answers import AnswerFile, BatchResult
from pipeline.evaluate.generate import Generator
from pipeline.evaluate.loading import ModelLoader, report_out_of_memory
from pipeline.evaluate.measures import AnsweredRow, extract, scores_of
from pipeline.evaluate.rows import RowEncoder, ScoredRow, digest_of, encode_rows
from pipeline.evaluate.subjects import Subject
from pipeline.model.loss import IGNORED, SummedLoss
from pipeline.plan.cost.answers import BATCH_ROWS, EXTRA_TOKENS
from pipeline.plan.given.shape import read_shape
from pipeline.rows.examples import Example, RowError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Options of `score_models`.

    `max_new_tokens`: None for the length of the longest expected answer plus EXTRA_TOKENS.
    `pattern`: extracts the part of an answer that is compared. `answers`: folder for the results of
    batches.
    """

    rows: int
    max_new_tokens: int | None
    pattern: Pattern[str] | None
    answers: Path


def score_models(
    subjects: Sequence[Subject],
    examples: Iterable[Example | RowError],
    options: ScoreOptions,
    session: Session,
) -> dict[str, Any]:
    """The contents of score.json; on ranks other than 0, empty. All ranks must call it.

    Raises UserError if there is no usable row.
    """
    scorings = _scorings(subjects, examples, options, session)
    known = session.rank_zero_first(lambda: [sorted(each.known()) for each in scorings])
    loader = ModelLoader(session.device)
    for scoring, done in zip(scorings, known, strict=True):
        remaining = [n for n in range(len(scoring.batches)) if n not in done]
        if len(remaining) < len(scoring.batches):
            logger.info(
                "%s: %d of %d batches are known from an earlier start",
                scoring.subject.name, len(done), len(scoring.batches),
            )  # fmt: skip
        scoring.run(remaining, session.placement, loader)
    gathered = session.gather_objects([[asdict(r) for r in s.results] for s in scorings])
    if gathered is None:
        return {}
    results = []
    for number, scoring in enumerate(scorings):
        by_batch = scoring.known() if known[number] else {}
        by_batch |= {r["batch"]: BatchResult(**r) for of_rank in gathered for r in of_rank[number]}
        results.append(list(by_batch.values()))
    return _summary(scorings, results, options)


class _Scoring:
    """The measurement of one model: its rows, batches, and the results of this rank."""

    def __init__(
        self, subject: Subject, rows: list[ScoredRow], file: AnswerFile, generator: Generator
    ) -> None:
        self.subject, self.rows, self.generator, self._file = subject, rows, generator, file
        self.results: list[BatchResult] = []
        prompts = [row.question.prompt if row.question else "" for row in rows]
        self.batches = generator.batches(prompts)

    def known(self) -> dict[int, BatchResult]:
        """The results on the disk, by the number of the batch."""
        return self._file.read(self.batches)

    def run(self, remaining: Sequence[int], placement: Placement, loader: ModelLoader) -> None:
        """Score this rank's part of the remaining batches; append each result to the answer file.

        Rank 0 shows the progress of its own part, which is as large as those of the others.
        """
        numbers = remaining[placement.rank :: placement.world_size]
        if not numbers:
            return
        name, count = self.subject.name, sum(len(self.batches[n]) for n in remaining)
        total = sum(self._size_of(n) for n in numbers)
        with loader.loaded(self.subject) as model, report_out_of_memory(name):
            loss_of = _document_loss(model)
            with show_progress(f"{name}: scoring {count} rows", total=total) as work:
                for number in numbers:
                    result = self._score_batch(number, model, loss_of, work)
                    self._file.append(result)
                    self.results.append(result)

    def _size_of(self, number: int) -> int:
        """Work of a batch: one unit for the loss of a row, a prompt, and a token of all answers.

        On two CPU cores these three take about the same time.
        """
        return 2 * len(self.batches[number]) + self.generator.max_new_tokens

    def _score_batch(
        self, number: int, model: Any, loss_of: Callable[[ScoredRow], float], work: Work
    ) -> BatchResult:
        start, indexes, done = time.perf_counter(), self.batches[number], work.done
        losses = []
        for index in indexes:
            losses.append(loss_of(self.rows[index]))
            work.advance()
        asked = {i: q.prompt for i in indexes if (q := self.rows[i].question) is not None}
        texts: list[str] = []
        if asked:
            # The first forward pass has all prompts, each further one a token of each answer.
            finished = chain((0, len(asked)), repeat(1))
            texts = self.generator.answers(
                model, list(asked.values()), lambda: work.advance(next(finished))
            )
        work.advance(done + self._size_of(number) - work.done)
        answers = dict(zip(asked, texts, strict=True))
        return BatchResult(
            batch=number,
            rows=indexes,
            loss_sums=losses,
            answers=[answers.get(i) for i in indexes],
            seconds=time.perf_counter() - start,
        )


def _document_loss(model: Any) -> Callable[[ScoredRow], float]:
    """Function for the summed loss of a row, whose documents are separate sequences."""
    summed, device = SummedLoss(model), model.device

    @torch.no_grad()
    def loss_of(row: ScoredRow) -> float:
        total = 0.0
        for document in row.documents:
            ids = torch.from_numpy(document.ids).long()[None].to(device)
            mask = torch.from_numpy(document.supervised)[None].to(device)
            labels = torch.where(mask, ids, IGNORED)
            total += float(summed(ids, labels, ((ids.shape[1],),)))
        return total

    return loss_of


def _scorings(
    subjects: Sequence[Subject],
    examples: Iterable[Example | RowError],
    options: ScoreOptions,
    session: Session,
) -> list[_Scoring]:
    """One measurement, with its encoded rows, for each model that differs from those before it."""
    encoders: dict[str, RowEncoder] = {}
    with show_progress("encoding the rows"):
        for subject in subjects:
            if (key := _encoding_key(subject)) not in encoders:
                encoders[key] = RowEncoder(subject.settings)
        encoded = encode_rows(examples, [*encoders.values()], options.rows)
    rows = dict(zip(encoders, encoded, strict=True))
    _check_rows([*rows.values()], options.pattern)
    max_new_tokens = options.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = max(_longest_answer(encoders[key], rows[key]) for key in rows)
        max_new_tokens += EXTRA_TOKENS
    scorings: dict[str, _Scoring] = {}
    for subject in subjects:
        encoder, own_rows = encoders[_encoding_key(subject)], rows[_encoding_key(subject)]
        shape = read_shape(
            str(subject.settings.model_folder),
            trust_remote_code=subject.settings.trust_remote_code,
        )
        identity = {
            **subject.identity(),
            "rows": digest_of(own_rows),
            "max_new_tokens": max_new_tokens,
            "batch_rows": BATCH_ROWS,
            "ends": sorted(encoder.ends),
            "device": session.device.type,
        }
        file = AnswerFile(options.answers, identity, session.placement.rank)
        if (other := scorings.get(file.key)) is not None:
            logger.info("%s is the same model as %s", subject.name, other.subject.name)
            continue
        generator = Generator(
            tokenizer=encoder.tokenizer,
            ends=encoder.ends,
            max_new_tokens=max_new_tokens,
            max_positions=shape.max_positions,
        )
        scorings[file.key] = _Scoring(subject, own_rows, file, generator)
    return [*scorings.values()]


def _encoding_key(subject: Subject) -> str:
    return subject.settings.model_dump_json()


def _longest_answer(encoder: RowEncoder, rows: Sequence[ScoredRow]) -> int:
    texts = [row.question.expected for row in rows if row.question is not None]
    ids = encoder.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    return max(map(len, ids), default=0)


def _check_rows(rows: Sequence[Sequence[ScoredRow]], pattern: Pattern[str] | None) -> None:
    """Check the expected answers, and whether the losses of all models can be compared."""
    expected = [row.question.expected for row in rows[0] if row.question is not None]
    if pattern is not None and all(extract(pattern, text) is None for text in expected):
        raise UserError(
            f"--regex or eval_regex {pattern.pattern!r}: matches no expected answer of the rows; "
            "give another pattern with --regex, or eval_regex=null for none"
        )
    if len({sum(row.tokens for row in of_encoder) for of_encoder in rows}) > 1:
        logger.warning(
            "the models have different tokens, so their losses and perplexities, which are means "
            "over tokens, cannot be compared"
        )


def _summary(
    scorings: Sequence[_Scoring], results: Sequence[Sequence[BatchResult]], options: ScoreOptions
) -> dict[str, Any]:
    """The contents of score.json."""
    rows = scorings[0].rows
    models: dict[str, Any] = {}
    answers: dict[str, list[str | None]] = {}
    for scoring, of_model in zip(scorings, results, strict=True):
        losses: Mapping[int, float] = {
            i: x for r in of_model for i, x in zip(r.rows, r.loss_sums, strict=True)
        }
        texts = {i: x for r in of_model for i, x in zip(r.rows, r.answers, strict=True)}
        name = scoring.subject.name
        answers[name] = [texts[i] for i in range(len(rows))]
        answered = [
            AnsweredRow(losses[i], row.tokens, _expected(row), texts[i])
            for i, row in enumerate(scoring.rows)
        ]
        scores = scores_of(answered, options.pattern)
        models[name] = scores | {"seconds": sum(r.seconds for r in of_model)}
    questions = {i: row.question for i, row in enumerate(rows)}
    used = [each.subject.adapter for each in scorings if each.subject.is_adapter_used]
    summary: dict[str, Any] = {
        "rows": len(rows),
        "max_new_tokens": scorings[0].generator.max_new_tokens,
        "regex": None if options.pattern is None else options.pattern.pattern,
    }
    if len(used) == 1 and used[0] is not None:
        summary["adapter_sha256"] = adapter_sha256(used[0])
    return summary | {
        "models": models,
        "answers": [
            {"prompt": question.last_user_message, "expected": question.expected}
            | {name: texts[i] or "" for name, texts in answers.items()}
            for i, question in questions.items()
            if question is not None
        ],
    }


def _expected(row: ScoredRow) -> str | None:
    return None if row.question is None else row.question.expected
