"""Logging of the commands to the console.

Modules log to `logging.getLogger(__name__)`. Rank 0 shows messages from level INFO, other ranks
from WARNING. If the calling program has configured logging, its handlers are used instead.
"""

import logging
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Sequence

_PROJECT = "pipeline"
# The launchers' variables with the rank and the local rank, in order of precedence. They are read
# here because messages are logged before there is a `Placement`.
_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_LOCAL_RANKS = (
    "LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID",
    "PMI_LOCAL_RANK",
)  # fmt: skip


def configure_logging() -> None:
    """Install the console handler, unless logging has been configured already.

    Warnings of libraries, which every rank would print, are hidden.
    """
    _silence_library_warnings()
    logger = logging.getLogger(_PROJECT)
    if not logger.hasHandlers():
        logger.addHandler(_Console())
        logger.setLevel(logging.INFO)


def _silence_library_warnings() -> None:
    """Hide warnings of libraries, which every rank would print."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    libraries = r"(torch|transformers|peft|deepspeed|bitsandbytes)\b"
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=libraries)


def show_details() -> None:
    """Show messages of level DEBUG as well, for `--verbose`."""
    logging.getLogger(_PROJECT).setLevel(logging.DEBUG)


def current_rank() -> int:
    """The rank of this process, from the launcher's variables; 0 without a launcher."""
    return _first_number(_RANKS)


def current_local_rank() -> int:
    """The local rank of this process, from the launcher's variables; 0 without a launcher."""
    return _first_number(_LOCAL_RANKS)


def _first_number(names: Sequence[str]) -> int:
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdigit()), 0)


class _Console(logging.Handler):
    """Handler that writes to the present `sys.stdout`, which may change during a run."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record. Other ranks than 0 print only warnings and errors, with their rank."""
        rank = current_rank()
        if rank == 0:
            text = self.format(record)
            text = wrapped(text, shutil.get_terminal_size().columns) if _is_terminal() else text
            print(text, flush=True)  # noqa: T201 - the terminal of the run
        elif record.levelno >= logging.WARNING:
            print(f"rank {rank}: {self.format(record)}", flush=True)  # noqa: T201 - the same


def wrapped(text: str, width: int) -> str:
    """Text with long lines broken between words, and aligned behind the first column of a line."""
    lines: list[str] = []
    for line in text.split("\n"):
        column = re.match(r"\S* {2,}", line)
        indent = " " * (min(column.end(), width // 2) if column else 2)
        lines += textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(lines)


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()
