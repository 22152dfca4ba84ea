"""The end of a preflight that hangs: a disk, a driver or a link may never answer."""

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from pipeline.cluster.session import Session
from pipeline.errors import UserError

_POLL_S = 0.2
# The others leave after rank 0, which says why, or where it cannot.
_LATER_S = 15.0


class Limit:
    """A thread that ends this process where a stage takes longer than `limit_s`.

    `on_end` gets the stage, on rank 0 the ranks that are behind in it (None where ranks have not
    met), and says why.
    """

    def __init__(
        self, session: Session, limit_s: float, on_end: Callable[[str, list[int] | None], None]
    ) -> None:
        self._session, self._on_end = session, on_end
        self._limit_s = limit_s + (0.0 if session.is_rank_zero else _LATER_S)
        self._channel: Any = None
        self._stage, self._number, self._since = "meeting", 0, time.monotonic()
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

    def enter(self, stage: str) -> None:
        """This rank's main thread has come to the next stage."""
        self._stage, self._number, self._since = stage, self._number + 1, time.monotonic()
        if self._channel is not None:
            self._channel.set(_key(self._session.placement.rank), str(self._number))

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_S):
            if time.monotonic() - self._since > self._limit_s:
                self._on_end(self._stage, self._behind())
                os._exit(UserError.exit_code)

    def _behind(self) -> list[int] | None:
        """Ranks that have come least far, this one among them where it is one."""
        if self._channel is None or not self._session.is_rank_zero:
            return None
        come = {}
        for rank in range(self._session.placement.world_size):
            is_shown = self._channel.check([_key(rank)])
            come[rank] = int(self._channel.get(_key(rank))) if is_shown else 0
        return [rank for rank, number in come.items() if number == min(come.values())]


def _key(rank: int) -> str:
    return f"preflight/{rank}"
