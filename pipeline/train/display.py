"""Progress display of rank 0: a progress bar in a terminal, otherwise log lines."""

import logging
import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class ProgressDisplay:
    """Display of finished steps.

    `done`: steps finished before this start. `every`: steps between two log lines. `is_shown`: True
    on rank 0 only.
    """

    def __init__(self, total_steps: int, done: int, every: int, *, is_shown: bool) -> None:
        self._every, self._total, self._is_shown = every, total_steps, is_shown
        console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if is_shown and console.is_terminal and logger.isEnabledFor(logging.INFO):
            self._bar = Progress(  # rich prints log lines above the bar
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=done, numbers="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show_step(self, line: dict[str, Any], seconds_left: float) -> None:
        """Show a finished step, given as its line of metrics.jsonl."""
        if not self._is_shown:
            return
        speed = f"{line['tokens_per_second']:,.0f} tokens/s"
        numbers = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {speed}"
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], numbers=numbers)
        elif line["step"] % self._every == 0 or line["step"] in (1, self._total):
            left = _duration_text(seconds_left)
            logger.info("step %d/%d  %s  %s left", line["step"], self._total, numbers, left)


def _duration_text(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
