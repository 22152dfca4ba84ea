"""Dead and hanging ranks: found, named, and the job ended before its launcher would.

Every rank has a pulse that its main thread moves and a thread that shows it to the others over the
key-value store. A rank that dies leaves the others in a collective, which NCCL ends after minutes
and a launcher by killing one rank after the other, 30 s each; here all leave within seconds, and
the last word is the dead rank's own.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, Self

import psutil

from pipeline.cluster import heartbeat as phases
from pipeline.cluster.exits import is_lost_connection
from pipeline.cluster.heartbeat import Pulse, who_hangs
from pipeline.cluster.placement import Placement
from pipeline.cluster.stop import stopped_early
from pipeline.errors import OfOneRank, RankZeroError, Stopped

_POLL_S, _SHOW_S = 0.5, 2.0
# For what another rank has begun: to leave as this one does, or to be read by the others.
_LEAVING_S, _READING_S = 10.0, 1.5
_FROZEN_S = 6.0  # a pulse not shown for so long is of a stopped process
_UNANSWERED_S = 15.0  # a call to the store has no time-out of its own
_CONCLUDING_S = 30.0  # for this process to be ended by the thread
_MEETING = timedelta(minutes=30)  # ranks on slow shared disks import for long
_VERDICT = "watchdog/verdict"


class Watchdog:
    """The thread; a context around all work of the ranks together, entered when all have met.

    `channel` is a connection to the store that no other thread uses; None for a single process.
    `reason_to_leave` is asked for a wish to stop before there is a step: then all ranks leave.
    `on_end` is told the reason and the exit code before the process ends, on rank 0 or, if that one
    is dead, on the rank that speaks for it.
    """

    def __init__(
        self,
        placement: Placement,
        channel: Any,
        pulse: Pulse,
        timeout_s: float,
        *,
        reason_to_leave: Callable[[], str | None],
        on_end: Callable[[str, int], None],
    ) -> None:
        self._placement, self._channel, self._pulse = placement, channel, pulse
        self._timeout_s, self._on_end = timeout_s, on_end
        self._reason_to_leave = reason_to_leave
        self._closed = threading.Event()
        self._lost: BaseException | None = None  # the main thread has lost another rank
        self._main = threading.get_ident()
        self._siblings: dict[int, psutil.Process] = {}
        self._first_host = ""
        self._gone_since: dict[int, float] = {}
        self._shown = 0.0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._last_resort = threading.Thread(target=self._watch_alone, name="alone", daemon=True)

    def __enter__(self) -> Self:
        if self._channel is not None:
            me = {"host": socket.gethostname(), "pid": os.getpid()}
            self._channel.set(_key("peer", self._placement.rank), json.dumps(me))
            peers = [_key("peer", rank) for rank in range(self._placement.world_size)]
            self._channel.wait(peers, _MEETING)
            self._find_siblings()
        self._thread.start()
        if self._channel is not None:
            self._last_resort.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and is_lost_connection(error):
            self._lost = error
            self._thread.join(_CONCLUDING_S)  # it finds out who is gone, and ends this process
            return
        self._closed.set()
        self._thread.join(_UNANSWERED_S)
        if self._channel is None:
            return
        try:
            is_common = isinstance(error, RankZeroError) and not isinstance(error, OfOneRank)
            if error is None or is_common:  # all ranks leave together
                self._channel.set(_key("left", self._placement.rank), "")
            else:
                name = "" if isinstance(error, OfOneRank) else f"{type(error).__name__}: "
                self._declare(f"rank {self._placement.rank}: {name}{error}")
                time.sleep(_READING_S)  # the store ends with rank 0
        except RuntimeError:
            return  # the store is gone, and rank 0 with it

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_S):
            try:
                if self._channel is not None:
                    self._look_at_ranks()
                if self._lost is not None:
                    self._name_who_is_gone(self._lost)
                if (reason := self._reason_to_leave()) is not None:
                    self._stop_all(stopped_early(reason))
                if self._is_hanging():
                    self._name_who_hangs()
            except RuntimeError:  # the store is not there any more, nor is rank 0 that held it
                if self._closed.wait(_POLL_S + 2.0):
                    return
                self._end_for(0)

    def _watch_alone(self) -> None:
        """Where rank 0 is stopped, the store does not answer and the other thread waits for it."""
        while not self._closed.wait(_POLL_S):
            if self._is_hanging(_UNANSWERED_S):
                text = (
                    f"no progress for {self._patience_s():.0f} s: rank 0 on {self._first_host} "
                    f"does not answer, rank {self._placement.rank} is at step {self._pulse.step} "
                    f"in {self._pulse.phase}; the last checkpoint is untouched"
                )
                alive = [r for r, p in self._siblings.items() if r and not _is_gone(p)]
                is_first = self._placement.rank < min(alive, default=self._placement.rank + 1)
                if is_first:
                    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the one message
                    self._end_frozen([0])
                self._leave(text, is_ours=is_first)

    def _look_at_ranks(self) -> None:
        self._heed_verdict()
        if time.monotonic() - self._shown > _SHOW_S:
            self._show()
        for rank, process in self._siblings.items():
            if _is_gone(process) and not self._is_leaving(rank):
                self._end_for(rank)

    def _heed_verdict(self) -> None:
        """Leave, if a rank has found out why all must."""
        if self._channel.check([_VERDICT]):
            verdict = json.loads(self._channel.get(_VERDICT))
            is_ours = self._placement.rank == 0
            self._leave(verdict["text"], is_ours=is_ours, code=verdict["code"])

    def _stop_all(self, text: str) -> None:
        """Leave with all ranks: nothing has begun, and the main thread may be in a library."""
        code = Stopped.exit_code
        if self._channel is None or self._declare(text, code):
            print(text, file=sys.stderr, flush=True)  # noqa: T201 - the one message
            self._leave(text, is_ours=self._placement.rank == 0, code=code)
        self._heed_verdict()

    def _find_siblings(self) -> None:
        """Ranks of this machine: their processes can be seen from here."""
        self._first_host = json.loads(self._channel.get(_key("peer", 0)))["host"]
        size = self._placement.local_size
        first = self._placement.rank // size * size
        for rank in range(first, first + size):
            peer = json.loads(self._channel.get(_key("peer", rank)))
            if rank != self._placement.rank and peer["host"] == socket.gethostname():
                with suppress(psutil.NoSuchProcess):  # in a container of its own
                    self._siblings[rank] = psutil.Process(peer["pid"])

    def _is_leaving(self, rank: int) -> bool:
        """Whether a rank that is gone left as all do, and this one still may."""
        since = self._gone_since.setdefault(rank, time.monotonic())
        patience = _LEAVING_S if self._channel.check([_key("left", rank)]) else _POLL_S
        return time.monotonic() - since < patience

    def _end_for(self, rank: int) -> None:
        """End for a rank that ended in silence; one of those that are left says so."""
        me = self._placement.rank
        text = (
            f"rank {rank} ended without a word, as after a kill or for want of memory, while rank "
            f"{me} was at step {self._pulse.step} in {self._pulse.phase}"
        )
        try:
            is_first = self._declare(text)
        except RuntimeError:  # the store went with rank 0
            alive = [r for r, process in self._siblings.items() if not _is_gone(process)]
            is_first = me < min(alive, default=me + 1)
        if is_first:
            print(text, file=sys.stderr, flush=True)  # noqa: T201 - the one message
        self._leave(text, is_ours=me == 0 or (rank == 0 and is_first))

    def _is_hanging(self, more_s: float = 0.0) -> bool:
        if self._pulse.phase in phases.UNWATCHED:
            return False
        # Rank 0 is the first to judge; the others do where it cannot.
        more_s += 5.0 if self._placement.rank else 0.0
        return time.monotonic() - self._pulse.since > self._patience_s() + more_s

    def _patience_s(self) -> float:
        is_loading = self._pulse.phase in phases.LOADING
        return max(self._timeout_s, phases.LOADING_S) if is_loading else self._timeout_s

    def _name_who_hangs(self) -> None:
        pulses: dict[int, dict[str, Any]] = {0: self._as_json()}
        frozen: list[int] = []
        if self._channel is not None:
            pulses, frozen = self._compare_pulses()
        text = who_hangs(pulses, frozen, self._patience_s())
        if self._channel is None or self._declare(text):
            print(text, file=sys.stderr, flush=True)  # noqa: T201 - the one message
            self._end_frozen(frozen)
        self._leave(text, is_ours=self._placement.rank == 0)

    def _name_who_is_gone(self, error: BaseException) -> None:
        """Of ranks on other machines only their pulses say whether they live."""
        if self._channel is not None and (frozen := self._compare_pulses()[1]):
            self._end_for(frozen[0])
        text = f"rank {self._placement.rank}: lost its connection to another rank: {error}"
        if self._channel is None or self._declare(text):
            print(text, file=sys.stderr, flush=True)  # noqa: T201 - the one message
        self._leave(text, is_ours=self._placement.rank == 0)

    def _compare_pulses(self) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """The pulses of all ranks, and the ranks that do not move theirs; takes some seconds."""
        before = self._read_pulses()
        for _ in range(int(_FROZEN_S)):
            time.sleep(1.0)
            self._heed_verdict()
            self._show()
        pulses = self._read_pulses()
        return pulses, [rank for rank, pulse in pulses.items() if pulse == before.get(rank)]

    def _end_frozen(self, ranks: list[int]) -> None:
        """End stopped processes of this machine: they would not hear of it."""
        for rank in ranks:
            if rank in self._siblings and not _is_gone(self._siblings[rank]):
                self._siblings[rank].kill()
                psutil.wait_procs([self._siblings[rank]], timeout=2.0)

    def _show(self) -> None:
        self._shown = time.monotonic()
        self._channel.set(_key("pulse", self._placement.rank), json.dumps(self._as_json()))

    def _read_pulses(self) -> dict[int, dict[str, Any]]:
        keys = {rank: _key("pulse", rank) for rank in range(self._placement.world_size)}
        there = {rank: key for rank, key in keys.items() if self._channel.check([key])}
        return {rank: json.loads(self._channel.get(key)) for rank, key in there.items()}

    def _as_json(self) -> dict[str, Any]:
        frame = traceback.extract_stack(sys._current_frames()[self._main])[-1]
        return {
            "host": socket.gethostname(),
            "step": self._pulse.step,
            "phase": self._pulse.phase,
            "beats": self._pulse.beats,
            "where": f"{frame.filename}:{frame.lineno}",
            "shown": time.monotonic(),
        }

    def _declare(self, text: str, code: int = 1) -> bool:
        """Tell all ranks why they end; whether this rank was the first to."""
        mine = json.dumps({"text": text, "code": code, "by": self._placement.rank})
        found = self._channel.compare_set(_VERDICT, "", mine)
        return bool(found.decode() == mine)

    def _leave(self, text: str, *, is_ours: bool, code: int = 1) -> NoReturn:
        if self._placement.rank == 0 and self._channel is not None:
            time.sleep(_READING_S)  # the store ends with this process
        if is_ours:
            self._on_end(text, code)  # last: the main thread goes on until the process ends
        os._exit(code)


def _key(what: str, rank: int) -> str:
    return f"watchdog/{what}/{rank}"


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
