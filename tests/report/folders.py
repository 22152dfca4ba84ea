"""Run folders for tests of the report. Their files are written here; nothing is trained."""

import json
import math
from pathlib import Path

import numpy as np
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

GIB = 2**30


WRONG_ANSWER = 4  # index of the only answer of adapter and merged model that is wrong


def answer(index: int) -> dict[str, str]:
    """An answer in score.json: prompt, expected answer, and the answers of the three models.

    The base answers in prose, which is always wrong.
    """
    order = {
        "item": ["croissant", "rye loaf", "cheesecake"][index % 3],
        "count": index + 2,
        "size": None if index % 2 else "large",
        "day": "2025-03-0" + str(index % 9 + 1),
        "time": "08:30",
        "delivery": index % 2 == 0,
    }
    expected = json.dumps(order)
    trained = json.dumps(order | {"count": 1}) if index == WRONG_ANSWER else expected
    base = (
        f"Sure! Here is the order you asked for:\n\n- {order['item']} x {order['count']}\n"
        "- day: Saturday\n\nLet me know if you need anything else."
    )
    prompt = (
        f"Hiya, could I get {order['count']} of your {order['item']} on {order['day']} "
        "at half past eight? We'll pick up. Cheers"
    )
    return {
        "prompt": prompt,
        "expected": expected,
        "base": base,
        "adapter": trained,
        "merged": trained,
    }


EVAL_LOSSES = {27: 0.412, 54: 0.133, 80: 0.0874}  # by step


def metrics(num_steps: int = 80) -> list[dict[str, object]]:
    """Lines of metrics.jsonl with plausible values: the loss falls from 2.7 to 0.1, with noise."""
    lines: list[dict[str, object]] = []
    for step in range(1, num_steps + 1):
        noise = math.sin(7.3 * step) * math.cos(3.1 * step)  # repeatable, unlike random numbers
        lines.append(
            {
                "step": step,
                "epoch": step / num_steps,
                "loss": 0.05 + 2.6 * math.exp(-step / 14) + 0.5 * math.exp(-step / 30) * noise,
                "lr": 1e-3 * min(1, step / 3) * 0.5 * (1 + math.cos(math.pi * step / num_steps)),
                "grad_norm": 0.3 + 2 * math.exp(-step / 10) + 0.1 * abs(noise),
                "tokens": 1400,
                "supervised_tokens": 520,
                "tokens_per_second": 640 + 45 * noise,
                "step_seconds": 2.1875,
                "peak_bytes": int((1.31 + 0.02 * (step > 2)) * GIB),
                "predicted_bytes": int(1.316 * GIB),
            }
        )
        if step in EVAL_LOSSES:
            lines.append({"step": step, "eval_loss": EVAL_LOSSES[step]})
    return lines


# Characters with a meaning in HTML, JavaScript or a terminal.
HOSTILE_TEXT = "<script>alert(1)</script> <b>&amp; \"' </style> <!-- ]]> ` \u202e \u2028 ü 界"
SPIKE = 1e4  # the highest loss of `write_long_metrics`
CHECKPOINT_STATE = {"versions": {"rankzero": "0.2", "torch": "2.13.0+cpu"}}

