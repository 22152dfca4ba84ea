"""Exceptions with a message for the user, and the exit code of each.

    RankZeroError            exit 1: the run failed
    +-- UserError            exit 2: the input is wrong
    +-- Stopped              exit 75: the run stopped with a checkpoint; start it again to resume
    +-- SingleRankError      exit 1: the run failed on one rank only

Each message has the problem, its location (file, line, key) and an input or action that would work.
"""

import re
from collections.abc import Sequence

# Control characters, except tab and newline: quoted from a user's file, they would change the
# terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MAX_LINES, _MAX_LINE_LENGTH = 200, 1200
# Numbers of characters that are kept at the start and at the end of a longer line: the start has
# the location, and the end has the remedy.
_HEAD, _TAIL = 700, 400


class RankZeroError(Exception):
    """A failure with a known cause; its message is shown without a traceback.

    The name is that of the project; it does not mean rank 0.
    Messages quote values from the user's files, so a long message is shortened and control
    characters are escaped.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(shorten(_CONTROL.sub(_escaped, message)))


class UserError(RankZeroError):
    """An error in the run file, the data, the model folder or the machine's set-up."""

    exit_code = 2


class Stopped(RankZeroError):
    """The run stopped on request and wrote a checkpoint; the next start resumes from it."""

    exit_code = 75


class SingleRankError(RankZeroError):
    """A failure on one rank only, so the watchdog of this rank informs the others.

    Every other RankZeroError is raised on all ranks.
    """


def _escaped(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]):02x}"


def first_few(items: Sequence[str], separator: str = ", ") -> str:
    """The first three items as text, and the number of further items."""
    more = f"{separator.strip(', ')} and {len(items) - 3} more" if len(items) > 3 else ""
    return separator.join(items[:3]) + more


def shorten(message: str) -> str:
    """Shorten a message: leave out the middle of long lines, and lines beyond _MAX_LINES."""
    lines = message.split("\n")
    for i, line in enumerate(lines[:_MAX_LINES]):
        if len(line) > _MAX_LINE_LENGTH:
            omitted = len(line) - _HEAD - _TAIL
            lines[i] = f"{line[:_HEAD]} [{omitted:,} characters left out] {line[-_TAIL:]}"
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES:] = [f"and {len(lines) - _MAX_LINES:,} more lines"]
    return "\n".join(lines)
