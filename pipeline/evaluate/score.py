"""Scores of models on the same rows: loss, perplexity, and shares of rows with a right answer.

Each rank holds the whole model and scores some batches. It writes the result of each batch to a
file (answers.py), so that an interrupted score resumes. At the end rank 0 gathers all results.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
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
from pipeline.evaluate.model_specs import ModelSpec
from pipeline.evaluate.rows import EncodedRow, RowEncoder, digest_of, encode_rows
from pipeline.model.loss import IGNORED, SummedLoss
from pipeline.plan.cost.answers import BATCH_ROWS, EXTRA_TOKENS
from pipeline.plan.given.shape import read_shape
from pipeline.rows.examples import Example, RowError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Options of `score_models`.

    `rows`: number of rows to score. `max_new_tokens`: limit of an answer; None for the length of
    the longest expected answer plus EXTRA_TOKENS. `pattern`: extracts the part of an answer that is
    compared. `answers`: folder for the files with the results of batches.
    """

    rows: int
    max_new_tokens: int | None
    pattern: Pattern[str] | None
    answers: Path


def score_models(
    specs: Sequence[ModelSpec],
    examples: Iterable[Example | RowError],
    options: ScoreOptions,
    session: Session,
) -> dict[str, Any]:
    """Score models, and return the contents of score.json; on ranks other than 0 an empty dict.

    All ranks must call it. Raises UserError if there is no usable row.
    """
    scorers = _model_scorers(specs, examples, options, session)
    # For each model the numbers of the batches that an earlier start has scored.
    written = session.rank_zero_first(lambda: [sorted(s.read_results()) for s in scorers])
    loader = ModelLoader(session.device)
    for scorer, written_batches in zip(scorers, written, strict=True):
        remaining = [n for n in range(len(scorer.batches)) if n not in written_batches]
        if written_batches:
            logger.info(
                "%s: %d of %d batches are known from an earlier start",
                scorer.spec.name, len(written_batches), len(scorer.batches),
            )  # fmt: skip
        scorer.score_batches(remaining, session.placement, loader)
    own_results = [[asdict(result) for result in scorer.results] for scorer in scorers]
    results_of_ranks = session.gather_objects(own_results)
    if results_of_ranks is None:
        return {}
    results = []  # for each model, of all batches
    for i, scorer in enumerate(scorers):
        by_batch = scorer.read_results() if written[i] else {}
        for results_of_rank in results_of_ranks:
            by_batch |= {values["batch"]: BatchResult(**values) for values in results_of_rank[i]}
        results.append(list(by_batch.values()))
    return _summary(scorers, results, options)


