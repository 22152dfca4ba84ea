"""Print documents with the supervised text in colour, or in [[brackets]] without colour."""

import unicodedata
from argparse import ArgumentTypeError
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from pipeline.data.dataset.reader import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 8  # tokens decoded before a segment; no character consists of so many tokens


def show_documents(
    console: Console, split: Split, tokenizer: "PreTrainedTokenizerBase", count: int
) -> None:
    """Print the first `count` documents of a split, with the supervised text marked."""
    has_colour = console.is_terminal and console.color_system is not None  # not with TERM=dumb
    for i in range(min(count, len(split))):
        ids, supervised = (column.tolist() for column in split.document(i))
        console.rule(f"document {i}: {sum(supervised):,} of {len(ids):,} tokens are supervised")
        shown = Text()
        for segment, is_supervised in supervised_segments(ids, supervised, tokenizer):
            text = _without_controls(segment)
            if has_colour:
                shown.append(text, "bold green" if is_supervised else "dim")
            else:
                shown.append(f"[[{text}]]" if is_supervised else text)
        console.print(shown, soft_wrap=True)


def number_of_documents(text: str) -> int:
    """Parse the value of `--show`. Raises ArgumentTypeError."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not a number of documents, such as 3")
    return int(text)


def _without_controls(text: str) -> str:
    """Escape control characters, which a terminal would execute."""
    return "".join(
        f"\\x{ord(character):02x}"
        if unicodedata.category(character) == "Cc" and character not in "\n\t"
        else character
        for character in text
    )


def supervised_segments(
    ids: Sequence[int], supervised: Sequence[bool], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[str, bool]]:
    """Divide the text of a document into segments, and yield whether each is supervised.

    A segment is decoded together with earlier segments, of at least CONTEXT_TOKENS tokens if there
    are as many, because it may lose its leading space if it is decoded alone.
    """
    starts = deque([0])  # first token of the present segment, after those of its context

    def decode(end: int) -> str:
        tokens = list(ids[starts[0] : end])
        return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    for end in range(1, len(ids) + 1):
        start = starts[-1]
        if end == len(ids) or supervised[end] != supervised[start]:
            yield decode(end)[len(decode(start)) :], bool(supervised[start])
            starts.append(end)
            while starts[1] <= end - CONTEXT_TOKENS:
                starts.popleft()
