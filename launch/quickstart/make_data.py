"""Generate the data of the quickstart: messages to a bakery, each with its order as JSON."""

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

from bakery_orders import orders

from pipeline.files import write_text

SEED, NUM_TRAIN, NUM_HELDOUT = 7, 540, 60


def make_data(
    folder: Path, heldout_seed: int | None = None, num_heldout: int = NUM_HELDOUT
) -> None:
    """Write train.jsonl and heldout.jsonl, which have no pair of item and quantity in common.

    `heldout_seed`: seed of the held-out rows; the training rows are always the same.
    """
    train = list(islice(orders(rng := random.Random(SEED), is_heldout=False), NUM_TRAIN))
    seen = {(facts["item"], facts["quantity"]) for _, facts in train}
    rng = rng if heldout_seed is None else random.Random(heldout_seed)
    rows = orders(rng, is_heldout=True)
    unseen = (row for row in rows if (row[1]["item"], row[1]["quantity"]) not in seen)
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "heldout.jsonl", list(islice(unseen, num_heldout)))


def write_rows(path: Path, rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Write messages with their facts as conversations, unless the file has them already."""
    lines = ""
    for text, facts in rows:
        contents = ("Order to JSON", text, json.dumps(facts, separators=(",", ":")))
        turns = zip(("system", "user", "assistant"), contents, strict=True)
        chat = [{"role": role, "content": content} for role, content in turns]
        lines += json.dumps({"messages": chat}) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text("utf-8") != lines:
        write_text(path, lines)