class _ModelScorer:
    """Scores one model.

    `batches`: for each batch the indexes of its rows. `results`: of the batches that this rank has
    scored.
    """

    def __init__(
        self, spec: ModelSpec, rows: list[EncodedRow], file: AnswerFile, generator: Generator
    ) -> None:
        self.spec, self.rows, self.generator, self._file = spec, rows, generator, file
        self.results: list[BatchResult] = []
        prompts = [row.question.prompt if row.question else "" for row in rows]
        self.batches = generator.batches(prompts)

    def read_results(self) -> dict[int, BatchResult]:
        """The results in the answer files of all ranks, by the number of the batch."""
        return self._file.read(self.batches)

    def score_batches(
        self, remaining: Sequence[int], placement: Placement, loader: ModelLoader
    ) -> None:
        """Score this rank's share of the remaining batches; append each result to the answer file.

        Rank 0 shows the progress of its own share, because all shares are about equally large.
        """
        numbers = remaining[placement.rank :: placement.world_size]
        if not numbers:
            return
        name, num_rows = self.spec.name, sum(len(self.batches[n]) for n in remaining)
        total_units = sum(self._work_units(n) for n in numbers)
        with loader.loaded(self.spec) as model, report_out_of_memory(name):
            row_loss = _row_loss(model)
            with show_progress(f"{name}: scoring {num_rows} rows", total=total_units) as work:
                for number in numbers:
                    result = self._score_batch(number, model, row_loss, work)
                    self._file.append(result)
                    self.results.append(result)

    def _work_units(self, number: int) -> int:
        """Amount of work of a batch, for the display of progress.

        The loss of a row, the forward pass of a prompt, and the forward pass that generates the
        next token of all answers count one unit each, because they take about the same time on two
        CPU cores.
        """
        return 2 * len(self.batches[number]) + self.generator.max_new_tokens

    def _score_batch(
        self, number: int, model: Any, row_loss: Callable[[EncodedRow], float], work: Work
    ) -> BatchResult:
        start, indexes = time.perf_counter(), self.batches[number]
        units_at_end = work.done + self._work_units(number)
        loss_sums = []
        for index in indexes:
            loss_sums.append(row_loss(self.rows[index]))
            work.advance()
        questions = {i: self.rows[i].question for i in indexes}
        prompts = {i: question.prompt for i, question in questions.items() if question is not None}
        texts: list[str] = []
        if prompts:
            # Before each forward pass, the units of the pass before it are counted. The first pass
            # has all prompts, and each further pass one token of each answer.
            units = chain((0, len(prompts)), repeat(1))
            texts = self.generator.answers(
                model, list(prompts.values()), lambda: work.advance(next(units))
            )
        work.advance(units_at_end - work.done)  # answers may end before max_new_tokens
        answers = dict(zip(prompts, texts, strict=True))
        return BatchResult(
            batch=number,
            rows=indexes,
            loss_sums=loss_sums,
            answers=[answers.get(i) for i in indexes],
            seconds=time.perf_counter() - start,
        )


def _row_loss(model: Any) -> Callable[[EncodedRow], float]:
    """Function that returns the summed loss of a row's documents, each as a sequence of its own."""
    summed_loss, device = SummedLoss(model), model.device

    @torch.no_grad()
    def row_loss(row: EncodedRow) -> float:
        total = 0.0
        for document in row.documents:
            ids = torch.from_numpy(document.ids).long()[None].to(device)
            mask = torch.from_numpy(document.supervised)[None].to(device)
            labels = torch.where(mask, ids, IGNORED)
            document_lengths = ((ids.shape[1],),)  # for each sequence of the batch
            total += float(summed_loss(ids, labels, document_lengths))
        return total

    return row_loss


def _model_scorers(
    specs: Sequence[ModelSpec],
    examples: Iterable[Example | RowError],
    options: ScoreOptions,
    session: Session,
) -> list[_ModelScorer]:
    """A scorer with encoded rows for each model; a model equal to an earlier one is left out."""
    encoders: dict[str, RowEncoder] = {}
    with show_progress("encoding the rows"):
        for spec in specs:
            if (key := _encoding_key(spec)) not in encoders:
                encoders[key] = RowEncoder(spec.settings)
        encoded = encode_rows(examples, [*encoders.values()], options.rows)
    rows = dict(zip(encoders, encoded, strict=True))  # the same rows for each encoder, by its key
    _check_rows([*rows.values()], options.pattern)
    max_new_tokens = options.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = max(_longest_answer(encoders[key], rows[key]) for key in rows)
        max_new_tokens += EXTRA_TOKENS
    scorers: dict[str, _ModelScorer] = {}  # by the hash of model, rows and options
    for spec in specs:
        encoder, own_rows = encoders[_encoding_key(spec)], rows[_encoding_key(spec)]
        shape = read_shape(
            str(spec.settings.model_folder),
            trust_remote_code=spec.settings.trust_remote_code,
        )
        identity = {
            **spec.identity(),
            "rows": digest_of(own_rows),
            "max_new_tokens": max_new_tokens,
            "batch_rows": BATCH_ROWS,  # padding depends on it, and so do answers in 16 bits
            "ends": sorted(encoder.end_ids),
            "device": session.device.type,
        }
        file = AnswerFile(options.answers, identity, session.placement.rank)
        if (earlier := scorers.get(file.key)) is not None:
            logger.info("%s is the same model as %s", spec.name, earlier.spec.name)
            continue
        generator = Generator(
            tokenizer=encoder.tokenizer,
            end_ids=encoder.end_ids,
            max_new_tokens=max_new_tokens,
            max_positions=shape.max_positions,
        )
        scorers[file.key] = _ModelScorer(spec, own_rows, file, generator)
    return [*scorers.values()]


