"""Speed and memory of a rank over sequence length and group size, on CPU ranks.

    python -m tests.bench.long [--lengths N ...] [--groups N ...] [--again]

Trains steps of one sequence with a small shape. Each case is a line of tests/bench/long.jsonl; a
case that has a line is not run, so an interrupted benchmark continues. `--again` runs it and
replaces its line. `make docs` draws docs/images/long.svg and the table of docs/long.md from the
lines.

Time is measured in CPU seconds, summed over ranks: with one thread a rank, they depend little on
the number of cores and on other programs. `load` is the system's load before a case. Up to 4,096
tokens, memory is counted in a first step and time in a second one; longer sequences have one step.
The predicted time is that of a CPU whose matrix products are as fast as those of this machine,
measured before each case. The predictions of all lines are computed again in each run.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pipeline.files import write_text
from tests.bench.memory import BASE, FullSequences, make_folder

RESULTS = Path(__file__).with_suffix(".jsonl")
LENGTHS = [4096, 8192, 16_384, 32_768, 65_536]
GROUPS = [1, 2, 4]
SHAPE = BASE | {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 64, "max_position_embeddings": 65_536,
}  # fmt: skip
SETTINGS = {
    "lora_r": 4, "batch_size": 1, "global_batch_size": 1, "zero_stage": 2,
    "gradient_checkpointing": True,
}  # fmt: skip
# Ways to save memory, in addition to checkpointing.
SAVINGS = {
    "checkpointed": {"mlp_tiles": 1},
    "tiles": {"mlp_tiles": 8},
    "tiles, inputs on host": {"mlp_tiles": 8, "offload_activations": True},
}
LONGEST_OF_TWO_STEPS = 4096
DEADLINE_S = 3600.0
KEYS = ("length", "group", "savings")  # of a case; `group`: number of ranks that share a sequence


def cases(lengths, groups):
    """The keys of the cases; groups of several ranks are measured with checkpointing only."""
    return [
        {"length": length, "group": group, "savings": name}
        for length in lengths
        for group in groups
        for name in SAVINGS
        if group == 1 or name == "checkpointed"
    ]


def settings_of(case):
    """The settings of a case that differ from those of tests.tiny.make_plan."""
    split = {"max_length": case["length"], "sequence_parallel_size": case["group"]}
    return SETTINGS | SAVINGS[case["savings"]] | split


def measure(session, folder, settings):
    """Peak of live bytes, and CPU seconds and seconds of the last step, of this rank."""
    from pipeline.train.live_bytes import LiveBytes
    from tests.train_tiny import batches_of_step, build_engine

    rank, length = session.placement.rank, settings["max_length"]
    rate = product_rate()
    with LiveBytes() as live:
        plan, engine = build_engine(session, folder, settings, 8)
        split = FullSequences(8, length, plan.shape.vocab_size)
        first = timed_step(engine, batches_of_step(plan, split, 0, rank))
    last = first
    if length <= LONGEST_OF_TWO_STEPS:
        last = timed_step(engine, batches_of_step(plan, split, 1, rank))
    return {"bytes": live.peak, "product_rate": rate} | last


def timed_step(engine, batches_and_supervised):
    """CPU seconds and wall-clock seconds of an optimizer step."""
    cpu, start = time.process_time(), time.perf_counter()
    engine.optimizer_step(*batches_and_supervised, 1e-3)
    return {"cpu_s": time.process_time() - cpu, "seconds": time.perf_counter() - start}


def product_rate():
    """FLOPs a CPU second of a product of fp32 matrices on one thread."""
    import torch

    size = 1024
    one, other = torch.randn(size, size), torch.randn(size, size)
    one @ other
    cpu, num_products = time.process_time(), 0
    while time.process_time() - cpu < 0.5:
        one @ other
        num_products += 1
    return num_products * 2 * size**3 / (time.process_time() - cpu)


def run(case, folder):
    """The measured values of a case: those of the rank with the highest peak, and sums of time."""
    from tests.ranks import run_ranks

    load = os.getloadavg()[0]
    ranks = run_ranks(
        measure,
        folder,
        settings_of(case),
        tmp_path=folder,
        world_size=case["group"],
        deadline_s=DEADLINE_S,
    )
    return {
        "bytes": max(result["bytes"] for result in ranks),
        "cpu_s": round(sum(result["cpu_s"] for result in ranks), 3),
        "seconds": round(max(result["seconds"] for result in ranks), 3),
        "product_rate": round(sum(result["product_rate"] for result in ranks) / len(ranks)),
        "load": round(load, 2),
        "date": datetime.now(UTC).date().isoformat(),
    }


def predictions(case, folder, product_rate):
    """Predicted bytes of live tensors, and CPU seconds if products run at `product_rate`."""
    from pipeline.plan.cost.speed import reachable_rates, step_seconds
    from pipeline.plan.given.catalogue import cpu_of
    from pipeline.plan.given.layout import SequenceProfile
    from tests.tiny import make_plan

    size, profile = case["group"], SequenceProfile(tokens=case["length"])
    cores = cpu_of(size, 2**34)  # a core for each rank
    plan = make_plan(folder, size, hardware=cores, **settings_of(case))
    assumed = reachable_rates(plan.layout, cores).flops
    machine = replace(cores, flops=cores.flops * product_rate / assumed)
    speed = step_seconds(plan.shape, plan.settings, plan.layout, machine, profile)
    return {
        "predicted_bytes": plan.tensor_bytes(profile),
        "predicted_cpu_s": round(size * speed.seconds_per_step, 3),
    }


def read_lines():
    """The lines of the results by their keys."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.is_file() else []
    return {tuple(line[key] for key in KEYS): line for line in map(json.loads, lines)}


def write_lines(lines):
    text = "".join(json.dumps(lines[key]) + "\n" for key in sorted(lines))
    write_text(RESULTS, text)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS)
    parser.add_argument("--again", action="store_true", help="replace the lines of these cases")
    options = parser.parse_args(arguments)
    lines = read_lines()
    with tempfile.TemporaryDirectory() as tmp:
        folder = make_folder(Path(tmp) / "model", SHAPE | {"dtype": "float32"})
        for key, line in lines.items():
            case = dict(zip(KEYS, key, strict=True))
            line.update(predictions(case, folder, line["product_rate"]))
        write_lines(lines)
        for case in cases(options.lengths, options.groups):
            key = tuple(case.values())
            if key in lines and not options.again:
                continue
            measured = run(case, folder)
            lines[key] = case | measured | predictions(case, folder, measured["product_rate"])
            write_lines(lines)
            print(json.dumps(lines[key]), flush=True)


if __name__ == "__main__":
    main()
