"""Documents for a person: what is trained in colour, or in [[brackets]] where there is none."""

import unicodedata
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from pipeline.data.dataset.reader import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def show_documents(
    console: Console, split: Split, tokenizer: "PreTrainedTokenizerBase", count: int
) -> None:
    """Print the first documents of a split, as they are trained."""
    has_colour = console.is_terminal and console.color_system is not None  # TERM=dumb has none
    for i in range(min(count, len(split))):
        ids, supervised = (column.tolist() for column in split.document(i))
        console.rule(f"document {i}: {sum(supervised):,} of {len(ids):,} tokens are trained")
        shown = Text()
        for run, is_supervised in supervised_runs(ids, supervised, tokenizer):
            text = _without_controls(run)
            if has_colour:
                shown.append(text, "bold green" if is_supervised else "dim")
            else:
                shown.append(f"[[{text}]]" if is_supervised else text)
        console.print(shown, soft_wrap=True)


def number_of_documents(text: str) -> int:
    """What `--show` is given."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not a number of documents, such as 3")
    return int(text)


def _without_controls(text: str) -> str:
    """With an escape in place of what a terminal would act upon."""
    return "".join(
        f"\\x{ord(character):02x}"
        if unicodedata.category(character) == "Cc" and character not in "\n\t"
        else character
        for character in text
    )


def supervised_runs(
    ids: Sequence[int], supervised: Sequence[bool], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[str, bool]]:
    """A document as text, cut where supervision begins and ends."""

    def decode(end: int) -> str:
        return str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))

    start, before = 0, ""
    for end in range(1, len(ids) + 1):
        if end == len(ids) or supervised[end] != supervised[start]:
            # Decoded from the beginning: a run of its own may lose the space that it begins with.
            text = decode(end)
            yield text[len(before) :], bool(supervised[start])
            start, before = end, text