# Path in the run folder -> content. metrics.jsonl and the files with other formats are not here.
FILES: dict[str, object] = {
    "run.yaml": {
        "model": "models/SmolLM2-135M-Instruct",
        "train_data": ["data/orders.jsonl"],
        "eval_data": "data/held-out.jsonl",
        "output_dir": "runs/orders",
        "lora_r": 16,
        "lora_alpha": 32.0,
        "lora_target_modules": "all-linear",
        "lr": 1e-3,
        "epochs": 1,
        "load_in_4bit": False,
        "seed": 42,
    },
    "status.json": {
        "state": "done",
        "step": 80,
        "total_steps": 80,
        "exit_code": 0,
        "reason": "",
        "host": "node-17",
        "earlier_starts": [
            {
                "started": "2025-03-01T09:12:00+00:00",
                "ended": "2025-03-01T09:14:00+00:00",
                "first_step": 0,
                "step": 40,
                "state": "stopped",
                "exit_code": 75,
                "reason": "time_limit",
            }
        ],
        "first_step": 40,
        "started": "2025-03-01T09:14:00+00:00",
        "ended": "2025-03-01T09:15:41+00:00",
    },
    "plan.json": {
        "settings": {},
        "model": {
            "folder": "models/SmolLM2-135M-Instruct",
            "parameters": 134_515_008,
            "trainable": 4_884_480,
            "training_dtype": "bfloat16",
        },
        "hardware": {
            "kind": "cpu",
            "name": "CPU",
            "nodes": 1,
            "ranks_per_node": 2,
            "ranks": 2,
        },
        "length": {"text": ["3 of 120 documents have more than 1,024 tokens (max_length)"]},
        "choice": {
            "zero_stage": 2,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "global_batch_size": 8,
            "gradient_checkpointing": False,
            "why": {
                "zero_stage": "the base fits on each rank: only adapter gradients are communicated",
                "batch_size": "the largest up to 8 that fits (1.3 GiB a rank)",
                "gradient_checkpointing": "off: the activations fit (1.3 GiB a rank)",
                "training_dtype": "the device has units for it",
                "lora_r": "set by a preset",
                "proof": "3 checks of the class",
                "resident_why": "another reason",
            },
        },
        "memory": {
            "per_rank": {
                "base_weights": 269_030_016,
                "adapter_weights": 9_768_960,
                "optimizer_state": 29_306_880,
                "activations": 901_251_072,
                "logits": 204_472_320,
            },
            "peak_bytes": 1_413_829_248,
            "device_bytes": 16 * GIB,
            "fits": True,
        },
        "speed": {"seconds_per_step": 0.5, "tokens_per_second": 1500.0},
        "proof": {
            "errors": {"loss": 1.1e-8, "packs": 2e-3},
            "without_merge": ["two tensors have no name"],
            "without_fast_paths": ["the loss differs by 1e-2"],
        },
        "rules": [
            {
                "id": "cpu-bf16",
                "level": "warn",
                "message": "this CPU has no bfloat16 units; fp32 may be faster",
                "source": "DeepSpeed 0.19.8 accelerator/cpu_accelerator.py",
            },
            {
                "id": "alpha-2r",
                "level": "advise",
                "message": "alpha is 2 x r, as the guide says",
                "source": "https://example.org/guide",
            },
        ],
        "steps": {"total_steps": 80, "warmup_steps": 3},
        "deepspeed": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 4884480}},
    },
    "score.json": {
        "rows": 60,
        "max_new_tokens": 96,
        "models": {
            "base": {"loss": 2.7193, "exact_match": 0.0, "seconds": 41.2},
            "adapter": {
                "loss": 0.0874,
                "loss_interval": [0.0612, 0.1136],
                "exact_match": 0.983,
                "exact_match_interval": [0.9114, 0.9971],
                "exact_match_rows": 60,
                "perplexity": 1.0913,
                "perplexity_interval": [1.0631, 1.1203],
                "seconds": 22.4,
            },
            "merged": {"loss": 0.0876, "exact_match": 0.967, "seconds": 15.9},
        },
        "answers": [answer(index) for index in range(9)],
    },
    "data/audit.json": {
        "train": {
            "rows_read": 642,
            "rows_used": 640,
            "rejected": {"answer is empty": 2},
            "formats": {"messages": 600, "alpaca": 40},
            "tokens": 112_233,
            "supervised_share": 0.371,
            "length": {
                "mean": 175.4,
                "max": 259,
                "histogram": {"width": 52, "documents": [11, 150, 301, 153, 25]},
            },
            "sources": [
                {
                    "name": "data/orders.jsonl",
                    "weight": 1.0,
                    "rows_used": 600,
                    "tokens": 100_001,
                    "formats": {"messages": 600},
                },
                {
                    "name": "data/alpaca.parquet",
                    "weight": 0.25,
                    "rows_used": 40,
                    "tokens": 12_232,
                    "formats": {"alpaca": 40},
                },
            ],
        },
        "eval": {"rows_read": 60, "rows_used": 60, "rejected": {}, "tokens": 10_517},
    },
}


def build_run(folder: Path, *, without: tuple[str, ...] = ()) -> Path:
    """Write a complete run folder, or one without the named files; return the folder."""
    for name, content in FILES.items():
        if name not in without:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            as_text = yaml.safe_dump if name.endswith(".yaml") else json.dumps
            path.write_text(as_text(content), encoding="utf-8")
    if "data/audit.json" not in without:
        rejects = [
            {"file": "orders.jsonl", "line": line, "reason": "answer is empty"} for line in (7, 9)
        ]
        text = "".join(json.dumps(reject) + "\n" for reject in rejects)
        incomplete_line = "{"
        (folder / "data/rejects.jsonl").write_text(text + incomplete_line, encoding="utf-8")
    if "metrics.jsonl" not in without:
        write_metrics(folder, metrics())
    checkpoint = folder / "checkpoints/step-00000080"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(CHECKPOINT_STATE), encoding="utf-8")
    return folder


def build_failed_run(folder: Path) -> Path:
    """A run that resumed at step 30, skipped steps 21 to 23, and failed at step 44.

    The loss of step 44 is not finite. metrics.jsonl ends with an incomplete line.
    """
    build_run(folder, without=("score.json",))
    lines = metrics()[:45]  # steps 1 to 44, and the evaluation of step 27
    for line in lines[20:23]:
        line["was_applied"] = False
    lines[-1]["loss"] = None  # a loss that is not finite is written as null
    write_metrics(folder, lines, end='\n{"step": 46, "lo')
    status = FILES["status.json"] | {
        "state": "failed", "exit_code": 1, "step": 44, "first_step": 30,
        "reason": "step 44: loss or gradient were not finite in 3 steps in a row",
    }  # fmt: skip
    (folder / "status.json").write_text(json.dumps(status), encoding="utf-8")
    return folder


