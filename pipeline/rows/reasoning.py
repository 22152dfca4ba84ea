"""Reasoning tags in the texts of a row, such as <think> and </think>."""

import re

from pipeline.rows.examples import RowError

_NAME = "(?:seed:)?think|thinking|thought|reasoning"
_OPENING = re.compile(rf"\s*(?:<({_NAME})>|\[THINK\])")
# A tag in quotes, straight or typographic, is text about the tag.
_CLOSING = re.compile(rf"(?<![`'\"\u201c\u2018])(?:</({_NAME})>|\[/THINK\])")


def require_closed_reasoning(text: str, name: str) -> None:
    """Raise RowError if a trained text opens reasoning and never closes it."""
    opened = _OPENING.match(text)
    closing = (f"</{opened[1]}>" if opened[1] else "[/THINK]") if opened else ""
    if opened and closing not in text:
        raise RowError(
            f"{name} begins with {opened[0].strip()}, which is never closed: the answer was cut "
            f"off; remove the row, or close the reasoning with {closing}"
        )


def closing_tag(text: str, start: int = 0, stop: int | None = None) -> re.Match[str] | None:
    """The first tag between two offsets of a text that closes reasoning."""
    return _CLOSING.search(text, start, len(text) if stop is None else stop)


def require_opened_reasoning(tag: re.Match[str], before: str, name: str) -> None:
    """Raise RowError if the text before a closing tag does not open the reasoning."""
    opening = tag[0].replace("/", "")
    # A tag of XML may have attributes, such as <thought id="1">.
    if not re.search(rf"{re.escape(opening[:-1])}(?:\s[^<>]*)?{re.escape(opening[-1])}", before):
        raise RowError(
            f"{name} has {tag[0]}, and neither the row nor the prompt has {opening} before it: the "
            f"model would learn to close reasoning that it never opened; add {opening}, or remove "
            "the text before the answer"
        )
