"""Log output of the verbs: plain lines on standard output.

Modules log to `logging.getLogger(__name__)`. INFO is for the user of a run and shown by rank 0;
WARNING is shown by every rank. A program that configures logging itself gets the records in its
own handlers instead.
"""

import logging
import os

_PROJECT = "pipeline"
# The first one that is set names this process, also before its placement is known.
_RANK_NAMES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def configure_logging() -> None:
    """Show the project's log records, unless this process has configured logging already."""
    logger = logging.getLogger(_PROJECT)
    if not logger.hasHandlers():
        logger.addHandler(_Console())
        logger.setLevel(logging.INFO)


def current_rank() -> int:
    """This process's rank as the launcher gave it; 0 without a launcher."""
    values = (os.environ.get(name, "") for name in _RANK_NAMES)
    return next((int(value) for value in values if value.isdigit()), 0)


class _Console(logging.Handler):
    """Writes to the standard output of the moment: a progress bar or a caller may replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record; of ranks other than 0 only warnings, with the rank."""
        rank = current_rank()
        if rank == 0:
            print(self.format(record), flush=True)  # noqa: T201 - the terminal of the run
        elif record.levelno >= logging.WARNING:
            print(f"rank {rank}: {self.format(record)}", flush=True)  # noqa: T201 - the same
