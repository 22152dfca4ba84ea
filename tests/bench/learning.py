"""Held-out loss of the adapters of RankZero and of the Trainer of transformers, side by side.

    python -m tests.bench.learning [--rows GSM8K.jsonl] [--seeds N]

Both train the same rows for one epoch with the settings of `make bench` (its base case, on the
model of `make quickstart`), once for each seed. Plain peft scores each adapter on other rows. A
line is appended to build/bench/learning.jsonl after each run; runs that the file has are skipped.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev

from tests import ROOT
from tests.bench.lora import score
from tests.bench.speed import MODEL, download_model, write_rows
from tests.bench.speed_cells import BASE, HF, RANKZERO
from tests.bench.speed_run import CACHE, json_lines, measure

NUM_TRAIN, NUM_HELDOUT = 256, 200
RESULTS = ROOT / "build/bench/learning.jsonl"
ADAPTERS = {RANKZERO.name: "run/adapter", HF.name: "adapter"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=CACHE / "gsm8k.jsonl")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    download_model()
    with tempfile.TemporaryDirectory() as folder:
        train, heldout, name = split_rows(arguments.rows, Path(folder))
        for seed in range(1, arguments.seeds + 1):
            for tool in (RANKZERO, HF):
                key = {"tool": tool.name, "seed": seed, "rows": name, "train_rows": NUM_TRAIN}
                if not any(key.items() <= line.items() for line in results()):
                    append(key | {"loss": heldout_loss(tool, seed, train, heldout)})
    losses = {
        tool: [line["loss"] for line in results() if line["tool"] == tool] for tool in ADAPTERS
    }
    for tool, values in losses.items():
        spread = f", standard deviation {stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{tool}: held-out loss {mean(values):.4f}, mean of {len(values)} seeds{spread}")
    ratio = mean(losses[RANKZERO.name]) / mean(losses[HF.name])
    print(f"RankZero's relative to the Trainer's: {100 * (ratio - 1):+.2f} %")


def split_rows(source: Path, folder: Path) -> tuple[Path, Path, str]:
    """The training rows, the held-out rows, and what they are."""
    rows, name = write_rows(source, folder)
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    train, heldout = folder / "train.jsonl", folder / "heldout.jsonl"
    train.write_text("".join(lines[:NUM_TRAIN]), encoding="utf-8")
    heldout.write_text("".join(lines[-NUM_HELDOUT:]), encoding="utf-8")
    return train, heldout, name


def heldout_loss(tool, seed: int, train: Path, heldout: Path) -> float:
    """Train one epoch on two ranks; mean loss per token of the answers to the held-out rows."""
    sequences = 2 * BASE["batch_size"] * BASE["accumulation_steps"]
    case = BASE | {
        "model": str(MODEL), "rows": str(train), "seed": seed, "max_steps": NUM_TRAIN // sequences
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        line = measure(tool, case | {"folder": folder}, Path(folder))
        if "error" in line:
            raise RuntimeError(line["error"])
        return round(score(Path(folder) / ADAPTERS[tool.name], heldout, case)[0], 5)


def results() -> list[dict]:
    return json_lines(RESULTS) if RESULTS.is_file() else []


def append(line: dict) -> None:
    print(json.dumps(line), flush=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
