"""Phrases of customers' messages to a bakery, drawn at random."""

import random
from collections.abc import Iterator
from typing import Any

FACTS = ("item", "quantity", "size", "day", "time", "delivery")  # the answer's keys, in order


def phrase_draws(
    bank: dict[str, Any], rng: random.Random, *, is_heldout: bool
) -> dict[str, Iterator[Any]]:
    """Slot -> endless random phrases for it; for a slot with a fact, pairs of fact and phrase.

    `bank`: the content of phrases.yaml. About half of the frames drawn for held-out messages are in
    no training message.
    """
    choices = dict(bank)
    if is_heldout:
        choices["frame"] = bank["frame"] + 6 * bank["held_out_frame"]
    for slot in FACTS:
        choices[slot] = [(fact, phrase) for fact in bank[slot] for phrase in bank[slot][fact]]
    for slot in ("hello", "bye"):
        num_empty = 3 * len(bank[slot])  # three of four messages have no greeting
        choices[slot] = bank[slot] + num_empty * [""]
    return {slot: _shuffled(values, rng) for slot, values in choices.items()}


def _shuffled(values: list[Any], rng: random.Random) -> Iterator[Any]:
    """Yield all values in random order, then again in another random order, endlessly.

    Only `rng.random()` is called, because its results are the same in every version of Python.
    """
    while True:
        yield from sorted(values, key=lambda _: rng.random())
