"""Scores of answers with 95 % intervals: loss, perplexity, and shares of rows. Pure, no torch.

The interval of a share is Wilson's score interval. The interval of a loss is a normal approximation
over rows: the loss is a ratio of two sums over rows (loss and supervised tokens), and the variance
of a ratio is that of its linearisation, so tokens of one row are not treated as independent. The
bounds of the perplexity are the exponentials of those of the loss.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import regex

from pipeline.errors import UserError

logger = logging.getLogger(__name__)
# A pattern such as (a+)+$ backtracks without end on some texts.
_SEARCH_TIMEOUT_S = 1.0
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
Interval = tuple[float, float]


@dataclass(frozen=True)
class AnsweredRow:
    """A row with the results of one model. `loss_sum`: over its supervised tokens.

    `expected` and `answer`: None if the row has no question, such as a text without a prompt.
    """

    loss_sum: float
    tokens: int
    expected: str | None = None
    answer: str | None = None


def parse_pattern(text: str) -> regex.Pattern[str]:
    """Compile a regular expression of the user. Raises UserError if it is not valid."""
    try:
        return regex.compile(text)
    except (regex.error, RecursionError, OverflowError) as error:
        raise UserError(f"--regex {text!r}: not a regular expression: {error}") from None


def extract(pattern: regex.Pattern[str], text: str) -> str | None:
    """The first group (or else the whole) of the last match in a text; None without a match.

    A match that extracts no text does not count: `.*` also matches the empty end of every text. A
    search that exceeds the time limit counts as no match, with a warning.
    """
    try:
        matches = [*pattern.finditer(text, timeout=_SEARCH_TIMEOUT_S)]
    except TimeoutError:
        _warn_of_slow_search(pattern.pattern)
        return None
    texts = (m[1] if pattern.groups and m[1] is not None else m[0] for m in matches)
    extracted = [stripped for each in texts if (stripped := each.strip())]
    return extracted[-1] if extracted else None


@cache  # once for each pattern
def _warn_of_slow_search(pattern: str) -> None:
    logger.warning(
        "regular expression %r: a search in a text took longer than %g s and counts as no match; "
        "write the pattern without nested repetitions such as (a+)+",
        pattern, _SEARCH_TIMEOUT_S,
    )  # fmt: skip


def scores_of(rows: Sequence[AnsweredRow], pattern: regex.Pattern[str] | None) -> dict[str, Any]:
    """All scores of a model, each with `NAME_interval`, and the number of rows of each share.

    A score that the rows do not have is absent. `valid_json` counts only rows whose expected answer
    is a JSON object or list, and `regex_match` only rows whose expected answer has a match.
    """
    scores = _loss_scores(rows)
    pairs = [(row.expected, row.answer) for row in rows if row.expected is not None]
    answered = [(expected, answer or "") for expected, answer in pairs]
    exact = [expected.strip() == answer.strip() for expected, answer in answered]
    valid = [is_json(answer) for expected, answer in answered if is_json(expected)]
    scores |= _share("exact_match", exact) | _share("valid_json", valid)
    if pattern is not None:
        expected = [(extract(pattern, text), answer) for text, answer in answered]
        matches = [
            extract(pattern, answer) == value for value, answer in expected if value is not None
        ]
        scores |= _share("regex_match", matches)
    return scores


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or list, and nothing else but white space around it."""
    if text.strip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")  # Python's parser accepts NaN and Infinity


def _share(name: str, outcomes: Sequence[bool]) -> dict[str, Any]:
    if not outcomes:
        return {}
    count, successes = len(outcomes), sum(outcomes)
    interval = wilson_interval(successes, count)
    return {
        name: successes / count,
        f"{name}_interval": list(interval),
        f"{name}_rows": count,
    }


def wilson_interval(successes: int, count: int) -> Interval:
    """Wilson's 95 % score interval of a share."""
    share, square = successes / count, _Z**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    half /= 1 + square / count
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == count else centre + half


def _loss_scores(rows: Sequence[AnsweredRow]) -> dict[str, Any]:
    tokens = sum(row.tokens for row in rows)
    if not tokens:
        return {}
    loss = sum(row.loss_sum for row in rows) / tokens
    scores: dict[str, Any] = {"loss": loss, "loss_interval": None}
    scores |= {"perplexity": _exp(loss), "perplexity_interval": None, "tokens": tokens}
    if len(rows) > 1 and math.isfinite(loss):  # one row has no variance
        squares = sum((row.loss_sum - loss * row.tokens) ** 2 for row in rows)
        error = math.sqrt(squares * len(rows) / (len(rows) - 1)) / tokens
        bounds = [loss - _Z * error, loss + _Z * error]
        scores["loss_interval"] = bounds
        scores["perplexity_interval"] = [_exp(bound) for bound in bounds]
    return scores


def _exp(value: float) -> float | None:
    """The exponential; None if it is no finite number, which JSON does not have."""
    try:
        return math.exp(value) if math.isfinite(value) else None
    except OverflowError:
        return None
