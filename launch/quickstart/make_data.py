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

    `heldout_seed`: seed of the held-out rows. None: the random generator of the training rows
    continues. The training rows are always the same.
    """
    rng = random.Random(SEED)
    train = list(islice(orders(rng, is_heldout=False), NUM_TRAIN))
    trained_pairs = {(facts["item"], facts["quantity"]) for _, facts in train}
    if heldout_seed is not None:
        rng = random.Random(heldout_seed)
    heldout = (
        (text, facts)
        for text, facts in orders(rng, is_heldout=True)
        if (facts["item"], facts["quantity"]) not in trained_pairs
    )
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "heldout.jsonl", list(islice(heldout, num_heldout)))


def write_rows(path: Path, rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Write messages with their facts as conversations, unless the file has them already.

    An unchanged file keeps its time, so that quickstart.py does not train again.
    """
    lines = ""
    for text, facts in rows:
        contents = ("Order to JSON", text, json.dumps(facts, separators=(",", ":")))
        turns = zip(("system", "user", "assistant"), contents, strict=True)
        chat = [{"role": role, "content": content} for role, content in turns]
        lines += json.dumps({"messages": chat}) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text("utf-8") != lines:
        write_text(path, lines)
