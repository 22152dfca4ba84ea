"""The argument parser of all commands, with the arguments that several commands share."""

import argparse
import re
import shutil
import textwrap
from pathlib import Path
from typing import NoReturn

from pipeline.commands import DOCS, command, script
from pipeline.config.load import load_settings
from pipeline.config.settings import RunSettings
from pipeline.errors import UserError


class Parser(argparse.ArgumentParser):
    """Argument parser of a verb, such as `train`. It raises UserError for a wrong command line.

    `run_main` prints a UserError on one rank only; argparse itself would print on every rank.

    `help_template`: docstring of the verb's module. {command} becomes `python launch/VERB.py` or
    `rankzero VERB`, as the user started it. {script} becomes the words that name the verb to the
    launcher `deepspeed`, and {docs} the folder of the pages that the text names.
    """

    def __init__(self, verb: str, help_template: str | None) -> None:
        program = command(verb)
        super().__init__(
            prog=program,
            description=_fitted(
                (help_template or "").format(command=program, script=script(verb), docs=DOCS),
                width=shutil.get_terminal_size().columns,
            ),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Called by argparse if the command line is wrong."""
        raise UserError(f"{self.prog}: {message}; --help lists the arguments")

    def add_run_file(self, *, is_required: bool = True) -> None:
        """Add RUN.yaml and `key=value` overrides.

        Parse with `parse_intermixed_args`, so that options may stand between the overrides.
        """
        self.add_argument(
            "run_file",
            type=Path,
            nargs=None if is_required else "?",
            help=f"run file ({DOCS}/configuration.md)",
        )
        self.add_argument(
            "overrides",
            nargs="*",
            default=[],
            metavar="key=value",
            help="settings for this command only",
        )

    def add_run_folder(self) -> None:
        """Add RUN_FOLDER."""
        self.add_argument("run_folder", type=Path, help="output_dir of a run")

    def add_verbose(self) -> None:
        """Add --verbose."""
        self.add_argument(
            "--verbose", action="store_true", help="show the whole plan and its reasons"
        )

    def add_local_rank(self) -> None:
        """Accept --local_rank, which DeepSpeed's launcher passes; its value is not used."""
        self.add_argument("--local_rank", help=argparse.SUPPRESS)


def _fitted(text: str, width: int) -> str:
    """A help text in lines of at most `width` characters. Blank lines separate its blocks.

    A block is prose, or one of commands. There, spaces separate a command from its description.
    """
    blocks = []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        if max(map(len, lines)) <= width:
            blocks.append(block)
        elif not any(re.search(r" {2}|\[|^ ", line) for line in lines):
            prose = " ".join(lines)
            # A path stays whole, so that it can be copied.
            blocks.append(
                textwrap.fill(prose, width, break_on_hyphens=False, break_long_words=False)
            )
        else:
            blocks.append("\n".join(_fitted_command(line, width) for line in lines))
    return "\n\n".join(blocks)


def _fitted_command(line: str, width: int) -> str:
    """A command, and its description in a line below it."""
    command_line, *descriptions = re.split(" {2,}", line.strip(), maxsplit=1)
    description = "".join(descriptions)
    if line.startswith(" " * 8):  # the description of a command above is continued
        command_line, description = "", line
    lines = [
        *textwrap.wrap(
            command_line, width, subsequent_indent="  ", break_on_hyphens=False,
            break_long_words=False,
        ),
        *textwrap.wrap(
            description.strip(), width, initial_indent="    ", subsequent_indent="    ",
            break_on_hyphens=False, break_long_words=False,
        ),
    ]  # fmt: skip
    return "\n".join(lines)


def require_folder(run_folder: Path) -> None:
    """Raise UserError unless a run folder given as an argument exists."""
    try:
        is_folder = run_folder.is_dir()
    except (OSError, ValueError):  # a name that is too long, or with a NUL
        is_folder = False
    if not is_folder:
        raise UserError(f"{run_folder} is not a folder; give the output_dir of a run")


def run_settings(run_folder: Path) -> RunSettings:
    """The settings in the run.yaml of a run folder. Raises UserError if the file is missing."""
    require_folder(run_folder)
    path = run_folder / "run.yaml"
    if not path.is_file():
        raise UserError(f"{run_folder} has no run.yaml; name the output_dir of a run")
    return load_settings(path)


def count(text: str) -> int:
    """Value of an argument that must be a whole number of at least 1."""
    is_number = text.isascii() and text.isdigit() and len(text) <= 9
    if not is_number or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 999999999")
    return int(text)


def positive(text: str) -> float:
    """Value of an argument that must be a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
