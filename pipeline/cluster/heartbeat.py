"""Where the main thread of a rank is, and which rank holds the others up."""

import time
from dataclasses import dataclass, field
from typing import Any

LOADING = ("loading the base", "making the engine", "restoring the checkpoint")
# Rank 0 may prepare for a day while the others wait, and no rank knows how long a base takes. Those
# that have theirs wait for the others, in collectives that end after 30 minutes and say nothing of
# who it is: so they are watched.
UNWATCHED = ("start-up", LOADING[0], "publishing")
LOADING_S = 25 * 60.0


@dataclass
class Pulse:
    """Where this rank's main thread is. `beats` counts its moves: who is behind has fewer."""

    step: int = 0
    phase: str = "start-up"
    beats: int = 0
    since: float = field(default_factory=time.monotonic)

    def beat(self, phase: str, step: int | None = None) -> None:
        """The main thread has come to another phase."""
        self.phase, self.since = phase, time.monotonic()
        self.step = self.step if step is None else step
        self.beats += 1


def who_hangs(pulses: dict[int, dict[str, Any]], frozen: list[int], timeout_s: float) -> str:
    """Name the rank that holds the others up, from the pulses of all.

    That is one which is stopped, or else the one that has come least far.
    """
    fewest = min(pulse["beats"] for pulse in pulses.values())
    behind = frozen or [rank for rank, pulse in pulses.items() if pulse["beats"] == fewest]
    whose = "all ranks hang" if len(behind) == len(pulses) > 1 else "the others wait"
    names = "; ".join(
        f"rank {rank} on {pulses[rank]['host']} hangs at step {pulses[rank]['step']} in "
        f"{pulses[rank]['phase']} ({pulses[rank]['where']}"
        f"{', stopped or cut off' if rank in frozen else ''})"
        for rank in behind
    )
    return f"no progress for {timeout_s:.0f} s ({whose}): {names}; the last checkpoint is untouched"
