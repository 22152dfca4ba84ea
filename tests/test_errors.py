"""Messages of errors: bounded, whatever a user wrote."""

import pytest

from pipeline.errors import RankZeroError, UserError
from tests.messages import assert_mentions

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("error", [RankZeroError, UserError])
def test_a_long_value_keeps_the_place_and_the_remedy(error):
    message = str(error(f"RUN.yaml:3: lora_r: found {'9' * 1_000_000}; give a whole number"))
    assert len(message) < 1500
    assert_mentions(message, "RUN.yaml:3", "lora_r", "give a whole number", "characters left out")


def test_many_lines_are_counted():
    message = str(UserError("\n".join(f"RUN.yaml:{i}: unknown" for i in range(10_000))))
    assert len(message.splitlines()) == 201
    assert_mentions(message, "RUN.yaml:0", "9,800 more lines")


def test_a_short_message_stays_as_it_is():
    assert str(UserError("a: b\n  c; d\n")) == "a: b\n  c; d\n"
