"""Held-out questions that are answered at each evaluation (setting `eval_generate`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from pipeline.cluster.placement import Placement
from pipeline.cluster.session import Session
from pipeline.data.dataset.reader import DataIndex, SplitIndex
from pipeline.data.prepare.prepare import eval_examples
from pipeline.errors import UserError
from pipeline.evaluate.generate import Generator
from pipeline.evaluate.measures import AnsweredRow, parse_pattern, scores_of
from pipeline.evaluate.rows import RowEncoder
from pipeline.plan.cost.answers import EXTRA_TOKENS
from pipeline.plan.plan import Plan
from pipeline.rows.examples import RowError


@dataclass(frozen=True, kw_only=True)
class HeldOutQuestions:
    """Prompts and expected answers, in batches that do not depend on the number of ranks.

    `batches`: indices into `prompts` and `expected`. `pattern`: the setting `eval_regex`.
    """

    prompts: Sequence[str]
    expected: Sequence[str]
    generator: Generator
    batches: Sequence[Sequence[int]]
    pattern: regex.Pattern[str] | None

    def batches_of_rank(self, placement: Placement) -> Iterator[Sequence[int]]:
        """The batches of a rank; equally many on all ranks, so some may be empty."""
        for first in range(0, len(self.batches), placement.world_size):
            index = first + placement.rank
            yield self.batches[index] if index < len(self.batches) else ()

    def scores(self, answers: Sequence[tuple[int, str]]) -> dict[str, Any]:
        """The scores of all answers, given as pairs of the question's index and the text."""
        rows = [
            AnsweredRow(loss_sum=0.0, tokens=0, expected=self.expected[i], answer=text)
            for i, text in answers
        ]
        return scores_of(rows, self.pattern)


def held_out_questions(plan: Plan, index: DataIndex, session: Session) -> HeldOutQuestions | None:
    """The first `eval_generate` questions of the held-out rows; None without this setting.

    A question is a prompt and its expected answer. Collective. Raises UserError if no question fits
    into the model's longest sequence.
    """
    settings, held_out = plan.settings, index.eval
    if settings.eval_generate is None or held_out is None:
        return None
    encoder = RowEncoder(settings)
    pairs = session.rank_zero_first(lambda: _prompts_and_answers(plan, held_out, encoder))
    prompts, expected = zip(*pairs, strict=True)
    generator = Generator(
        tokenizer=encoder.tokenizer,
        end_ids=encoder.end_ids,
        max_new_tokens=max(map(encoder.num_tokens, expected)) + EXTRA_TOKENS,
        max_positions=plan.shape.max_positions,
    )
    return HeldOutQuestions(
        prompts=prompts,
        expected=expected,
        generator=generator,
        batches=generator.batches(prompts),
        pattern=None if settings.eval_regex is None else parse_pattern(settings.eval_regex),
    )


def _prompts_and_answers(plan: Plan, held_out: SplitIndex, encoder: RowEncoder) -> list[list[str]]:
    """Prompt and expected answer of each of the first rows that fit into the longest sequence."""
    settings, limit = plan.settings, plan.shape.max_positions
    pairs: list[list[str]] = []
    for example in eval_examples(settings, held_out):
        if len(pairs) == settings.eval_generate:
            break
        try:
            question = encoder.encode(example).question
        except RowError:
            continue  # prepare rejected and counted this row
        if question is None:
            continue
        size = encoder.num_tokens(question.prompt) + encoder.num_tokens(question.expected)
        if limit is None or size + EXTRA_TOKENS < limit:
            pairs.append([question.prompt, question.expected])
    if not pairs:
        raise UserError(
            "eval_generate: no held-out row has a prompt with an answer that fits into the model; "
            "remove the setting, or hold out other rows (eval_data)"
        )
    return pairs
