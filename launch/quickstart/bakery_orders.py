"""Random messages of customers to a bakery, each with the facts of its order."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FACTS = ("item", "quantity", "size", "day", "time", "delivery")  # the answer's keys, in order


def orders(rng: random.Random, *, is_heldout: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield pairs of a message and its facts, endlessly.

    A message is a frame of phrases.yaml, such as "{want} {order} {day}.", in which each {slot} is
    replaced by a random phrase. About half of the held-out messages have frames that no training
    message has.
    """
    bank = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text("utf-8"))
    if is_heldout:
        bank["frame"] += 6 * bank["held_out_frame"]
    choices = dict(bank)  # slot -> phrases; for a slot with a fact, pairs of fact and phrase
    for slot in FACTS:
        choices[slot] = [(fact, phrase) for fact in bank[slot] for phrase in bank[slot][fact]]
    for slot in ("hello", "bye"):
        num_empty = 3 * len(bank[slot])  # three of four messages have no greeting
        choices[slot] = bank[slot] + num_empty * [""]
    draws = {slot: shuffled(values, rng) for slot, values in choices.items()}
    while True:
        phrases = {slot: next(draw) for slot, draw in draws.items()}
        facts = {slot: phrases[slot][0] for slot in FACTS}
        phrases |= {slot: phrases[slot][1] for slot in FACTS}
        singular, plural = phrases["item"]
        phrases["item"] = plural if facts["quantity"] > 1 else singular
        phrases["digits"] = facts["quantity"]
        phrases["number"] = phrases["nth"][:-2]  # 10th -> 10
        order = phrases["sized_order"] if facts["size"] else phrases["order"]
        phrases["order"] = order.format(**phrases)
        facts["day"] = facts["day"].format(**phrases).lower()
        phrases["day"] = phrases["day"].format(**phrases)
        phrases["bare_day"] = phrases["day"].removeprefix("on ")
        # A frame mentions the day, for example, if it has {day} or {bare_day}.
        frame = phrases["frame"]
        facts |= {
            fact: value for fact, value in bank["unmentioned"].items() if f"{fact}}}" not in frame
        }
        text = f"{phrases['hello']} {frame.format(**phrases)} {phrases['bye']}".strip()
        text = re.sub(r"(^|[.?!] )[a-z]", lambda start: start[0].upper(), text)
        yield (text.lower().rstrip(".") if phrases["is_lower"] else text), facts


def shuffled(values: list[Any], rng: random.Random) -> Iterator[Any]:
    """Yield all values in random order, then again in another random order, endlessly.

    Only `rng.random()` is called, because its results are the same in every version of Python.
    """
    while True:
        yield from sorted(values, key=lambda _: rng.random())
