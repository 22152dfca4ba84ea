"""Scores and their 95 % intervals."""

import math
import random

import pytest

from pipeline.evaluate import measures
from pipeline.evaluate.measures import (
    AnsweredRow,
    extract,
    is_json,
    parse_pattern,
    scores_of,
    wilson_interval,
)
from tests.messages import assert_mentions, refused

pytestmark = pytest.mark.unit


def rows_with_answers(*pairs):
    """Rows with pairs of expected and generated answer; their losses do not matter."""
    return [
        AnsweredRow(loss_sum=1.0, tokens=2, expected=expected, answer=answer)
        for expected, answer in pairs
    ]


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (7, 10, 0.3968, 0.8922), (1, 1, 0.2065, 1.0)],
)
def test_the_interval_of_a_share_is_wilson_s(successes, count, low, high):
    """The bounds are the roots p of |successes / count - p| = 1.96 sqrt(p (1 - p) / count)."""
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_of_a_share_of_no_or_of_all_rows_ends_exactly_there():
    for count in range(1, 200):
        assert wilson_interval(0, count)[0] == 0
        assert wilson_interval(count, count)[1] == 1


def test_the_interval_of_the_loss_contains_the_true_mean_in_about_95_of_100_samples():
    """All tokens of a row have the same loss, so tokens are not independent samples, but rows are.

    With 400 samples of 60 rows, the standard error of the share of hits is 1 %.
    """
    random_numbers = random.Random(0)
    num_samples, true_mean, num_hits = 400, 2.0, 0
    for _ in range(num_samples):
        rows = []
        for _ in range(60):
            tokens = random_numbers.randint(1, 30)
            loss_per_token = true_mean + random_numbers.gauss(0, 0.5)
            rows.append(AnsweredRow(loss_sum=tokens * loss_per_token, tokens=tokens))
        low, high = scores_of(rows, None)["loss_interval"]
        num_hits += low <= true_mean <= high
    assert 0.90 <= num_hits / num_samples <= 0.98


def test_the_loss_is_a_mean_over_tokens_and_the_perplexity_its_exponential():
    # The mean over rows of their losses per token would be (6 / 2 + 2 / 6) / 2, not 8 / 8.
    rows = [AnsweredRow(loss_sum=6.0, tokens=2), AnsweredRow(loss_sum=2.0, tokens=6)]
    scores = scores_of(rows, None)
    assert (scores["loss"], scores["tokens"]) == (1.0, 8)
    assert scores["perplexity"] == pytest.approx(math.e)
    low, high = scores["loss_interval"]
    assert scores["perplexity_interval"] == pytest.approx([math.exp(low), math.exp(high)])


def test_one_row_has_a_loss_without_an_interval():
    row = AnsweredRow(loss_sum=3.0, tokens=3, expected="a", answer="a")
    scores = scores_of([row], None)
    assert (scores["loss"], scores["loss_interval"]) == (1.0, None)
    assert scores["exact_match_interval"] == pytest.approx([0.2065, 1.0], abs=1e-4)


@pytest.mark.parametrize("loss", [9000.0, math.nan])
def test_a_loss_without_a_finite_exponential_has_no_perplexity(loss):
    row = AnsweredRow(loss_sum=loss, tokens=1)
    scores = scores_of([row, row], None)
    assert scores["perplexity"] is None
    assert (scores["loss_interval"] is None) == math.isnan(loss)


def test_rows_without_a_supervised_token_have_no_loss():
    assert scores_of([AnsweredRow(loss_sum=0.0, tokens=0)], None) == {}


def test_exact_match_ignores_surrounding_white_space_only():
    rows = rows_with_answers(("a b", " a b\n"), ("a b", "a  b"), ("x", ""), ("x", None))
    scores = scores_of(rows, None)
    assert scores["exact_match"] == 1 / 4  # only the first
    assert scores["exact_match_rows"] == 4


def test_rows_without_a_question_have_only_a_loss():
    row = AnsweredRow(loss_sum=1.0, tokens=2)
    scores = scores_of([row, row], parse_pattern("x"))
    assert "exact_match" not in scores
    assert "regex_match" not in scores
    assert scores["loss"] == 0.5


@pytest.mark.parametrize(
    ("pattern", "text", "value"),
    [
        (r"#### (-?[\d.,]+)", "2 + 3 = 5\n#### 5", "5"),
        (r"#### (-?[\d.,]+)", "#### 4\nno,\n#### 1,005 ", "1,005"),
        (r"\d+", "1 and 22", "22"),
        (r"(a)|b", "ab", "b"),
        (r"answer: (.*)", "answer: Zürich ✓", "Zürich ✓"),
        (r"\d+", "none", None),
        (r".*", "abc", "abc"),
        (r"-?\d*", "12 apples", "12"),
        (r"-?\d*", "none", None),
        (r"answer: (.*)", "answer: yes\nanswer: ", "yes"),
    ],
)
def test_a_pattern_extracts_the_first_group_of_its_last_match_that_has_text(pattern, text, value):
    assert extract(parse_pattern(pattern), text) == value


def test_regex_match_is_the_share_of_rows_with_equal_texts_extracted_from_both_answers():
    rows = rows_with_answers(
        ("so #### 5", "I think #### 5."),  # the only match
        ("#### 5", "5"),
        ("#### 5", "#### 6"),
        ("no number", "#### 5"),  # not counted: the pattern does not match the expected answer
    )
    scores = scores_of(rows, parse_pattern(r"#### (\d+)"))
    assert scores["regex_match"] == pytest.approx(1 / 3)
    assert scores["regex_match_rows"] == 3


def test_valid_json_is_the_share_of_rows_that_expect_json_whose_answer_is_json():
    rows = rows_with_answers(
        ("{}", ' {"a": 1}\n'),  # the only valid answer
        ("[1]", "[1"),
        ("{}", '{"a": NaN}'),
        ("yes", "{}"),  # not counted: the expected answer is no JSON
    )
    scores = scores_of(rows, None)
    assert scores["valid_json"] == pytest.approx(1 / 3)
    assert scores["valid_json_rows"] == 3


@pytest.mark.parametrize("text", ["", "5", '"a"', "{} {}", "[" * 10000, "{'a': 1}", "```{}```"])
def test_is_json_is_false_for_a_text_that_is_not_a_json_object_or_list(text):
    assert not is_json(text)


@pytest.mark.parametrize("text", ["(", "*a", "(?P<1>x)", "[z-a]"])
def test_a_pattern_that_is_not_valid_is_refused(text):
    with refused("--regex", text):
        parse_pattern(text)


def test_a_search_that_backtracks_without_end_counts_as_no_match_with_one_warning(
    monkeypatch, caplog
):
    monkeypatch.setattr(measures, "_SEARCH_TIMEOUT_S", 0.05)
    # If P is missing, all ways to divide the commas among the 20 groups are tried.
    pattern = parse_pattern("(.*?,){20}P")
    assert extract(pattern, "1," * 30 + "P") is not None
    assert [extract(pattern, "1," * 40) for _ in range(2)] == [None, None]
    (record,) = caplog.records
    assert_mentions(record.getMessage(), pattern.pattern, "0.05 s", "no match")
