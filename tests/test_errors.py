"""The length of an error message is bounded for every input."""

import pytest

from pipeline.errors import RankZeroError, UserError, first_few
from tests.messages import assert_mentions

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("error", [RankZeroError, UserError])
def test_a_long_value_is_shortened_without_losing_place_or_remedy(error):
    million_digits = "9" * 1_000_000
    message = str(error(f"RUN.yaml:3: lora_r: found {million_digits}; give a whole number"))
    assert len(message) < 1500
    assert_mentions(message, "RUN.yaml:3", "lora_r", "give a whole number", "characters left out")


def test_lines_beyond_the_limit_are_counted():
    message = str(UserError("\n".join(f"RUN.yaml:{i}: unknown" for i in range(10_000))))
    assert len(message.splitlines()) == 200 + 1  # the last line has the number of the others
    assert_mentions(message, "RUN.yaml:0", "9,800 more lines")


def test_control_characters_of_a_quoted_value_do_not_reach_the_terminal():
    assert str(UserError("RUN.yaml:4: \x1b[31mred\r: unknown")) == (
        "RUN.yaml:4: \\x1b[31mred\\x0d: unknown"
    )


def test_a_short_message_is_unchanged():
    assert str(UserError("a: b\n  c; d\n")) == "a: b\n  c; d\n"


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (3, "a0, a1, a2"), (5, "a0, a1, a2 and 2 more")]
)
def test_a_list_in_a_message_has_three_items_and_the_number_of_the_others(count, text):
    assert first_few([f"a{i}" for i in range(count)]) == text
