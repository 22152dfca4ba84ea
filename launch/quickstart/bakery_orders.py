"""Random messages of customers to a bakery, each with the facts of its order."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FACTS = ("item", "quantity", "size", "day", "time", "delivery")  # the answer's keys, in order


def orders(rng: random.Random, *, is_heldout: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield messages with their facts, endlessly. Each slot of a message gets a random phrase."""
    bank = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text("utf-8"))
    bank["frame"] += 6 * bank["held_out_frame"] if is_heldout else []  # for about half of the rows
    choices = bank | {key: [(k, p) for k in bank[key] for p in bank[key][k]] for key in FACTS}
    choices |= {slot: bank[slot] + 3 * len(bank[slot]) * [""] for slot in ("hello", "bye")}
    draws = {slot: shuffled(values, rng) for slot, values in choices.items()}
    while True:
        phrase = {slot: next(draw) for slot, draw in draws.items()}
        facts = {key: phrase[key][0] for key in FACTS}
        phrase |= {key: phrase[key][1] for key in FACTS}
        phrase |= {"digits": facts["quantity"], "item": phrase["item"][facts["quantity"] > 1]}
        phrase["number"] = phrase["nth"][:-2]
        phrase["order"] = phrase["sized_order" if facts["size"] else "order"].format(**phrase)
        phrase["day"], facts["day"] = (
            phrase["day"].format(**phrase),
            facts["day"].format(**phrase).lower(),
        )
        phrase["bare_day"] = phrase["day"].removeprefix("on ")
        facts |= {k: v for k, v in bank["unmentioned"].items() if f"{k}}}" not in phrase["frame"]}
        text = f"{phrase['hello']} {phrase['frame'].format(**phrase)} {phrase['bye']}".strip()
        text = re.sub(r"(^|[.?!] )[a-z]", lambda start: start[0].upper(), text)
        yield (text.lower().rstrip(".") if phrase["is_lower"] else text), facts


def shuffled(values: list[Any], rng: random.Random) -> Iterator[Any]:
    """Yield all values in random order, then again in another random order, endlessly.

    Only `rng.random()` is called, because its results are the same in every version of Python.
    """
    while True:
        yield from sorted(values, key=lambda _: rng.random())
