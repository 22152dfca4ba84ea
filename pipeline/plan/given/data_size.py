"""DataSize: how many documents and tokens an epoch has, counted by prepare or estimated."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Documents of an epoch and their tokens, truncated to `max_length`, without padding.

    `longest`: tokens of the longest document, None where not all have been read. `is_exact`:
    counted by prepare rather than estimated. `sequences`: of an epoch, None before prepare.
    `count_longer` gives the number of documents with more than so many tokens.
    """

    documents: int
    tokens: int
    longest: int | None
    is_exact: bool
    sequences: int | None = None
    count_longer: Callable[[int], int] | None = field(default=None, compare=False, repr=False)

    @property
    def mean_tokens(self) -> float:
        """Tokens of a document."""
        return self.tokens / self.documents

    def longer_than(self, tokens: int) -> int | None:
        """Documents with more tokens than this; None where lengths have not been counted."""
        return None if self.count_longer is None else self.count_longer(tokens)
