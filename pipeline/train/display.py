"""Display of the training steps on rank 0: a live view in a terminal, otherwise log lines."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.cluster.logs import seconds_without_output
from pipeline.cluster.progress import (
    Work,
    can_redraw,
    duration,
    show_progress,
    stopped_before_end,
    terminal,
)
from pipeline.plan.given.hardware import GIB
from pipeline.plan.plan import Plan

logger = logging.getLogger(__name__)

_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 24  # characters
_LONGEST_SILENCE_S = 60.0  # then a step gets a line, even if it is not due by `logging_steps`


class ProgressDisplay:
    """Display of finished steps, held-out losses and checkpoints.

    `first_step`: step of the checkpoint from which this process resumed; 0 in a new run.
    `is_shown`: True on rank 0 only.
    """

    def __init__(self, plan: Plan, first_step: int, *, is_shown: bool) -> None:
        self._total, self._logging_steps = plan.steps.total_steps, plan.settings.logging_steps
        self._view = TrainingView(self._total, first_step, plan.speed.tokens_per_second)
        self._is_shown = is_shown
        self._is_first = True  # no step of this process has been shown
        console = terminal()
        self._live: Live | None = None
        if is_shown and can_redraw(console) and logger.isEnabledFor(logging.INFO):
            # rich prints log lines above the view.
            self._live = Live(self._view, console=console, refresh_per_second=2)
        self._shown = ExitStack()  # the live view, or the progress until the first step is done

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
            self._shown.callback(self._live.stop)
            self._shown.enter_context(stopped_before_end(self._live.stop))
        elif self._is_shown:
            self._shown.enter_context(show_progress("first step"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shown.close()

    def show_step(self, line: dict[str, Any], saved_step: int | None) -> None:
        """Show a step. `line`: its line of metrics.jsonl; `saved_step`: the last checkpoint."""
        self._view.add_step(line, saved_step)
        if not self._is_shown or self._live is not None:
            return
        self._shown.close()
        step = line["step"]
        is_silent = seconds_without_output() > _LONGEST_SILENCE_S
        if self._is_first or step % self._logging_steps == 0 or step == self._total or is_silent:
            logger.info("%s", self._view.as_line())
        self._is_first = False

    def show_checkpoint(self, step: int | None) -> None:
        """Show the step of the last checkpoint; None if this process has written none."""
        self._view.saved_step = step or self._view.saved_step

    @contextmanager
    def show_work(self, text: str, total: int | None = None) -> Iterator[Work]:
        """Show the progress of the `with` statement's body, such as an evaluation.

        `total`: amount of work in the body, in units that the body counts with `Work.advance`; None
        if it is unknown.
        """
        if self._live is None:
            with show_progress(text, total) as work:
                yield work
        else:
            self._view.work = Work(text, total)
            yield self._view.work
            self._view.work = None

    def show_evaluation(
        self, step: int, loss: float, seconds: float, scores: Mapping[str, Any]
    ) -> None:
        """Show a held-out loss, and the scores of answers to held-out rows."""
        self._view.held_out = (step, loss)
        # All scores are fractions; entries that are not floats are counts.
        percentages = "".join(
            f"  {name.replace('_', ' ')} {100 * value:.1f} %"
            for name, value in scores.items()
            if isinstance(value, float)
        )
        logger.info("step %d  held-out loss %.4f%s  (%.1f s)", step, loss, percentages, seconds)


class TrainingView:
    """The state of the training as a few lines for a terminal, drawn by rich.

    `first_step`: step of the checkpoint from which this process resumed; 0 in a new run.
    `predicted_speed`: tokens per second that the plan predicts.
    """

    def __init__(self, total_steps: int, first_step: int, predicted_speed: float) -> None:
        self.held_out: tuple[int, float] | None = None  # step and loss
        self.saved_step = first_step or None  # of the last checkpoint
        self.work: Work | None = None  # such as an evaluation between two steps
        self._total = total_steps
        self._predicted_speed = predicted_speed
        self._first_step, self._start_time = first_step, time.monotonic()
        self._losses: list[float] = []
        self._line: dict[str, Any] = {"step": first_step}  # the latest line of metrics.jsonl
        self._peak: tuple[int, int] | None = None  # measured and predicted bytes

    def add_step(self, line: dict[str, Any], saved_step: int | None) -> None:
        """Add a step. `line`: its line of metrics.jsonl; `saved_step`: the last checkpoint."""
        self._line, self.saved_step = line, saved_step or self.saved_step
        self._losses.append(line["loss"])
        if line["peak_bytes"] is not None:
            self._peak = (line["peak_bytes"], line["predicted_bytes"])

    def as_line(self) -> str:
        """One log line: step, loss, learning rate, speed, elapsed and remaining time."""
        line = self._line
        return (
            f"step {line['step']}/{self._total}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  "
            f"{line['tokens_per_second']:,.0f} tokens/s  {duration(self._elapsed())} elapsed, "
            f"{duration(self._seconds_left())} left"
        )

    def __rich_console__(self, console: Console, _options: Any) -> Any:
        yield self._render(console.width)

    def _render(self, width: int) -> RenderableType:
        step = self._line["step"]
        if not self._losses:
            return Text(f"step {step}/{self._total}  waiting for the first step")
        left = self._seconds_left()
        end = (datetime.now() + timedelta(seconds=left)).strftime("%H:%M")  # noqa: DTZ005 - local time
        head = Table.grid(padding=(0, 1), expand=False)
        head.add_row(
            f"step {step}/{self._total}",
            ProgressBar(total=self._total, completed=step, width=max(10, min(40, width - 50))),
            f"{100 * step / self._total:.0f} %",
            f"{duration(left)} left, ends {end}",
        )
        rows = Table.grid(padding=(0, 2))
        for name, text in self._rows():
            rows.add_row(Text(name, style="dim"), Text(text))
        return Group(head, rows)

    def _rows(self) -> list[tuple[str, str]]:
        line = self._line
        speed = line["tokens_per_second"]
        share = f", {100 * speed / self._predicted_speed:.0f} % of the plan's prediction"
        rows = [
            ("loss", f"{line['loss']:.4f}  {curve(self._losses)}  lr {line['lr']:.2e}"),
            ("speed", f"{speed:,.0f} tokens/s{share}"),
        ]
        if self._peak is not None:
            measured, predicted = (size / GIB for size in self._peak)
            rows.append(("memory", f"{measured:.2f} GiB of tensors, predicted {predicted:.2f}"))
        saved = "none yet" if self.saved_step is None else f"step {self.saved_step}"
        rows.append(("checkpoint", saved))
        if self.held_out is not None:
            rows.append(("held-out", f"loss {self.held_out[1]:.4f} at step {self.held_out[0]}"))
        if self.work is not None:
            rows.append(("now", self.work.as_line()))
        return rows

    def _elapsed(self) -> float:
        return time.monotonic() - self._start_time

    def _seconds_left(self) -> float:
        """Remaining time, from the mean duration of the steps of this process."""
        step: int = self._line["step"]
        return self._elapsed() / max(1, step - self._first_step) * (self._total - step)


def curve(values: list[float]) -> str:
    """A line of block characters, such as "█▅▃▁", whose heights show the values.

    Each character is the mean of consecutive values, or "?" if that is not finite.
    """
    width = min(len(values), _CURVE_WIDTH)
    edges = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    finite = list(filter(math.isfinite, means))
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        _BLOCKS[round((mean - low) * scale)] if math.isfinite(mean) else "?" for mean in means
    )
