"""How often a run evaluates or saves: a strategy, steps, or times in each epoch."""

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["steps", "epoch", "no"]


@dataclass(frozen=True)
class Frequency:
    """`times` in each `period` of steps, evenly spaced; without a period, in each epoch."""

    times: int
    period: int | None = None

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether step number `step`, from 1 on, is followed by one."""
        period = self.period or steps_per_epoch
        return step * self.times // period > (step - 1) * self.times // period


def frequency(strategy: Strategy, steps: int | None, per_epoch: int | None) -> Frequency | None:
    """The frequency that three settings mean together; None for never."""
    if strategy == "steps":
        return Frequency(1, steps)
    return Frequency(per_epoch or 1) if strategy == "epoch" else None
