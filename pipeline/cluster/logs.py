"""Console output of this project's log messages.

Modules log to `logging.getLogger(__name__)`. Rank 0 shows messages of level INFO and above, other
ranks those of level WARNING and above. If a program that imports this package has configured
logging, that program's handlers are used instead.
"""

import logging
import math
import os
import re
import shutil
import sys
import textwrap
import time
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

    Warnings of libraries are hidden, because every rank would print them.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    libraries = r"(torch|transformers|peft|deepspeed|bitsandbytes)\b"
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=libraries)
    logger = logging.getLogger(_PROJECT)
    if not logger.hasHandlers():
        logger.addHandler(_ConsoleHandler())
        logger.setLevel(logging.INFO)


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


class _ConsoleHandler(logging.Handler):
    """Handler that writes to `sys.stdout`, which may be redirected during a run."""

    last_output = math.inf  # time of the last message; infinite before the first one

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record. Other ranks than 0 print only warnings and errors, with their rank."""
        rank = current_rank()
        if rank == 0:
            text = fit_to_terminal(self.format(record))
            print(text, flush=True)  # noqa: T201 - this handler is the console output
            _ConsoleHandler.last_output = time.monotonic()
        elif record.levelno >= logging.WARNING:
            print(f"rank {rank}: {self.format(record)}", flush=True)  # noqa: T201


def seconds_without_output() -> float:
    """Seconds since the last message of this process on the console; 0 before the first one."""
    return max(0.0, time.monotonic() - _ConsoleHandler.last_output)


def fit_to_terminal(text: str) -> str:
    """The text with its lines wrapped to the terminal's width; unchanged without a terminal."""
    if sys.stdout is None or not sys.stdout.isatty():
        return text
    return wrap_lines(text, shutil.get_terminal_size().columns)


def wrap_lines(text: str, width: int) -> str:
    """Break lines of more than `width` characters between words.

    If a line begins with a word and two or more spaces, as in a table, its continuation lines are
    indented as far as the text after these spaces. Those of an indented line have its indentation,
    and those of other lines are indented by 2.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        first_column = re.match(r" *\S+ {2,}", line) or re.match(" {2,}", line)
        indent = " " * (min(first_column.end(), width // 2) if first_column else 2)
        lines += textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(lines)
