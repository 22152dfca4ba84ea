"""Every error that a user can meet.

    RankZeroError      exit 1: the run failed
    +-- UserError      exit 2: the input is wrong; one clear message, no traceback
    +-- Stopped        exit 75: stopped with a checkpoint, to be started again
    +-- OfOneRank      exit 1: on one rank alone, while the others go on

A message says what was found, where (file, line, key) and what would work.
"""


class RankZeroError(Exception):
    """A failure of the run that has been understood; its message is all that is shown."""

    exit_code = 1


class UserError(RankZeroError):
    """The run file, the data, the model folder or the machine is not what it must be."""

    exit_code = 2


class Stopped(RankZeroError):
    """The run stopped as it was asked to, with a checkpoint; starting it again goes on."""

    exit_code = 75


class OfOneRank(RankZeroError):
    """A failure that one rank alone meets: the others do not know of it, and must be told."""
