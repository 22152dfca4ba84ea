"""Matching of regular expressions from settings, with a time limit."""

import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import UserError

_LIMIT_S = 2.0


class _TooSlowError(Exception):
    """Raised when the time limit has passed."""


def full_matches(pattern: str, names: Iterable[str], setting: str) -> list[str]:
    """The names that a regular expression matches completely.

    `setting`: the setting that error messages name. Raises UserError for an invalid pattern, and
    for a pattern that takes too long, such as `(a+)+b`: its time grows exponentially with the
    length of a name.
    """
    try:
        with _time_limit():
            compiled = re.compile(pattern)
            return [name for name in names if compiled.fullmatch(name)]
    except _TooSlowError:
        raise UserError(
            f"{setting}: {pattern!r} takes more than {_LIMIT_S:g} s to match; write it without "
            "nested repetitions, or list the names"
        ) from None
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{setting}: {pattern!r} is not a regular expression: {error}") from None


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise _TooSlowError in the body once the time limit has passed.

    A signal handler raises it, because `re` checks for signals while it matches. Threads other than
    the main thread have no limit, because they cannot handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise _TooSlowError

    handler = signal.signal(signal.SIGALRM, interrupt)
    seconds, interval = signal.setitimer(signal.ITIMER_REAL, _LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, seconds, interval)
        signal.signal(signal.SIGALRM, handler)
