"""Held-out loss and exact match of the quickstart, for several seeds and settings of the adapter.

    python -m tests.bench.lora [--quickstart] [--seeds N]

Appends a line to tests/bench/lora.jsonl after each run, and skips runs that the file has. The runs
train on the quickstart's rows and are scored on 300 held-out rows of another seed, on which no
setting was chosen. Lines with `heldout_seed: 4242` are of the rows on which settings were chosen.
`--quickstart`: only the quickstart's own settings, with five seeds, in fp32 and in bf16, because
the quickstart trains in the one that is faster on the CPU. All other runs are in fp32. `make docs`
draws docs/images/lora.svg and the table of docs/lora.md from the lines.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev

from pipeline.cli.score import let_waiting_threads_sleep
from pipeline.config.load import load_settings
from tests import ROOT
from tests.bench.quickstart_data import NUM_TRAIN, make_data

RUN_FILE = ROOT / "launch/runs/quickstart.yaml"
RESULTS = Path(__file__).with_suffix(".jsonl")
MODEL = ROOT / "quickstart/smollm2-135m-instruct"
FRESH_SEED, FRESH_ROWS = 300, 300  # of the held-out rows
SEEDS = range(1, 6)  # of the quickstart's own settings
OWN_SETTINGS: dict[str, dict[str, object]] = {
    "quickstart": {},
    "bf16": {"bf16": True},
}
# Changes of the quickstart's settings, in the order of their runs.
VARIANTS = OWN_SETTINGS | {
    "lr 2e-4": {"lr": 2e-4},
    "lr 6e-4": {"lr": 6e-4},
    "lr 6e-3": {"lr": 6e-3},
    "r 4": {"lora_r": 4},
    "r 64": {"lora_r": 64},
    "global batch 2": {"batch_size": 1, "global_batch_size": 2},
    "global batch 8": {"batch_size": 4, "global_batch_size": 8},
    "query and value only": {"lora_target_modules": ["q_proj", "v_proj"]},
    "alpha 16": {"lora_alpha": 16},
    "alpha 64": {"lora_alpha": 64},
    "packs": {"packing": True, "batch_size": 1, "global_batch_size": 2},
    "4-bit base": {"load_in_4bit": True},
    "dropout 0.1": {"lora_dropout": 0.1},
}
_BATCH = 8  # rows of a forward pass


def main() -> None:
    """Run the missing variants and seeds, then print the means of the quickstart's own settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quickstart", action="store_true")
    parser.add_argument("--seeds", type=int, default=2, help="of each variant")
    args = parser.parse_args()
    runs = [(name, seed) for name in OWN_SETTINGS for seed in SEEDS]  # variant and seed
    if not args.quickstart:
        others = [name for name in VARIANTS if name not in OWN_SETTINGS]
        runs += [(name, seed) for seed in range(1, args.seeds + 1) for name in others]
    quickstart = read_settings()
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), heldout_seed=FRESH_SEED, num_heldout=FRESH_ROWS)
        for name, seed in runs:
            key = {
                "variant": name, "seed": seed, "heldout_seed": FRESH_SEED,
                "train_rows": NUM_TRAIN, "settings": quickstart | VARIANTS[name],
            }  # fmt: skip
            if not any(key.items() <= line.items() for line in results()):
                append(key | measure(key["settings"], seed, Path(folder)))
    for name, changes in OWN_SETTINGS.items():
        matches = [
            100 * line["exact_match"]
            for line in results()
            if (line["settings"], line["heldout_seed"], line["train_rows"])
            == (quickstart | changes, FRESH_SEED, NUM_TRAIN)
        ]
        print(
            f"{name}, {len(matches)} seeds: exact match {mean(matches):.1f} % on {FRESH_ROWS} "
            f"fresh rows, {min(matches):.1f} to {max(matches):.1f} %, "
            f"standard deviation {stdev(matches):.1f}"
        )


def read_settings() -> dict[str, object]:
    """The settings of the quickstart that concern the training, in fp32."""
    settings = load_settings(RUN_FILE)
    keys = settings.model_fields_set - {
        "model", "train_data", "eval_data", "output_dir", "logging_steps", "save_strategy",
        "save_steps",
    }  # fmt: skip
    values = {key: getattr(settings, key) for key in keys} | {"bf16": False, "fp16": False}
    return dict(sorted(values.items()))


def results() -> list[dict]:
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.is_file() else []
    return [json.loads(line) for line in lines]


def append(line: dict) -> None:
    print(json.dumps(line), flush=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def measure(settings: dict, seed: int, folder: Path) -> dict:
    """Train with these settings, and score the adapter on the fresh rows."""
    run = folder / "run"
    changes = settings | {
        "model": str(MODEL), "train_data": str(folder / "train.jsonl"), "eval_data": None,
        "output_dir": str(run), "seed": seed, "save_strategy": "no", "overwrite": True,
    }  # fmt: skip
    command = ["deepspeed", "--quiet", "--num_accelerators", "2", "launch/train.py", str(RUN_FILE)]
    command += [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    before = _child_seconds()
    subprocess.run(
        command, cwd=ROOT, check=True, stdout=sys.stderr,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss, exact_match = score(run / "adapter", folder / "heldout.jsonl", settings)
    return {
        "loss": round(loss, 5),
        "exact_match": exact_match,
        "rows": FRESH_ROWS,
        "steps": len(steps),
        "train_cpu_s": round(_child_seconds() - before),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def score(adapter: Path, heldout: Path, settings: dict) -> tuple[float, float]:
    """Held-out loss, and the share of rows of which every answer token is the most probable one.

    Greedy decoding answers these rows exactly. A forward pass over prompt and answer costs much
    less than decoding.
    """
    let_waiting_threads_sleep()
    import torch
    from peft import PeftModel
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    quantisation = four_bits if settings.get("load_in_4bit") else None
    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=dtype, quantization_config=quantisation
    )
    model = PeftModel.from_pretrained(base, adapter).eval()
    rows = [encode(tokenizer, json.loads(line)["messages"]) for line in heldout.open("rb")]
    rows.sort(key=lambda row: len(row[0]))
    total, num_tokens, num_exact = 0.0, 0, 0
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        ids = torch.nn.utils.rnn.pad_sequence([tokens for tokens, _ in batch], batch_first=True)
        with torch.no_grad():  # causal: padding on the right changes nothing before it
            logits = model(input_ids=ids).logits
        for i, (tokens, num_prompt) in enumerate(batch):
            answer, predicted = tokens[num_prompt:], logits[i, num_prompt - 1 : len(tokens) - 1]
            total += float(cross_entropy(predicted.float(), answer, reduction="sum"))
            num_tokens += len(answer)
            num_exact += bool((predicted.argmax(-1) == answer).all())
    return total / num_tokens, num_exact / len(rows)


def encode(tokenizer, messages: list[dict]):
    """Tokens of a conversation, and the number of them in its prompt."""
    import torch

    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    answer = messages[-1]["content"] + "<|im_end|>"
    parts = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer)]
    return torch.tensor(parts[0] + parts[1]), len(parts[0])


if __name__ == "__main__":
    main()
