"""Watchdog: ends all ranks within seconds if one of them has died or hangs, and names that rank.

Without a watchdog the other ranks would wait in a collective until NCCL's time-out of minutes, or
until a launcher has killed the ranks one by one, 30 s each. A thread of each rank publishes a
heartbeat in the key-value store. The first rank that detects a failure announces the reason there,
and all ranks end.
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
from pipeline.cluster.exits import end_process, is_lost_connection, print_last_message
from pipeline.cluster.heartbeat import Heartbeat, hang_message
from pipeline.cluster.launcher import has_ended
from pipeline.cluster.progress import stop_displays
from pipeline.cluster.session import Session
from pipeline.cluster.stop import stopped_early
from pipeline.errors import RankZeroError, SingleRankError, Stopped

_POLL_S, _PUBLISH_S = 0.5, 2.0  # intervals of checks, and of published heartbeats
# If a rank has announced that it leaves normally, this rank should do so soon, too. The ended rank
# counts as dead if this rank still runs after this time.
_LEAVING_S = 10.0
_READING_S = 1.5  # time for the other ranks to read the store, before rank 0 ends and the store too
_FROZEN_S = 6.0  # a process without a new heartbeat for this long is frozen (suspended)
_UNANSWERED_S = 15.0  # a call to the store that takes longer counts as unanswered
_DIAGNOSIS_S = 30.0  # time for the watchdog thread to name the dead rank and end this process
_START_TIMEOUT = timedelta(minutes=30)  # imports from slow shared disks take minutes
_END_REASON = "watchdog/end-reason"  # key of the announced reason in the store


class Watchdog:
    """Watchdog thread, as a context manager for all collective work; every rank enters it.

    `timeout_s`: longest time of a phase. `stop_reason_before_loop`: returns the reason of a stop
    request that arrived before the training loop, else None; after such a request all ranks end.
    `on_end`: called with the reason and the exit code before the process ends. One rank calls it:
    rank 0, or another rank if rank 0 is dead.
    """

    def __init__(
        self,
        session: Session,
        heartbeat: Heartbeat,
        timeout_s: float,
        *,
        stop_reason_before_loop: Callable[[], str | None],
        on_end: Callable[[str, int], None],
    ) -> None:
        self._placement, self._heartbeat, self._timeout_s = session.placement, heartbeat, timeout_s
        self._channel = session.open_channel()  # None for a single process
        self._stop_reason_before_loop, self._on_end = stop_reason_before_loop, on_end
        self._closed = threading.Event()
        # An error of the main thread which shows that another rank has ended.
        self._lost_connection: BaseException | None = None
        self._main_thread = threading.get_ident()
        self._siblings: dict[int, psutil.Process] = {}  # processes of other ranks on this machine
        self._rank_zero_host = ""
        self._ended_since: dict[int, float] = {}  # rank -> time when it was first seen as ended
        self._published_at = 0.0  # time of the last published heartbeat
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
            is_on_one_rank = isinstance(error, SingleRankError)
            is_on_all_ranks = isinstance(error, RankZeroError) and not is_on_one_rank
            if error is None or is_on_all_ranks:  # all ranks leave at the same time
                self._channel.set(_key("left", self._placement.rank), "")
            else:
                name = "" if is_on_one_rank else f"{type(error).__name__}: "
                self._announce(f"rank {self._placement.rank}: {name}{error}")
                time.sleep(_READING_S)
        except RuntimeError:
            return  # the store and rank 0 have ended

    def _watch(self) -> None:
        """Publish heartbeats and check all ranks, until the context ends. The watchdog thread."""
        while not self._closed.wait(_POLL_S):
            try:
                if self._channel is not None:
                    self._check_ranks()
                if self._lost_connection is not None:
                    self._end_for_lost_connection(self._lost_connection)
                if (reason := self._stop_reason_before_loop()) is not None:
                    self._stop_all(stopped_early(reason))
                if self._is_hanging():
                    self._end_for_hang()
            except RuntimeError:  # the store has ended, and so has rank 0, which serves it
                if self._closed.wait(_POLL_S + 2.0):
                    return
                self._end_for_dead_rank(0)

    def _watch_without_store(self) -> None:
        """Detect that rank 0 is frozen. The fallback thread.

        The store of a frozen rank 0 does not answer, so the watchdog thread is blocked in a call.
        """
        while not self._closed.wait(_POLL_S):
            if self._is_hanging(extra_s=_UNANSWERED_S):
                text = (
                    f"no progress for {self._limit_s():.0f} s: rank 0 on {self._rank_zero_host} "
                    f"does not answer, rank {self._placement.rank} is {self._heartbeat.position}"
                    f"{phases.checkpoint_note(self._heartbeat.step)}"
                )
                is_reporter = self._is_lowest_alive_here(except_ranks=[0])
                if is_reporter:
                    _print_message(text)
                    self._kill_frozen([0])
                self._end_this_rank(text, is_reporter=is_reporter)

    def _check_ranks(self) -> None:
        self._leave_if_announced()
        if time.monotonic() - self._published_at > _PUBLISH_S:
            self._publish()
        for rank, process in self._siblings.items():
            if has_ended(process) and not self._may_have_left(rank):
                self._end_for_dead_rank(rank)

    def _leave_if_announced(self) -> None:
        """End this rank if another one has announced a reason to end."""
        if self._channel.check([_END_REASON]):
            reason = json.loads(self._channel.get(_END_REASON))
            self._end_this_rank(
                reason["text"], is_reporter=self._placement.rank == 0, code=reason["code"]
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
        local_size = self._placement.local_size
        first_rank = self._placement.rank // local_size * local_size
        for rank in range(first_rank, first_rank + local_size):
            process = json.loads(self._channel.get(_key("process", rank)))
            if rank != self._placement.rank and process["host"] == socket.gethostname():
                with suppress(psutil.NoSuchProcess):  # the rank is in another container
                    self._siblings[rank] = psutil.Process(process["pid"])

    def _may_have_left(self, rank: int) -> bool:
        """Whether a rank that has ended may have left normally, as all ranks do in a moment.

        This is assumed for a short time after its end, and longer if the rank has announced that it
        leaves.
        """
        since = self._ended_since.setdefault(rank, time.monotonic())
        limit_s = _LEAVING_S if self._channel.check([_key("left", rank)]) else _POLL_S
        return time.monotonic() - since < limit_s

    def _is_lowest_alive_here(self, except_ranks: Collection[int] = ()) -> bool:
        """Whether this rank has the lowest number of the ranks that are alive on its machine."""
        for rank, process in self._siblings.items():
            if rank < self._placement.rank and rank not in except_ranks and not has_ended(process):
                return False
        return True

    def _end_for_dead_rank(self, rank: int) -> None:
        """End because a rank died without a message; only one of the other ranks reports it."""
        text = (
            f"rank {rank} ended without a message, as after a kill or if memory is exhausted, "
            f"while rank {self._placement.rank} was {self._heartbeat.position}"
        )
        try:
            is_first = self._announce(text)
        except RuntimeError:  # the store ended with rank 0
            is_first = self._is_lowest_alive_here()
        if is_first:
            _print_message(text)
        reports_for_rank_zero = rank == 0 and is_first
        self._end_this_rank(text, is_reporter=self._placement.rank == 0 or reports_for_rank_zero)

    def _is_hanging(self, extra_s: float = 0.0) -> bool:
        """Whether this rank's phase lasts longer than its time limit and `extra_s`."""
        if self._heartbeat.phase in phases.UNWATCHED_PHASES:
            return False
        if self._placement.rank != 0:
            extra_s += 5.0  # so that rank 0 announces the hang, if it can
        return time.monotonic() - self._heartbeat.since > self._limit_s() + extra_s

    def _limit_s(self) -> float:
        """Time limit of the present phase in seconds."""
        is_loading = self._heartbeat.phase in phases.LOADING_PHASES
        return max(self._timeout_s, phases.LOADING_LIMIT_S) if is_loading else self._timeout_s

    def _end_for_hang(self) -> None:
        """End because this rank makes no progress, with a message about the rank that blocks it."""
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
        """End after a lost connection. A rank without new heartbeats counts as dead."""
        if self._channel is not None:
            _, frozen = self._compare_heartbeats()
            if frozen:
                self._end_for_dead_rank(frozen[0])
        text = f"rank {self._placement.rank}: lost its connection to another rank: {error}"
        if self._channel is None or self._announce(text):
            _print_message(text)
        self._end_this_rank(text, is_reporter=self._placement.rank == 0)

    def _compare_heartbeats(self) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """Heartbeats of all ranks, and the ranks without a new heartbeat within 6 s."""
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
        """Write this rank's heartbeat to the store."""
        self._published_at = time.monotonic()
        self._channel.set(
            _key("heartbeat", self._placement.rank), json.dumps(self._heartbeat_json())
        )

    def _read_heartbeats(self) -> dict[int, dict[str, Any]]:
        """The heartbeats in the store, as rank -> heartbeat."""
        keys = {rank: _key("heartbeat", rank) for rank in range(self._placement.world_size)}
        published = {rank: key for rank, key in keys.items() if self._channel.check([key])}
        return {rank: json.loads(self._channel.get(key)) for rank, key in published.items()}

    def _heartbeat_json(self) -> dict[str, Any]:
        """The heartbeat as it is published, with the line of code that the main thread executes."""
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
        reason = json.dumps({"text": text, "code": code, "by": self._placement.rank})
        announced = self._channel.compare_set(_END_REASON, "", reason)
        return bool(announced.decode() == reason)

    def _end_this_rank(self, text: str, *, is_reporter: bool, code: int = 1) -> NoReturn:
        """End this process. `is_reporter`: whether this rank calls `on_end`."""
        stop_displays()  # another rank may have printed the message
        if self._placement.rank == 0 and self._channel is not None:
            time.sleep(_READING_S)
        if is_reporter:
            # Called last, because the main thread continues until the process ends.
            self._on_end(text, code)
        end_process(code)


def _print_message(text: str) -> None:
    """Print why the run ends; one rank does so."""
    stop_displays()
    print_last_message(text)


def _key(name: str, rank: int) -> str:
    """Key of a rank's value in the store."""
    return f"watchdog/{name}/{rank}"
