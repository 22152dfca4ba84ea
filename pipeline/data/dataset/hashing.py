"""Deterministic hashes and permutations, which do not depend on the version of numpy."""

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]


def mix(x: Hashes) -> Hashes:
    """Hash each element with SplitMix64 (Steele et al., OOPSLA 2014); overflow is intended."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_of(*words: int) -> np.uint64:
    """One hash of several integers from 0 to 2**64 - 1."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = mix(state ^ np.uint64(word))
    return np.uint64(state[0])


def hashes_of(count: int, *words: int) -> Hashes:
    """Hashes of 0, 1, ... `count` - 1; the words are the key of the hash function."""
    return mix(np.arange(count, dtype=np.uint64) ^ hash_of(*words))


def permutation(count: int, *words: int) -> npt.NDArray[np.int64]:
    """A permutation of 0, 1, ... `count` - 1; the words are its seed."""
    return np.argsort(hashes_of(count, *words), kind="stable").astype(np.int64)
