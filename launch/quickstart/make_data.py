"""Write the demonstration's data: customers' messages to a bakery -> JSON for its till."""

import json
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

SEED, NUM_TRAIN, NUM_HELDOUT = 7, 400, 60
FACTS = ("item", "quantity", "size", "day", "time", "delivery")  # the answer's keys, in order


def make_data(folder: Path) -> None:
    """Write train.jsonl and heldout.jsonl; no item is held out in a quantity that train has."""
    bank = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text("utf-8"))
    train = list(islice(orders(bank, rng := random.Random(SEED)), NUM_TRAIN))
    seen = {(facts["item"], facts["quantity"]) for _, facts in train}
    bank["frame"] += 6 * bank["held_out_frame"]  # for about half of the held-out rows
    fresh = (row for row in orders(bank, rng) if (row[1]["item"], row[1]["quantity"]) not in seen)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"train": train, "heldout": islice(fresh, NUM_HELDOUT)}.items():
        path, lines = folder / f"{name}.jsonl", ""
        for text, facts in rows:
            contents = ("Order to JSON", text, json.dumps(facts, separators=(",", ":")))
            said = zip(("system", "user", "assistant"), contents, strict=True)
            chat = [{"role": role, "content": content} for role, content in said]
            lines += json.dumps({"messages": chat}) + "\n"
        if not path.exists() or path.read_text("utf-8") != lines:
            path.with_suffix(".partial").write_text(lines, "utf-8")
            path.with_suffix(".partial").replace(path)


def orders(bank: dict[str, Any], rng: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compose messages and their facts without end; every slot is dealt on its own."""
    cards = bank | {key: [(k, said) for k in bank[key] for said in bank[key][k]] for key in FACTS}
    cards |= {slot: bank[slot] + 3 * len(bank[slot]) * [""] for slot in ("hello", "bye")}
    decks = {slot: deal(deck, rng) for slot, deck in cards.items()}
    while True:
        said = {slot: next(deck) for slot, deck in decks.items()}
        facts = {key: said[key][0] for key in FACTS}
        said |= {key: said[key][1] for key in FACTS}
        said |= {"digits": facts["quantity"], "item": said["item"][facts["quantity"] > 1]}
        said["number"] = said["nth"][:-2]
        said["order"] = said["sized_order" if facts["size"] else "order"].format(**said)
        said["day"], facts["day"] = said["day"].format(**said), facts["day"].format(**said).lower()
        said["bare_day"] = said["day"].removeprefix("on ")
        facts |= {k: v for k, v in bank["unsaid"].items() if f"{k}}}" not in said["frame"]}
        text = f"{said['hello']} {said['frame'].format(**said)} {said['bye']}".strip()
        text = re.sub(r"(^|[.?!] )[a-z]", lambda start: start[0].upper(), text)
        yield (text.lower().rstrip(".") if said["is_lower"] else text), facts


def deal(cards: list[Any], rng: random.Random) -> Iterator[Any]:
    """Deal the cards again and again; of random's methods only random() is the same everywhere."""
    while True:
        yield from sorted(cards, key=lambda _: rng.random())