def _encoding_key(spec: ModelSpec) -> str:
    """All settings of a model as text; models with equal settings share their encoded rows."""
    return spec.settings.model_dump_json()


def _longest_answer(encoder: RowEncoder, rows: Sequence[EncodedRow]) -> int:
    """Number of tokens of the longest expected answer; 0 if no row has one."""
    texts = [row.question.expected for row in rows if row.question is not None]
    ids = encoder.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    return max(map(len, ids), default=0)


def _check_rows(
    rows_by_encoder: Sequence[Sequence[EncodedRow]], pattern: Pattern[str] | None
) -> None:
    """Check the pattern, and whether the losses of all models can be compared.

    Raises UserError if the pattern matches no expected answer. Warns if the encoders give different
    numbers of supervised tokens.
    """
    expected = [row.question.expected for row in rows_by_encoder[0] if row.question is not None]
    if pattern is not None and all(extract(pattern, text) is None for text in expected):
        raise UserError(
            f"--regex or eval_regex {pattern.pattern!r}: matches no expected answer of the rows; "
            "give another pattern with --regex, or eval_regex=null for none"
        )
    token_counts = {sum(row.tokens for row in rows) for rows in rows_by_encoder}
    if len(token_counts) > 1:
        logger.warning(
            "the models have different tokens, so their losses and perplexities, which are means "
            "over tokens, cannot be compared"
        )


def _summary(
    scorers: Sequence[_ModelScorer],
    results: Sequence[Sequence[BatchResult]],
    options: ScoreOptions,
) -> dict[str, Any]:
    """The contents of score.json. `results`: for each model the results of all its batches."""
    models: dict[str, Any] = {}  # name of a model -> its scores
    answers: dict[str, dict[int, str | None]] = {}  # name of a model -> index of a row -> answer
    for scorer, batch_results in zip(scorers, results, strict=True):
        loss_sums: dict[int, float] = {}
        texts: dict[int, str | None] = {}
        for result in batch_results:
            loss_sums |= zip(result.rows, result.loss_sums, strict=True)
            texts |= zip(result.rows, result.answers, strict=True)
        answered_rows = [
            AnsweredRow(
                loss_sum=loss_sums[i],
                tokens=row.tokens,
                expected=None if row.question is None else row.question.expected,
                answer=texts[i],
            )
            for i, row in enumerate(scorer.rows)
        ]
        scores = scores_of(answered_rows, options.pattern)
        seconds = sum(result.seconds for result in batch_results)
        models[scorer.spec.name] = scores | {"seconds": seconds}
        answers[scorer.spec.name] = texts
    rows = scorers[0].rows
    summary: dict[str, Any] = {
        "rows": len(rows),
        "max_new_tokens": scorers[0].generator.max_new_tokens,
        "regex": None if options.pattern is None else options.pattern.pattern,
    }
    adapters = [scorer.spec.adapter for scorer in scorers if scorer.spec.is_adapter_used]
    if len(adapters) == 1 and adapters[0] is not None:
        summary["adapter_sha256"] = adapter_sha256(adapters[0])
    compared = []  # a dict for each row with a prompt: its expected answer, and those of all models
    for i, row in enumerate(rows):
        if row.question is not None:
            texts_of_models = {name: texts[i] or "" for name, texts in answers.items()}
            compared.append(
                {
                    "prompt": row.question.last_user_message,
                    "expected": row.question.expected,
                    **texts_of_models,
                }
            )
    return summary | {"models": models, "answers": compared}
