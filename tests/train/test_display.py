"""The view of the training shows every figure, at any width and for any loss."""

import io
import math
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import pipeline.train.display as display_module
from pipeline.cluster import progress
from pipeline.cluster.progress import Work
from pipeline.train.display import ProgressDisplay, TrainingView, curve
from tests.messages import assert_mentions

pytestmark = pytest.mark.unit


def line(step: int, loss: float, *, peak: int | None = 2**30) -> dict[str, Any]:
    return {
        "step": step, "loss": loss, "lr": 1e-4, "tokens_per_second": 1234.5, "peak_bytes": peak,
        "predicted_bytes": 2**31,
    }  # fmt: skip


def rendered(view: TrainingView, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(view)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_every_figure_is_shown_within_the_width(width: int) -> None:
    # 200 steps in all, 100 done before this start, 2000 tokens per second predicted
    view = TrainingView(200, 100, 2000.0)
    view.held_out = (110, 0.25)  # step and loss of the last evaluation
    for step in range(101, 121):
        view.add_step(line(step, 2.0 / step), saved_step=115)
    text = rendered(view, width)
    assert_mentions(
        text, "120/200", "60 %", "left", 0.0167, "1.00e-04", "1,234 tokens/s", "62 %",
        "1.00 GiB", "2.00", "step 115", "0.2500", "step 110",
    )  # fmt: skip
    assert max(map(len, text.splitlines())) <= width


def test_a_view_without_a_step_or_memory_is_shown() -> None:
    view = TrainingView(5, 0, 10.0)
    assert_mentions(rendered(view, 80), "0/5")
    view.add_step(line(1, math.nan, peak=None), saved_step=None)
    assert_mentions(rendered(view, 80), "1/5", "nan", "none yet")


def test_work_between_two_steps_is_shown_while_it_lasts() -> None:
    view = TrainingView(5, 0, 10.0)
    view.add_step(line(1, 1.0), saved_step=None)
    view.work = Work("measuring", 4)
    view.work.advance()
    assert_mentions(rendered(view, 80), "measuring", "25 %")
    view.work = None
    assert "measuring" not in rendered(view, 80)


def test_the_curve_rises_and_falls_with_the_values() -> None:
    assert curve([3.0, 2.0, 1.0, 0.0]) == "█▆▃▁"
    assert curve([1.0, math.nan]) == "▁?"


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=200))
def test_the_curve_of_any_values_has_limited_width(values: list[float]) -> None:
    assert len(curve(values)) == min(len(values), 24)


def plan_of(total_steps: int, logging_steps: int) -> Any:
    """The parts of a plan that ProgressDisplay reads."""
    return SimpleNamespace(
        steps=SimpleNamespace(total_steps=total_steps),
        settings=SimpleNamespace(logging_steps=logging_steps),
        speed=SimpleNamespace(tokens_per_second=10.0),
    )


@pytest.mark.parametrize(
    ("first_step", "silence_s", "steps_with_line"),
    [
        (0, 0.0, [1, 10, 20, 23]),
        (14, 0.0, [15, 20, 23]),  # resumed from step 14
        (14, 61.0, [*range(15, 24)]),  # slow steps
    ],
)
def test_the_first_step_of_a_start_every_due_one_and_one_after_a_minute_have_a_line(
    first_step, silence_s, steps_with_line, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(display_module, "seconds_without_output", lambda: silence_s)
    with caplog.at_level("INFO"), ProgressDisplay(plan_of(23, 10), first_step, is_shown=True) as d:
        for step in range(first_step + 1, 24):
            d.show_step(line(step, 1.0), saved_step=None)
    assert re.findall(r"step (\d+)/23", caplog.text) == [*map(str, steps_with_line)]


def test_the_wait_for_the_first_step_is_shown_until_it_is_done(monkeypatch, caplog) -> None:
    monkeypatch.setattr(progress, "_FIRST_LINE_S", 0.0)
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", 0.001)
    with caplog.at_level("INFO"), ProgressDisplay(plan_of(5, 1), 0, is_shown=True) as display:
        while caplog.text.count("first step") < 3:
            time.sleep(0.001)
        display.show_step(line(1, 1.0), saved_step=None)
        num_lines = caplog.text.count("first step")
        time.sleep(0.05)
        assert caplog.text.count("first step") == num_lines
    assert_mentions(caplog.text, "step 1/5")
