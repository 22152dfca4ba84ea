"""Scores of a model with 95 % intervals: loss, perplexity, and shares of rows, such as exact match.

The interval of a share is Wilson's score interval. The interval of the loss is a normal
approximation. The loss is a ratio of two sums over rows: the losses, and the numbers of supervised
tokens. The variance of the ratio is computed from its linearisation, with rows as independent
samples, because the tokens of one row are not independent. The bounds of the perplexity are the
exponentials of the bounds of the loss.
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
# Time limit of a search, because a pattern such as (a+)+$ backtracks almost forever on some texts.
_SEARCH_TIMEOUT_S = 1.0
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
Interval = tuple[float, float]  # lower and upper bound


@dataclass(frozen=True)
class AnsweredRow:
    """A row with the results of one model.

    `tokens`: number of supervised tokens. `loss_sum`: sum of their losses. `expected` and `answer`:
    None if the row has no question, such as a text without a prompt.
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
    for match in reversed(matches):
        has_group = pattern.groups > 0 and match[1] is not None
        text_of_match = (match[1] if has_group else match[0]).strip()
        if text_of_match:
            return str(text_of_match)
    return None


@cache  # once for each pattern
def _warn_of_slow_search(pattern: str) -> None:
    logger.warning(
        "regular expression %r: a search in a text took longer than %g s and counts as no match; "
        "write the pattern without nested repetitions such as (a+)+",
        pattern, _SEARCH_TIMEOUT_S,
    )  # fmt: skip


def scores_of(rows: Sequence[AnsweredRow], pattern: regex.Pattern[str] | None) -> dict[str, Any]:
    """All scores of a model: for each NAME also NAME_interval, and for a share NAME_rows.

    NAME_rows is the number of rows of which the score is a share. Scores that cannot be computed
    from the rows are absent. `valid_json` is a share of the rows whose expected answer is a JSON
    object or list; `regex_match` is a share of the rows whose expected answer has a match of the
    pattern.
    """
    scores = _loss_scores(rows)
    # For each row that the share is a share of: whether the answer is right.
    exact_match: list[bool] = []
    valid_json: list[bool] = []
    regex_match: list[bool] = []
    for row in rows:
        if row.expected is None:
            continue
        answer = row.answer or ""
        exact_match.append(answer.strip() == row.expected.strip())
        if is_json(row.expected):
            valid_json.append(is_json(answer))
        if pattern is not None and (expected := extract(pattern, row.expected)) is not None:
            regex_match.append(extract(pattern, answer) == expected)
    scores |= _share("exact_match", exact_match) | _share("valid_json", valid_json)
    return scores | _share("regex_match", regex_match)


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or list, apart from white space around it."""
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
    """The share of true outcomes with its interval and number of rows; empty without outcomes."""
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
    half_width = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    half_width /= 1 + square / count
    # The exact bounds 0 and 1, without rounding errors.
    low = 0.0 if successes == 0 else centre - half_width
    return low, 1.0 if successes == count else centre + half_width


def _loss_scores(rows: Sequence[AnsweredRow]) -> dict[str, Any]:
    """Loss and perplexity with their intervals, and the number of supervised tokens."""
    num_tokens = sum(row.tokens for row in rows)
    if not num_tokens:
        return {}
    loss = sum(row.loss_sum for row in rows) / num_tokens
    scores: dict[str, Any] = {"loss": loss, "loss_interval": None}
    scores |= {"perplexity": _exp(loss), "perplexity_interval": None, "tokens": num_tokens}
    if len(rows) > 1 and math.isfinite(loss):  # one row has no variance
        squared_residuals = sum((row.loss_sum - loss * row.tokens) ** 2 for row in rows)
        standard_error = math.sqrt(squared_residuals * len(rows) / (len(rows) - 1)) / num_tokens
        bounds = [loss - _Z * standard_error, loss + _Z * standard_error]
        scores["loss_interval"] = bounds
        scores["perplexity_interval"] = [_exp(bound) for bound in bounds]
    return scores


def _exp(value: float) -> float | None:
    """The exponential; None if it is not finite, which JSON does not have."""
    try:
        return math.exp(value) if math.isfinite(value) else None
    except OverflowError:
        return None
