"""Console logging of the command line: plain lines on standard output.

Modules log to `logging.getLogger(__name__)`. INFO is shown by rank 0 only, WARNING by every rank.
If the calling program has configured logging, its handlers are used instead.
"""

import logging
import os

_PROJECT = "pipeline"
# The launchers' rank variables, in order of precedence. Read directly, because messages are logged
# before `Placement` exists.
_RANK_NAMES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def configure_logging() -> None:
    """Install the console handler, unless this process has configured logging already."""
    logger = logging.getLogger(_PROJECT)
    if not logger.hasHandlers():
        logger.addHandler(_Console())
        logger.setLevel(logging.INFO)


def current_rank() -> int:
    """This process's rank as the launcher gave it; 0 without a launcher."""
    values = (os.environ.get(name, "") for name in _RANK_NAMES)
    return next((int(value) for value in values if value.isdigit()), 0)


class _Console(logging.Handler):
    """Writes to the current `sys.stdout`, which a progress bar or a caller may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record. Ranks other than 0 print only warnings and errors, prefixed by rank."""
        rank = current_rank()
        if rank == 0:
            print(self.format(record), flush=True)  # noqa: T201 - the terminal of the run
        elif record.levelno >= logging.WARNING:
            print(f"rank {rank}: {self.format(record)}", flush=True)  # noqa: T201 - the same