def build_short_run(folder: Path) -> Path:
    """A run of one step."""
    build_run(folder, without=("score.json",))
    write_metrics(folder, metrics()[:1])
    return folder


def build_long_run(folder: Path) -> Path:
    """A run of 100,000 steps."""
    write_long_metrics(build_run(folder), 100_000)
    return folder


def build_hostile_run(parent: Path) -> Path:
    """A run in which the name and every text is HOSTILE_TEXT."""
    folder = build_run(parent / HOSTILE_TEXT.replace("/", "|"))
    for name, content in FILES.items():
        as_text = yaml.safe_dump if name.endswith(".yaml") else json.dumps
        hostile = _with_hostile_texts(content, "source" if name == "plan.json" else "")
        (folder / name).write_text(as_text(hostile), encoding="utf-8")
    reject = json.dumps({"file": HOSTILE_TEXT, "line": 1, "reason": HOSTILE_TEXT})
    (folder / "data/rejects.jsonl").write_text(reject + "\n", encoding="utf-8")
    return folder


def _with_hostile_texts(value: object, link_key: str = "", key: str = "") -> object:
    """The value with its texts replaced by HOSTILE_TEXT, except those that have fixed values.

    `key`: key of the value. `link_key`: key of the texts that are shown as links; they become
    javascript: addresses.
    """
    if isinstance(value, dict):
        return {
            name: _with_hostile_texts(item, link_key, str(name)) for name, item in value.items()
        }
    if isinstance(value, list):
        return [_with_hostile_texts(item, link_key, key) for item in value]
    if not isinstance(value, str) or key in ("state", "started", "ended", "level"):
        return value
    return "javascript:alert(1)" if key == link_key else HOSTILE_TEXT


def write_long_metrics(folder: Path, num_steps: int) -> None:
    """Write metrics.jsonl with many steps, one spike of the loss, and evaluations every 500 steps.

    The lines of `metrics` are repeated with other step numbers.
    """
    records = [record for record in metrics() if "loss" in record]
    after_step = [json.dumps(record).partition(",")[2] for record in records]
    lines = [
        f'{{"step": {step},{after_step[step % len(after_step)]}' for step in range(1, num_steps + 1)
    ]
    lines[num_steps // 3] = json.dumps({"step": num_steps // 3 + 1, "loss": SPIKE})
    lines += [
        json.dumps({"step": step, "eval_loss": 1 / step}) for step in range(500, num_steps, 500)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_split(data_dir: Path, documents: list[list[int]], supervised: list[list[int]]) -> None:
    """Write a prepared training split in which each document is a sequence, and its index.json.

    `documents`: token ids of each document. `supervised`: offsets of the supervised tokens in each
    document.
    """
    folder = data_dir / "train-key"
    folder.mkdir(parents=True)
    lengths, counts = [len(ids) for ids in documents], [len(offsets) for offsets in supervised]
    masks = [
        [i in offsets for i in range(len(ids))]
        for ids, offsets in zip(documents, supervised, strict=True)
    ]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    document_numbers = np.arange(len(documents), dtype=np.int64)
    columns = {
        "ids": np.concatenate(documents).astype(np.int32),
        "supervised": np.concatenate(masks),
        "offsets": offsets,
        "counts": np.array(counts),
        "sequence_documents": document_numbers,
        "sequence_offsets": np.arange(len(documents) + 1),
        "sequence_tokens": np.array(lengths),
        "sequence_squares": np.array(lengths) ** 2,
        "sequence_counts": np.array(counts),
    }
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column)
    size = len(documents)
    epoch = {"packing": False, "rounds": [{"source": 0, "start": 0, "end": size, "repeats": 1}]}
    (folder / "sequences.json").write_text(json.dumps(epoch), encoding="utf-8")
    index = {
        "key": "key", "folder": "train-key", "documents": size, "tokens": sum(lengths),
        "supervised_tokens": sum(counts), "longest": max(lengths), "sequences": size,
        "epoch_documents": size, "epoch_tokens": sum(lengths), "sources": [],
    }  # fmt: skip
    (data_dir / "index.json").write_text(json.dumps({"train": index}), encoding="utf-8")


def write_metrics(folder: Path, lines: list[dict[str, object]], end: str = "\n") -> None:
    """Write metrics.jsonl; `end` comes after the last line."""
    text = "\n".join(json.dumps(line) for line in lines) + end
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json whose token i is the word `w<i>&`, which HTML must escape."""
    folder.mkdir(exist_ok=True)
    vocabulary = {f"w<{i}>&": i for i in range(20)}
    Tokenizer(WordLevel(vocabulary, unk_token="w<0>&")).save(str(folder / "tokenizer.json"))
