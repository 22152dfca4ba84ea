"""Documents for a person: what is trained in colour, or in [[brackets]] where there is none."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from pipeline.data.prepared import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def show_documents(
    console: Console, split: Split, tokenizer: "PreTrainedTokenizerBase", count: int
) -> None:
    """Print the first documents of a split, as they are trained."""
    for i in range(min(count, len(split))):
        ids, supervised = (column.tolist() for column in split.document(i))
        console.rule(f"document {i}: {sum(supervised):,} of {len(ids):,} tokens are trained")
        shown = Text()
        for text, is_supervised in supervised_runs(ids, supervised, tokenizer):
            if console.is_terminal:
                shown.append(text, "bold green" if is_supervised else "dim")
            else:
                shown.append(f"[[{text}]]" if is_supervised else text)
        console.print(shown, soft_wrap=True)


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
