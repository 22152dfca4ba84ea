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


def answered(*pairs):
    return [AnsweredRow(1.0, 2, expected, answer) for expected, answer in pairs]


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (7, 10, 0.3968, 0.8922), (1, 1, 0.2065, 1.0)],
)
def test_the_interval_of_a_share_is_wilson_s(successes, count, low, high):
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_of_the_loss_contains_the_true_mean_in_about_95_of_100_samples():
    """Tokens of a row are strongly correlated, which an interval over tokens would ignore."""
    draw, hits = random.Random(0), 0
    for _ in range(400):
        rows = []
        for _ in range(60):
            tokens = draw.randint(1, 30)
            rows.append(AnsweredRow(tokens * (2 + draw.gauss(0, 0.5)), tokens))
        low, high = scores_of(rows, None)["loss_interval"]
        hits += low <= 2 <= high
    assert 0.90 <= hits / 400 <= 0.98


def test_the_loss_is_a_mean_over_tokens_and_the_perplexity_its_exponential():
    scores = scores_of([AnsweredRow(6.0, 2), AnsweredRow(2.0, 6)], None)
    assert (scores["loss"], scores["tokens"]) == (1.0, 8)
    assert scores["perplexity"] == pytest.approx(math.e)
    low, high = scores["loss_interval"]
    assert scores["perplexity_interval"] == pytest.approx([math.exp(low), math.exp(high)])


def test_one_row_has_a_loss_without_an_interval():
    scores = scores_of([AnsweredRow(3.0, 3, "a", "a")], None)
    assert (scores["loss"], scores["loss_interval"]) == (1.0, None)
    assert scores["exact_match_interval"] == pytest.approx([0.2065, 1.0], abs=1e-4)


def test_a_loss_without_a_finite_exponential_has_no_perplexity():
    assert scores_of([AnsweredRow(9000.0, 1), AnsweredRow(9000.0, 1)], None)["perplexity"] is None
    assert scores_of([AnsweredRow(math.nan, 1)] * 2, None)["perplexity"] is None


def test_exact_match_ignores_surrounding_white_space_only():
    scores = scores_of(answered(("a b", " a b\n"), ("a b", "a  b"), ("x", ""), ("x", None)), None)
    assert (scores["exact_match"], scores["exact_match_rows"]) == (0.25, 4)


def test_rows_without_a_question_have_only_a_loss():
    scores = scores_of([AnsweredRow(1.0, 2), AnsweredRow(1.0, 2)], parse_pattern("x"))
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


def test_a_regex_compares_what_it_extracts_from_both_texts():
    rows = answered(("so #### 5", "I think #### 5."), ("#### 5", "5"), ("#### 5", "#### 6"))
    scores = scores_of([*rows, *answered(("no number", "#### 5"))], parse_pattern(r"#### (\d+)"))
    assert scores["regex_match"] == pytest.approx(1 / 3)
    assert scores["regex_match_rows"] == 3  # of the rows whose expected answer has a match


def test_json_validity_is_counted_over_rows_that_expect_json():
    rows = answered(("{}", ' {"a": 1}\n'), ("[1]", "[1"), ("{}", '{"a": NaN}'), ("yes", "{}"))
    scores = scores_of(rows, None)
    assert (scores["valid_json_rows"], scores["valid_json"]) == (3, pytest.approx(1 / 3))


@pytest.mark.parametrize("text", ["", "5", '"a"', "{} {}", "[" * 10000, "{'a': 1}", "```{}```"])
def test_texts_that_are_no_json_object_or_list(text):
    assert not is_json(text)


@pytest.mark.parametrize("text", ["(", "*a", "(?P<1>x)", "[z-a]"])
def test_a_pattern_that_is_not_valid_is_refused(text):
    with refused("--regex", text):
        parse_pattern(text)


def test_a_search_that_backtracks_without_end_counts_as_no_match_with_one_warning(
    monkeypatch, caplog
):
    monkeypatch.setattr(measures, "_SEARCH_TIMEOUT_S", 0.05)
    pattern = parse_pattern("(.*?,){20}P")
    assert extract(pattern, "1," * 30 + "P") is not None
    assert [extract(pattern, "1," * 40) for _ in range(2)] == [None, None]
    (record,) = caplog.records
    assert_mentions(record.getMessage(), pattern.pattern, "0.05 s", "no match")
