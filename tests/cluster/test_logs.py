"""Log output: INFO of rank 0 and warnings of all ranks, unless the caller has set handlers."""

import logging
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster import logs
from pipeline.cluster.logs import wrap_lines

pytestmark = pytest.mark.unit

# Logs by this project's loggers; `{before}`: code of a program that uses this project as a library.
CODE = """
import logging, sys
{before}
from pipeline.cluster.logs import configure_logging
configure_logging()
configure_logging()
logger = logging.getLogger("pipeline.train.run")
logger.info("step %d", 3)
logger.debug("a detail")
logger.warning("disk is slow")
"""
CALLERS_HANDLER = "logging.basicConfig(stream=sys.stderr, format='mine %(message)s')"


def output(before: str = "", **env: str) -> subprocess.CompletedProcess:
    code = CODE.format(before=before)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env)


def test_rank_0_shows_plain_lines_on_standard_output():
    result = output()
    assert (result.stdout, result.stderr) == ("step 3\ndisk is slow\n", "")


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_other_ranks_show_warnings_only(name):
    assert output(**{name: "2"}).stdout == "rank 2: disk is slow\n"


def test_a_library_user_keeps_the_handlers_that_were_configured():
    result = output(CALLERS_HANDLER)
    assert (result.stdout, result.stderr) == ("", "mine disk is slow\n")


def test_silence_is_the_time_since_the_last_message(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(logs._ConsoleHandler, "last_output", math.inf)
    handler = logs._ConsoleHandler()
    assert logs.seconds_without_output() == 0  # nothing has been shown yet
    for now in (103.0, 110.0):
        clock.now = now
        handler.emit(logging.makeLogRecord({"msg": "a message"}))
        assert logs.seconds_without_output() == 0
        clock.now = now + 5.0
        assert logs.seconds_without_output() == 5


def test_a_long_line_is_broken_between_words_and_aligned_with_the_text_after_its_label():
    text = "data       400 of 400 rows, 0 rejected\nshort"
    assert wrap_lines(text, 30) == "data       400 of 400 rows, 0\n           rejected\nshort"


def test_an_indented_line_of_a_table_is_aligned_with_the_text_after_its_label():
    text = "  zero_stage    the base fits on each rank"
    expected = "  zero_stage    the base fits on\n                each rank"
    assert wrap_lines(text, 32) == expected


@given(st.text("ab /:-\n", max_size=120), st.integers(10, 60))
def test_wrapping_keeps_every_word_and_the_width(text, width):
    result = wrap_lines(text, width)
    assert result.split() == text.split()
    assert all(len(line) <= width or len(line.split()) == 1 for line in result.split("\n"))
