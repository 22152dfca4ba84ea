"""How often a run evaluates or saves: a Frequency, and its construction from the settings."""

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["steps", "epoch", "no"]


@dataclass(frozen=True)
class Frequency:
    """`times` evenly spaced events per period. `period`: a number of steps; None for an epoch."""

    times: int
    period: int | None = None

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether an evaluation or save is due after step number `step`; steps count from 1."""
        period = self.period or steps_per_epoch
        return step * self.times // period > (step - 1) * self.times // period


def frequency(strategy: Strategy, steps: int | None, per_epoch: int | None) -> Frequency | None:
    """The Frequency for a strategy, its `*_steps` and its `*_per_epoch` setting; None for never."""
    if strategy == "steps":
        return Frequency(1, steps)
    return Frequency(per_epoch or 1) if strategy == "epoch" else None
