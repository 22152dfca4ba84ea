"""Heartbeat of a rank's main thread, and the message that names the ranks which hang."""

import time
from dataclasses import dataclass, field
from typing import Any

LOADING = ("loading the base", "creating the engine", "restoring the checkpoint")
# Phases without a time limit: rank 0 may prepare data for a day while the others wait, and the time
# to load a base is unknown. The other phases of LOADING have one (LOADING_S), because ranks that
# are ready wait in a collective, which times out after 30 minutes without naming the slow rank.
UNWATCHED = ("start-up", LOADING[0], "publishing")
LOADING_S = 25 * 60.0


@dataclass
class Heartbeat:
    """The phase of this rank's main thread. `beats` counts phases: a slow rank has fewer."""

    step: int = 0
    phase: str = "start-up"
    beats: int = 0
    since: float = field(default_factory=time.monotonic)

    def beat(self, phase: str, step: int | None = None) -> None:
        """The main thread enters a phase."""
        self.phase, self.since = phase, time.monotonic()
        self.step = self.step if step is None else step
        self.beats += 1


def hang_message(heartbeats: dict[int, dict[str, Any]], frozen: list[int], timeout_s: float) -> str:
    """Name the ranks that block the others: frozen ones, else those with the fewest beats."""
    fewest = min(heartbeat["beats"] for heartbeat in heartbeats.values())
    behind = frozen or [r for r, heartbeat in heartbeats.items() if heartbeat["beats"] == fewest]
    scope = "all ranks hang" if len(behind) == len(heartbeats) > 1 else "the others wait"
    names = "; ".join(
        f"rank {rank} on {heartbeats[rank]['host']} hangs at step {heartbeats[rank]['step']} in "
        f"{heartbeats[rank]['phase']} ({heartbeats[rank]['where']}"
        f"{', stopped or cut off' if rank in frozen else ''})"
        for rank in behind
    )
    return f"no progress for {timeout_s:.0f} s ({scope}): {names}; the last checkpoint is untouched"
