"""Exceptions with a message for the user, and the exit code of each.

    RankZeroError            exit 1: the run failed
    +-- UserError            exit 2: the input is wrong; one clear message, no traceback
    +-- Stopped              exit 75: the run stopped with a checkpoint; start it again to resume
    +-- SingleRankError      exit 1: the run failed on one rank only

Each message says what is wrong, where (file, line, key) and what would work.
"""


class RankZeroError(Exception):
    """A failure with a known cause; its message is shown without a traceback."""

    exit_code = 1


class UserError(RankZeroError):
    """An error in the run file, the data, the model folder or the machine's set-up."""

    exit_code = 2


class Stopped(RankZeroError):
    """The run stopped on request and wrote a checkpoint; the next start resumes from it."""

    exit_code = 75


class SingleRankError(RankZeroError):
    """A failure on one rank only; unlike for other errors, this rank must inform the others."""
