"""Frequency: how often a run measures the held-out loss, or writes a checkpoint."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Strategy = Literal["steps", "epoch", "no"]


@dataclass(frozen=True)
class Frequency:
    """`times` evenly spaced events in each period.

    `period`: number of steps, or below 1 a fraction of the run; None for one epoch.
    """

    times: int
    period: float | None = None

    def is_due(self, step: int, steps_per_epoch: int, total_steps: int) -> bool:
        """Whether an evaluation or save is due after step number `step`; steps count from 1."""
        period = self._steps(steps_per_epoch, total_steps)
        num_due = step * self.times // period  # events up to this step
        return num_due > (step - 1) * self.times // period

    def count(self, total_steps: int, steps_per_epoch: int) -> int:
        """Number of events in a run. There is always one after the last step."""
        earlier = max(0, total_steps - 1)
        return earlier * self.times // self._steps(steps_per_epoch, total_steps) + 1

    def _steps(self, steps_per_epoch: int, total_steps: int) -> int:
        """Number of steps of a period; a fraction is rounded up, as in transformers."""
        if self.period is None:
            return steps_per_epoch
        if self.period < 1:  # str: 0.07 * 100 is above 7 in floating point
            return math.ceil(Fraction(str(self.period)) * total_steps)
        return int(self.period)


def frequency(strategy: Strategy, steps: float | None, per_epoch: int | None) -> Frequency | None:
    """The Frequency of evaluations or checkpoints; None if the strategy is `no`.

    `steps` and `per_epoch` are the values of two settings, for example `save_steps` and
    `saves_per_epoch`.
    """
    if strategy == "steps":
        return Frequency(1, steps)
    return Frequency(per_epoch or 1) if strategy == "epoch" else None
