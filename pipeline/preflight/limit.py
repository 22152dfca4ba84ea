"""The end of a preflight that hangs: a disk, a driver or a link may never answer."""

import json
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from pipeline.cluster.exits import end_process
from pipeline.cluster.session import Session
from pipeline.errors import UserError

_POLL_S = 0.2
# The others leave after rank 0, which says why, or where it cannot.
_LATER_S = 15.0
_MEETING = "meeting"
# Until ranks have met, each imports torch, all from one slow shared disk perhaps.
_MEETING_TIMES = 3


class Limit:
    """A thread that ends this process where it stays in one place for longer than `limit_s`.

    Three times that is given to meet. `on_end` is told that place and who is there: on rank 0 the
    ranks that have come least far, on the others and where ranks have not met nobody.
    """

    def __init__(
        self, session: Session, limit_s: float, on_end: Callable[[str, list[int]], None]
    ) -> None:
        self._session, self._on_end = session, on_end
        self._limit_s = limit_s
        self._later_s = 0.0 if session.is_rank_zero else _LATER_S
        self._channel: Any = None
        self._where, self._beats, self._since = _MEETING, 0, time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="limit", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join()

    def met(self) -> None:
        """All ranks can be asked from here on where they are."""
        self._channel = self._session.open_channel()

    def beat(self, where: str) -> None:
        """The main thread has come to another place; every rank to the same ones in one order."""
        self._where, self._beats, self._since = where, self._beats + 1, time.monotonic()
        if self._channel is not None:
            self._channel.set(_key(self._session.placement.rank), json.dumps([self._beats, where]))

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_S):
            patience = self._limit_s * (1 if self._beats_are_shown else _MEETING_TIMES)
            if time.monotonic() - self._since > patience + self._later_s:
                try:
                    self._on_end(*self._behind())
                finally:
                    end_process(UserError.exit_code)

    @property
    def _beats_are_shown(self) -> bool:
        return self._channel is not None or self._session.placement.world_size == 1

    def _behind(self) -> tuple[str, list[int]]:
        if self._channel is None:
            is_waiting = self._where == _MEETING or self._where.startswith("after ")
            is_alone = self._session.placement.world_size == 1
            return (self._where, [0]) if is_alone or not is_waiting else (_MEETING, [])
        if not self._session.is_rank_zero:
            return self._where, []
        come = [self._beats_of(rank) for rank in range(self._session.placement.world_size)]
        least, where = min(come)
        return where, [rank for rank, (beats, _) in enumerate(come) if beats == least]

    def _beats_of(self, rank: int) -> tuple[int, str]:
        if not self._channel.check([_key(rank)]):
            return 0, _MEETING
        beats, where = json.loads(self._channel.get(_key(rank)))
        return beats, where


def _key(rank: int) -> str:
    return f"preflight/{rank}"
