"""Content digests of rows, and the rows that they hold out.

A digest is a hash of what a row says, without the spelling of its JSON and with every run of white
space as one space: rows that differ in nothing else are duplicates and lie in the same split.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.config.settings import RunSettings
from pipeline.data.dataset.reader import Array
from pipeline.data.prepare.lines import Chunk, read_line
from pipeline.rows.examples import Completion, Conversation, Example, Text

NOTHING_HELD_OUT, _ALL = 0, 2**64
_SPREAD = 0x9E3779B97F4A7C15  # odd, so that it maps digests one to one; 2**64 / golden ratio


def digest(example: Example, *, keeps_space: bool = False) -> int:
    """64 bits of an example's content; `keeps_space`: the digest of data prepared before 0.2."""
    parts = [type(example).__name__]
    if isinstance(example, Conversation):
        for message in example.messages:
            parts += [message.role, message.content, str(message.is_trained)]
            parts.append(_sorted_json(message.others))
        parts += map(_sorted_json, example.tools)
    elif isinstance(example, Completion):
        parts += [example.prompt, example.completion]
    elif isinstance(example, Text):
        parts.append(example.text)
    else:
        parts += [*map(str, example.ids), *map(str, example.supervised)]
    if not keeps_space:
        parts = [" ".join(part.split()) for part in parts]
    content = "".join([f"{len(part)}:{part}" for part in parts])
    number = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(number)


def _sorted_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, default=str) if value else ""


def threshold_of_share(share: float) -> int:
    """`is_held_out`'s threshold for a share of all rows."""
    return int(share * _ALL)


def threshold_of_rows(digests: Array, rows: int) -> int:
    """`is_held_out`'s threshold for this many of the rows with these digests, (N,) uint64.

    Duplicates stay together: where the last row has some, more rows are held out.
    """
    spread = np.sort(digests * np.uint64(_SPREAD))
    return int(spread[min(rows, len(spread)) - 1]) + 1 if len(spread) else NOTHING_HELD_OUT


def is_held_out(digest: int, threshold: int) -> bool:
    """Whether a row belongs to the held-out split; a function of its content alone.

    The digest is hashed once more: a source's weight selects by the digest, independently of this.
    """
    return (digest * _SPREAD) % _ALL < threshold


class ChunkDigests:
    """Chunk -> digests of the rows that have an example, (N,) uint64. Needs no tokenizer."""

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings

    def __call__(self, chunk: Chunk) -> Array:
        """Digests in the order of the lines."""
        read = (read_line(line, self._settings)[1] for line in chunk.lines)
        return np.array([digest(r.example) for r in read if not isinstance(r, str)], np.uint64)
