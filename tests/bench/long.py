"""Speed and memory of a rank over sequence length and group size, on CPU ranks.

    python -m tests.bench.long [--lengths N ...] [--groups N ...] [--out FILE]

Trains two steps of one sequence with a small shape: memory is counted in the first step, time in
the second one. Each result is a line of FILE (build/bench-long/long.jsonl); a case that has a line
is not run again, so an interrupted benchmark continues. Ends with a table of measured and predicted
values. Predicted memory is that of live tensors. Predicted time is that of the catalogue's CPU.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from tests.bench.memory import BASE, FullSequences, make_folder

LENGTHS = [4096, 8192, 16_384, 32_768, 65_536]
GROUPS = [1, 2, 4]
SHAPE = BASE | {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 64, "max_position_embeddings": 65_536,
}  # fmt: skip
SETTINGS = {
    "lora_r": 4, "batch_size": 1, "zero_stage": 2, "gradient_checkpointing": True,
}  # fmt: skip
SAVINGS = {
    "checkpointed": {"mlp_tiles": 1},
    "tiles": {"mlp_tiles": 8},
    "tiles, inputs on host": {"mlp_tiles": 8, "offload_activations": True},
}
COLUMNS = ["length", "group", "savings", "tokens/s", "predicted", "MiB a rank", "predicted"]


def cases(lengths, groups):
    """Settings of each case by its key; groups of several ranks are measured without savings."""
    for length in lengths:
        for group in groups:
            for name, savings in SAVINGS.items():
                if group == 1 or name == "checkpointed":
                    split = {"max_length": length, "sequence_parallel_size": group}
                    yield [length, group, name], SETTINGS | savings | split


def measure(session, folder, settings):
    """Peak of live bytes in the first step, and seconds of the second one, with predictions."""
    from pipeline.plan.given.layout import SequenceProfile
    from pipeline.train.live_bytes import LiveBytes
    from tests.train_tiny import build_engine, work

    length = settings["max_length"]
    with LiveBytes() as live:
        plan, engine = build_engine(session, folder, settings | {"global_batch_size": 1}, 8)
        split = FullSequences(8, length, plan.shape.vocab_size)
        engine.optimizer_step(*work(plan, split, 0, session.placement.rank), 1e-3)
    batches, supervised = work(plan, split, 1, session.placement.rank)
    start = time.perf_counter()
    engine.optimizer_step(batches, supervised, 1e-3)
    return {
        "seconds": time.perf_counter() - start,
        "predicted_seconds": plan.speed.seconds_per_step,
        "bytes": live.peak,
        "predicted_bytes": plan.tensor_bytes(SequenceProfile(tokens=length)),
    }


def run(settings, folder):
    """The result of the rank with the highest peak; the ranks of a step end together."""
    from tests.ranks import run_ranks

    world_size = settings["sequence_parallel_size"]
    ranks = run_ranks(measure, folder, settings, tmp_path=folder, world_size=world_size)
    return max(ranks, key=lambda result: result["bytes"])


def table(lines):
    """The lines as a Markdown table."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for line in lines:
        (length, group, name), result = line["case"], line["result"]
        cells = [f"{length:,}", group, name]
        cells += [f"{length / result[key]:,.0f}" for key in ("seconds", "predicted_seconds")]
        cells += [f"{result[key] / 2**20:.1f}" for key in ("bytes", "predicted_bytes")]
        yield f"| {' | '.join(map(str, cells))} |"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS)
    parser.add_argument("--out", type=Path, default=Path("build/bench-long/long.jsonl"))
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    if options.out.exists():
        lines = [json.loads(line) for line in options.out.read_text().splitlines()]
    done = [line["case"] for line in lines]
    with tempfile.TemporaryDirectory() as tmp:
        folder = make_folder(Path(tmp) / "model", SHAPE | {"dtype": "float32"})
        for key, settings in cases(options.lengths, options.groups):
            if key in done:
                continue
            line = {"case": key, "result": run(settings, folder)}
            with options.out.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            lines.append(line)
    print(*table(lines), sep="\n")


if __name__ == "__main__":
    main()
