"""Heartbeat of a rank's main thread, and the message that names hanging ranks."""

import time
from dataclasses import dataclass, field
from typing import Any

LOADING = ("loading the base", "creating the engine", "restoring the checkpoint")
# Phases without a time limit. During start-up the other ranks may wait for a day until rank 0 has
# prepared the data, and the time to load a base is not known.
UNWATCHED = ("start-up", LOADING[0], "publishing")
# Time limit of the other phases in LOADING. Ranks that have finished loading wait in a collective,
# which times out after 30 minutes without naming the slow rank.
LOADING_S = 25 * 60.0


@dataclass
class Heartbeat:
    """The present phase of this rank's main thread.

    `step`: finished steps; None before the training loop, and in a process that does not train.
    `beats`: number of phases so far; slow ranks have fewer. `since`: start of the phase
    (time.monotonic).
    """

    step: int | None = None
    phase: str = "start-up"
    beats: int = 0
    since: float = field(default_factory=time.monotonic)

    def renew(self) -> None:
        """Restart the time of the present phase, without a beat: ranks may do so at any rate."""
        self.since = time.monotonic()

    def beat(self, phase: str, step: int | None = None) -> None:
        """Enter a phase. Called by the main thread."""
        self.phase, self.since = phase, time.monotonic()
        self.step = self.step if step is None else step
        self.beats += 1

    @property
    def position(self) -> str:
        """The phase and, in the training loop, the step."""
        return position(self.step, self.phase)


def position(step: int | None, phase: str) -> str:
    """Text for a step and a phase: `at step 3 in the forward pass`."""
    return f"in {phase}" if step is None else f"at step {step} in {phase}"


def checkpoint_note(step: int | None) -> str:
    """Note for a message about a hang, if training has begun: no checkpoint is half written."""
    return "" if step is None else "; the last checkpoint is unchanged"


def hang_message(heartbeats: dict[int, dict[str, Any]], frozen: list[int], timeout_s: float) -> str:
    """Message that names the ranks which block the others.

    These are the frozen ranks; if there are none, the ranks with the fewest heartbeats.
    """
    fewest = min(heartbeat["beats"] for heartbeat in heartbeats.values())
    blocking = frozen or [r for r, heartbeat in heartbeats.items() if heartbeat["beats"] == fewest]
    scope = "all ranks hang" if len(blocking) == len(heartbeats) > 1 else "the others wait"
    names = "; ".join(
        f"rank {rank} on {heartbeats[rank]['host']} hangs "
        f"{position(heartbeats[rank]['step'], heartbeats[rank]['phase'])} "
        f"({heartbeats[rank]['where']}"
        f"{', stopped or disconnected' if rank in frozen else ''})"
        for rank in blocking
    )
    note = checkpoint_note(heartbeats[blocking[0]]["step"])
    return f"no progress for {timeout_s:.0f} s ({scope}): {names}{note}"
