"""The Markdown pages of the project: their links, anchors, code and commands."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from tests import ROOT

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        ROOT / "slurm/README.md",
        ROOT / "ds_configs/README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(
    r"(?:\blaunch/([a-z]+)\.py|\brankzero ([a-z]+)|\bpipeline\.cli\.(\w+))([^\n`]*)"
)
_PROGRAM = re.compile(
    r"((?:\.venv/bin/)?(?:python3? launch/|python3? -m |deepspeed |rankzero |torchrun )|accelerate "
    r"|srun |mpirun |sbatch |make )\S"
)
# Ends a command, outside of quotes.
_SEPARATOR = re.compile(r"""\s*(?:&&|\|\||[;|])\s*(?=(?:[^'"]|'[^']*'|"[^"]*")*$)""")
_SHELL = ("console", "bash")  # languages of code blocks whose commands a test runs
# Languages whose blocks `commands_outside_shell_blocks` skips. No test runs lines of Dockerfiles.
_NOT_SEARCHED = (*_SHELL, "dockerfile")


@dataclass(frozen=True)
class CommandLine:
    """A command of a page without its comment.

    `needs`: the machine or program that the page names in a comment `# needs ...` above it.
    """

    page: str
    text: str
    needs: str | None


def command_lines(page: str, text: str) -> Iterator[CommandLine]:
    """The lines of the shell blocks of a page, and its code spans with a program and arguments.

    If lines of a block begin with `$`, the others are output.
    """
    for block in (block for language in _SHELL for block in blocks(text, language)):
        lines, needs = block.replace("\\\n", " ").splitlines(), None
        has_output = any(line.startswith("$ ") for line in lines)
        for line in lines:
            if line.startswith("# needs "):
                needs = line.removeprefix("# needs ").strip() or None
            command = re.split(r"\s+#\s", line.removeprefix("$ "))[0].strip()
            is_output = has_output and not line.startswith("$ ")
            if command and not command.startswith("#") and not is_output:
                for part in commands_of_line(command):
                    yield CommandLine(page, part, needs)
    for span in re.findall(r"`([^`\n]+)`", _FENCE.sub("", text)):
        for part in commands_of_line(re.split(r"\s#\s", span)[0]):
            if _PROGRAM.match(part) and (part.startswith("make ") or len(part.split()) > 2):
                yield CommandLine(page, re.split(r"\s>\s", part)[0].strip(), None)


def commands_of_line(line: str) -> list[str]:
    """The commands of a line of shell, without `time` and variables before them."""
    parts = [re.sub(r"^((time|\w+=[^\s(]*) )+", "", part) for part in _SEPARATOR.split(line)]
    return [part.strip() for part in parts if part.strip()]


def commands_outside_shell_blocks(text: str) -> list[str]:
    """Lines with a command in a block that is not marked as shell, or in an indented block."""
    others = "".join(
        body for language, body in _FENCE.findall(text) if language not in _NOT_SEARCHED
    )
    indented = re.findall(r"^(?: {4}|\t)(.*)$", _FENCE.sub("", text), re.MULTILINE)
    return [
        line
        for line in (*others.splitlines(), *indented)
        if any(map(_PROGRAM.match, commands_of_line(line.strip().removeprefix("$ "))))
    ]


def without_code(text: str) -> str:
    """The page without code blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))


def links(text: str) -> list[str]:
    """Targets of the links of a page."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and the site make them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    slugs: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        slugs.add(slug)
    return slugs


def blocks(text: str, language: str) -> list[str]:
    """Code blocks of one language."""
    return [dedent(body) for name, body in _FENCE.findall(text) if name == language]


def project_commands(text: str) -> list[tuple[str, list[str]]]:
    """(verb, arguments) of each command of this project in a page.

    A command is `launch/VERB.py ...`, `rankzero VERB ...` or `pipeline.cli.VERB ...`.
    """
    languages = ("console", "bash", "yaml", "dockerfile")  # yaml: comments with commands
    code = [body for language, body in _FENCE.findall(text) if language in languages]
    code += re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))
    code += re.findall(r"^ {4}(python .*)$", text, re.MULTILINE)
    return [
        (match[1] or match[2] or match[3], arguments(match[4]))
        for body in code
        for match in _COMMAND.finditer(body.replace("\\\n", " "))
    ]


def arguments(rest: str) -> list[str]:
    """Words of a command line up to a comment, a pipe, a redirection or the next command."""
    rest = re.split(r"\s#|\s[|>]|&&|;", rest)[0]
    words = re.sub(r"[\[\]]", " ", rest).split()
    return [word for word in words if set(word) - set(".,)")]
