"""Content digests of rows, and the selection of held-out rows by them.

A digest is a hash of a row's example, that is, of its messages or texts. It does not depend on the
formatting of the row's JSON, and each run of white space counts as one space. Rows with equal
digests are duplicates and are in the same split.
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

# Thresholds for `is_held_out` that hold out no row and all rows.
NOTHING_HELD_OUT, _ALL = 0, 2**64
# Factor of the second hash: 2**64 / golden ratio, an odd number, so that no two digests become
# equal.
_SECOND_HASH_FACTOR = 0x9E3779B97F4A7C15


def digest(example: Example, *, keeps_space: bool = False) -> int:
    """64-bit hash of an example. `keeps_space`: as in version 0.1, white space counts exactly."""
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
    hashed = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(hashed)


def _sorted_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, default=str) if value else ""


def threshold_of_share(share: float) -> int:
    """Threshold for `is_held_out` that holds out this share of the rows."""
    return int(share * _ALL)


def threshold_of_rows(digests: Array, rows: int) -> int:
    """Threshold for `is_held_out` that holds out this number of the rows with these digests.

    `digests`: (N,) uint64. If the last held-out row has duplicates, they are held out too.
    """
    if not len(digests):
        return NOTHING_HELD_OUT
    second_hashes = np.sort(digests * np.uint64(_SECOND_HASH_FACTOR))
    return int(second_hashes[min(rows, len(second_hashes)) - 1]) + 1


def is_held_out(digest: int, threshold: int) -> bool:
    """Whether the row with this digest belongs to the held-out split.

    The digest is hashed again, because packing selects rows by the digest too, for a source with a
    weight such as 2.3, and the two selections must be independent.
    """
    return (digest * _SECOND_HASH_FACTOR) % _ALL < threshold


class ChunkDigests:
    """Computes the digests of a chunk's usable rows, (N,) uint64, without a tokenizer."""

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings

    def __call__(self, chunk: Chunk) -> Array:
        """Digests in the order of the lines."""
        digests = []
        for line in chunk.lines:
            _, result = read_line(line, self._settings)
            if not isinstance(result, str):  # a text is the reason why the row is bad
                digests.append(digest(result.example))
        return np.array(digests, np.uint64)
