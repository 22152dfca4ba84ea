"""Heartbeat of a rank's main thread, and the message that names hanging ranks."""

import time
from dataclasses import dataclass, field
from typing import Any

LOADING_PHASES = ("loading the base", "creating the engine", "restoring the checkpoint")
HASHING_PHASE = "hashing the base"  # on rank 0, after loading; the other ranks wait for it
# Phases without a time limit. During start-up the other ranks may wait for a day until rank 0 has
# prepared the data, and the times to load and to hash a base are not known.
UNWATCHED_PHASES = ("start-up", "loading the base", HASHING_PHASE, "publishing")
# Time limit of the other phases in LOADING_PHASES. Ranks that have finished loading wait in a
# collective, which times out after 30 minutes without naming the slow rank. So this is shorter.
LOADING_LIMIT_S = 25 * 60.0


@dataclass
class Heartbeat:
    """The present phase of this rank's main thread, such as "the forward pass".

    `step`: number of finished steps; None before the training loop, and in a process that does not
    train. `beats`: number of phases that this rank has entered; a rank that blocks the others has
    the fewest. `since`: start of the phase (time.monotonic).
    """

    step: int | None = None
    phase: str = "start-up"
    beats: int = 0
    since: float = field(default_factory=time.monotonic)

    def renew(self) -> None:
        """Restart the time of the present phase, for a rank that makes progress in a long phase.

        It does not count as a beat, because `beats` must not depend on the number of these calls.
        """
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
    """Step and phase as text, e.g. `at step 3 in the forward pass`."""
    return f"in {phase}" if step is None else f"at step {step} in {phase}"


def checkpoint_note(step: int | None) -> str:
    """A note for a message about a hang: if training has begun, the last checkpoint is intact."""
    return "" if step is None else "; the last checkpoint is unchanged"


def hang_message(heartbeats: dict[int, dict[str, Any]], frozen: list[int], timeout_s: float) -> str:
    """Message that names the ranks which block the others.

    These are the frozen ranks; if there are none, the ranks with the fewest heartbeats.
    `heartbeats`: rank -> heartbeat as published by the watchdog. `frozen`: ranks whose process
    publishes no heartbeats any more.
    """
    fewest = min(heartbeat["beats"] for heartbeat in heartbeats.values())
    blocking = frozen or [
        rank for rank, heartbeat in heartbeats.items() if heartbeat["beats"] == fewest
    ]
    scope = "all ranks hang" if len(blocking) == len(heartbeats) > 1 else "the others wait"
    descriptions = []
    for rank in blocking:
        heartbeat = heartbeats[rank]
        state = ", stopped or disconnected" if rank in frozen else ""
        descriptions.append(
            f"rank {rank} on {heartbeat['host']} hangs "
            f"{position(heartbeat['step'], heartbeat['phase'])} ({heartbeat['where']}{state})"
        )
    note = checkpoint_note(heartbeats[blocking[0]]["step"])
    return f"no progress for {timeout_s:.0f} s ({scope}): {'; '.join(descriptions)}{note}"
