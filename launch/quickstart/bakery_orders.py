"""Random messages of customers to a bakery, each with the facts of its order."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from phrases import FACTS, phrase_draws


def orders(rng: random.Random, *, is_heldout: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield pairs of a message and its facts, endlessly.

    A message is a frame of phrases.yaml, such as "{want} {order} {day}.", in which each {slot} is
    replaced by a random phrase. About half of the held-out messages have frames that no training
    message has.
    """
    bank = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text("utf-8"))
    draws = phrase_draws(bank, rng, is_heldout=is_heldout)
    while True:
        phrases = {slot: next(draw) for slot, draw in draws.items()}
        facts = {slot: phrases[slot][0] for slot in FACTS}
        phrases |= {slot: phrases[slot][1] for slot in FACTS}
        _fill_slots(phrases, facts)
        # A frame mentions the day, for example, if it has {day} or {bare_day}.
        frame = phrases["frame"]
        facts |= {
            fact: value for fact, value in bank["unmentioned"].items() if f"{fact}}}" not in frame
        }
        text = f"{phrases['hello']} {frame.format(**phrases)} {phrases['bye']}".strip()
        text = re.sub(r"(^|[.?!] )[a-z]", lambda match: match[0].upper(), text)
        yield (text.lower().rstrip(".") if phrases["is_lower"] else text), facts


def _fill_slots(phrases: dict[str, Any], facts: dict[str, Any]) -> None:
    """Fill the slots within the phrases of item, order and day, and within the fact `day`."""
    singular, plural = phrases["item"]
    phrases["item"] = plural if facts["quantity"] > 1 else singular
    phrases["digits"] = facts["quantity"]
    phrases["number"] = phrases["nth"][:-2]  # 10th -> 10
    order = phrases["sized_order"] if facts["size"] else phrases["order"]
    phrases["order"] = order.format(**phrases)
    facts["day"] = facts["day"].format(**phrases).lower()
    phrases["day"] = phrases["day"].format(**phrases)
    phrases["bare_day"] = phrases["day"].removeprefix("on ")
