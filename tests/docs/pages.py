"""The Markdown pages of the project: their links, anchors, code and commands."""

import re
from pathlib import Path

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
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(
    r"(?:\blaunch/([a-z]+)\.py|\brankzero ([a-z]+)|\bpipeline\.cli\.(\w+))([^\n`]*)"
)


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
    return [body for name, body in _FENCE.findall(text) if name == language]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(verb, arguments) of each `launch/VERB.py ...` and `rankzero VERB ...` of a page."""
    shell = ("console", "bash", "yaml", "dockerfile")  # yaml: comments with commands
    code = [body for language, body in _FENCE.findall(text) if language in shell]
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
