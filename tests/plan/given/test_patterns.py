"""Regular expressions of a run file are bounded in time, and refused with their setting."""

import signal
import threading
import time

import pytest

from pipeline.plan.given.patterns import full_matches
from tests.messages import refused

pytestmark = pytest.mark.unit

NAMES = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(3) for kind in "qkvo"]


def test_a_pattern_matches_whole_names():
    matches = full_matches(r".*\.[qv]_proj", NAMES, "lora_target_modules")
    assert matches == [name for name in NAMES if name.endswith(("q_proj", "v_proj"))]
    assert full_matches("q_proj", NAMES, "lora_target_modules") == []


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 5000 + ")" * 5000])
def test_an_invalid_regular_expression_is_refused(pattern):
    with refused("lora_target_modules", "regular expression") as caught:
        full_matches(pattern, NAMES, "lora_target_modules")
    assert len(str(caught.value)) < 2000


@pytest.mark.timeout(60)
def test_a_pattern_that_backtracks_for_exponential_time_is_refused():
    """An alarm ends the match; the handler and the timer of the caller (pytest) are restored."""
    handler_before = signal.getsignal(signal.SIGALRM)
    had_timer = signal.getitimer(signal.ITIMER_REAL)[0] > 0
    start = time.monotonic()
    with refused("lora_target_modules", "(a+)+b"):
        full_matches("(a+)+b", ["a" * 60], "lora_target_modules")
    assert time.monotonic() - start < 30
    assert signal.getsignal(signal.SIGALRM) is handler_before
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == had_timer


def test_a_pattern_can_be_matched_in_a_thread_which_cannot_set_an_alarm():
    matches = []
    thread = threading.Thread(
        target=lambda: matches.extend(full_matches(".*", NAMES, "lora_target_modules"))
    )
    thread.start()
    thread.join()
    assert matches == NAMES
