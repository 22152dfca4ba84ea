"""Watchdog: ends all ranks within seconds if one of them has died or hangs, and names that rank.

Without it the other ranks would wait in a collective until NCCL's time-out of minutes, or until a
launcher has killed the ranks one by one, 30 s each. A thread of each rank publishes a heartbeat
in the key-value store. The first rank that detects a failure announces it to all ranks.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, Self

import psutil

from pipeline.cluster import heartbeat as phases
from pipeline.cluster.exits import end_process, is_lost_connection
from pipeline.cluster.heartbeat import Heartbeat, hang_message
from pipeline.cluster.launcher import has_ended
from pipeline.cluster.session import Session
from pipeline.cluster.stop import stopped_early
from pipeline.errors import RankZeroError, SingleRankError, Stopped

_POLL_S, _PUBLISH_S = 0.5, 2.0
# A rank that announced its end, and has ended, counts as dead if this rank still runs after this
# time.
_LEAVING_S = 10.0
_READING_S = 1.5  # time for the other ranks to read the store, which ends with rank 0
_FROZEN_S = 6.0  # a process without a new heartbeat for this long is frozen (suspended)
_UNANSWERED_S = 15.0  # a call to the store that takes longer counts as unanswered
_DIAGNOSIS_S = 30.0  # time for the thread to name the dead rank and end this process
_START_TIMEOUT = timedelta(minutes=30)  # imports from slow shared disks take minutes
_END_REASON = "watchdog/end-reason"


class Watchdog:
    """Watchdog thread, as a context manager for all collective work; every rank enters it.

    `timeout_s`: longest time of a phase. `reason_to_leave`: returns a stop request that arrived
    before the training loop; then all ranks end. `on_end`: called with the reason and the exit code
    before the process ends, on rank 0 or, if rank 0 is dead, on the rank that reports for it.
    """

    def __init__(
        self,
        session: Session,
        heartbeat: Heartbeat,
        timeout_s: float,
        *,
        reason_to_leave: Callable[[], str | None],
        on_end: Callable[[str, int], None],
    ) -> None:
        self._placement, self._heartbeat, self._timeout_s = session.placement, heartbeat, timeout_s
        self._channel = session.open_channel()  # None for a single process
        self._reason_to_leave, self._on_end = reason_to_leave, on_end
        self._closed = threading.Event()
        self._lost_connection: BaseException | None = None  # raised in the main thread
        self._main_thread = threading.get_ident()
        self._siblings: dict[int, psutil.Process] = {}
        self._rank_zero_host = ""
        self._ended_since: dict[int, float] = {}
        self._published = 0.0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._fallback = threading.Thread(
            target=self._watch_without_store, name="watchdog fallback", daemon=True
        )

    def __enter__(self) -> Self:
        if self._channel is not None:
            process = {"host": socket.gethostname(), "pid": os.getpid()}
            self._channel.set(_key("process", self._placement.rank), json.dumps(process))
            ranks = range(self._placement.world_size)
            self._channel.wait([_key("process", rank) for rank in ranks], _START_TIMEOUT)
            self._find_siblings()
        self._thread.start()
        if self._channel is not None:
            self._fallback.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and is_lost_connection(error):
            self._lost_connection = error
            self._thread.join(_DIAGNOSIS_S)  # the thread names the dead rank and ends this process
            return
        self._closed.set()
        self._thread.join(_UNANSWERED_S)
        if self._channel is None:
            return
        try:
            is_common = isinstance(error, RankZeroError) and not isinstance(error, SingleRankError)
            if error is None or is_common:  # all ranks leave together
                self._channel.set(_key("left", self._placement.rank), "")
            else:
                name = "" if isinstance(error, SingleRankError) else f"{type(error).__name__}: "
                self._announce(f"rank {self._placement.rank}: {name}{error}")
                time.sleep(_READING_S)
        except RuntimeError:
            return  # the store and rank 0 have ended

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_S):
            try:
                if self._channel is not None:
                    self._check_ranks()
                if self._lost_connection is not None:
                    self._end_for_lost_connection(self._lost_connection)
                if (reason := self._reason_to_leave()) is not None:
                    self._stop_all(stopped_early(reason))
                if self._is_hanging():
                    self._end_for_hang()
            except RuntimeError:  # the store has ended, and so has rank 0, which serves it
                if self._closed.wait(_POLL_S + 2.0):
                    return
                self._end_for_dead(0)

    def _watch_without_store(self) -> None:
        """Detect that rank 0 is frozen.

        Its store does not answer, so the other thread is blocked.
        """
        while not self._closed.wait(_POLL_S):
            if self._is_hanging(_UNANSWERED_S):
                text = (
                    f"no progress for {self._limit_s():.0f} s: rank 0 on {self._rank_zero_host} "
                    f"does not answer, rank {self._placement.rank} is {self._heartbeat.position}"
                    f"{phases.checkpoint_note(self._heartbeat.step)}"
                )
                is_reporter = self._is_lowest_alive(without=[0])
                if is_reporter:
                    _print_message(text)
                    self._kill_frozen([0])
                self._end_this_rank(text, is_reporter=is_reporter)

    def _check_ranks(self) -> None:
        self._leave_if_announced()
        if time.monotonic() - self._published > _PUBLISH_S:
            self._publish()
        for rank, process in self._siblings.items():
            if has_ended(process) and not self._is_leaving(rank):
                self._end_for_dead(rank)

    def _leave_if_announced(self) -> None:
        if self._channel.check([_END_REASON]):
            end = json.loads(self._channel.get(_END_REASON))
            self._end_this_rank(
                end["text"], is_reporter=self._placement.rank == 0, code=end["code"]
            )

    def _stop_all(self, text: str) -> None:
        """End all ranks before the first step, even if the main thread is in a library call."""
        code = Stopped.exit_code
        if self._channel is None or self._announce(text, code):
            _print_message(text)
            self._end_this_rank(text, is_reporter=self._placement.rank == 0, code=code)
        self._leave_if_announced()

    def _find_siblings(self) -> None:
        """Find the processes of other ranks on this machine that are visible to this process."""
        self._rank_zero_host = json.loads(self._channel.get(_key("process", 0)))["host"]
        size = self._placement.local_size
        first = self._placement.rank // size * size
        for rank in range(first, first + size):
            process = json.loads(self._channel.get(_key("process", rank)))
            if rank != self._placement.rank and process["host"] == socket.gethostname():
                with suppress(psutil.NoSuchProcess):  # the rank is in another container
                    self._siblings[rank] = psutil.Process(process["pid"])

    def _is_leaving(self, rank: int) -> bool:
        """Whether a rank that has ended may have left normally, because all ranks are about to.

        This is assumed for a short time, and longer if the rank has announced that it leaves.
        """
        since = self._ended_since.setdefault(rank, time.monotonic())
        patience = _LEAVING_S if self._channel.check([_key("left", rank)]) else _POLL_S
        return time.monotonic() - since < patience

    def _is_lowest_alive(self, without: Collection[int] = ()) -> bool:
        """Whether this rank has the lowest number of the ranks that are alive on its machine."""
        others = [r for r, p in self._siblings.items() if r not in without and not has_ended(p)]
        return self._placement.rank < min(others, default=self._placement.rank + 1)

    def _end_for_dead(self, rank: int) -> None:
        """End because a rank died without a message; only one of the other ranks reports it."""
        text = (
            f"rank {rank} ended without a message, as after a kill or if memory is exhausted, "
            f"while rank {self._placement.rank} was {self._heartbeat.position}"
        )
        try:
            is_first = self._announce(text)
        except RuntimeError:  # the store ended with rank 0
            is_first = self._is_lowest_alive()
        if is_first:
            _print_message(text)
        self._end_this_rank(text, is_reporter=self._placement.rank == 0 or (rank == 0 and is_first))

    def _is_hanging(self, more_s: float = 0.0) -> bool:
        if self._heartbeat.phase in phases.UNWATCHED:
            return False
        more_s += 5.0 if self._placement.rank else 0.0  # rank 0 announces first, if it can
        return time.monotonic() - self._heartbeat.since > self._limit_s() + more_s

    def _limit_s(self) -> float:
        is_loading = self._heartbeat.phase in phases.LOADING
        return max(self._timeout_s, phases.LOADING_S) if is_loading else self._timeout_s

    def _end_for_hang(self) -> None:
        heartbeats: dict[int, dict[str, Any]] = {0: self._heartbeat_json()}
        frozen: list[int] = []
        if self._channel is not None:
            heartbeats, frozen = self._compare_heartbeats()
        text = hang_message(heartbeats, frozen, self._limit_s())
        if self._channel is None or self._announce(text):
            _print_message(text)
            self._kill_frozen(frozen)
        self._end_this_rank(text, is_reporter=self._placement.rank == 0)

    def _end_for_lost_connection(self, error: BaseException) -> None:
        """End after a lost connection. A remote rank without new heartbeats counts as dead."""
        if self._channel is not None and (frozen := self._compare_heartbeats()[1]):
            self._end_for_dead(frozen[0])
        text = f"rank {self._placement.rank}: lost its connection to another rank: {error}"
        if self._channel is None or self._announce(text):
            _print_message(text)
        self._end_this_rank(text, is_reporter=self._placement.rank == 0)

    def _compare_heartbeats(self) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """Heartbeats of all ranks, and the ranks without a new one. Blocks for 6 s."""
        before = self._read_heartbeats()
        for _ in range(int(_FROZEN_S)):
            time.sleep(1.0)
            self._leave_if_announced()
            self._publish()
        after = self._read_heartbeats()
        return after, [rank for rank, value in after.items() if value == before.get(rank)]

    def _kill_frozen(self, ranks: list[int]) -> None:
        """Kill frozen processes of this machine, which cannot read the announced reason."""
        for rank in ranks:
            if rank in self._siblings and not has_ended(self._siblings[rank]):
                self._siblings[rank].kill()
                psutil.wait_procs([self._siblings[rank]], timeout=2.0)

    def _publish(self) -> None:
        self._published = time.monotonic()
        self._channel.set(
            _key("heartbeat", self._placement.rank), json.dumps(self._heartbeat_json())
        )

    def _read_heartbeats(self) -> dict[int, dict[str, Any]]:
        keys = {rank: _key("heartbeat", rank) for rank in range(self._placement.world_size)}
        published = {rank: key for rank, key in keys.items() if self._channel.check([key])}
        return {rank: json.loads(self._channel.get(key)) for rank, key in published.items()}

    def _heartbeat_json(self) -> dict[str, Any]:
        frame = traceback.extract_stack(sys._current_frames()[self._main_thread])[-1]
        return {
            "host": socket.gethostname(),
            "step": self._heartbeat.step,
            "phase": self._heartbeat.phase,
            "beats": self._heartbeat.beats,
            "where": f"{frame.filename}:{frame.lineno}",
            "published": time.monotonic(),
        }

    def _announce(self, text: str, code: int = 1) -> bool:
        """Announce to all ranks why they end. True only on the rank that announced first."""
        own = json.dumps({"text": text, "code": code, "by": self._placement.rank})
        announced = self._channel.compare_set(_END_REASON, "", own)
        return bool(announced.decode() == own)

    def _end_this_rank(self, text: str, *, is_reporter: bool, code: int = 1) -> NoReturn:
        if self._placement.rank == 0 and self._channel is not None:
            time.sleep(_READING_S)
        if is_reporter:
            # Called last, because the main thread continues until the process ends.
            self._on_end(text, code)
        end_process(code)


def _print_message(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the one message of the job


def _key(name: str, rank: int) -> str:
    return f"watchdog/{name}/{rank}"
