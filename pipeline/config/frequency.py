"""Frequency: how often a run measures the held-out loss, or writes a checkpoint."""

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["steps", "epoch", "no"]


@dataclass(frozen=True)
class Frequency:
    """`times` evenly spaced events in each `period` steps; a period of None is one epoch."""

    times: int
    period: int | None = None

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether an evaluation or save is due after step number `step`; steps count from 1."""
        period = self.period or steps_per_epoch
        num_due = step * self.times // period  # events up to this step
        return num_due > (step - 1) * self.times // period

    def count(self, total_steps: int, steps_per_epoch: int) -> int:
        """Number of events in a run. There is always one after the last step."""
        earlier = max(0, total_steps - 1)
        return earlier * self.times // (self.period or steps_per_epoch) + 1


def frequency(strategy: Strategy, steps: int | None, per_epoch: int | None) -> Frequency | None:
    """The Frequency of evaluations or checkpoints; None if the strategy is `no`.

    `steps` and `per_epoch` are the values of two settings, for example `save_steps` and
    `saves_per_epoch`.
    """
    if strategy == "steps":
        return Frequency(1, steps)
    return Frequency(per_epoch or 1) if strategy == "epoch" else None
