"""Speed of RankZero and other programs, side by side on this machine's CPU.

    python -m tests.bench.speed [--quick] [--rows GSM8K.jsonl] [--repeats N] [--minutes N]

Every tool trains the same model on the same rows, with the same adapter, precision and number of
ranks. A round measures every tool in every cell once, so that tools are interleaved; the order
rotates from round to round. A line is appended to the results after each run, and a second call
continues: runs of this commit that the file has are skipped. The model is that of `make
quickstart`; `--quick` trains its first ten layers. Rows: the GSM8K training set if `--rows` or the
cache has it, else random words of the same lengths. `docs/speed_tables.py RESULTS` prints the
tables of docs/benchmarks.md.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from tests import ROOT
from tests.bench.gsm8k import LENGTHS
from tests.bench.speed_cells import CELLS, QUICK_CELLS, QUICK_LAYERS, Cell, Tool
from tests.bench.speed_run import (
    CACHE,
    RANKS,
    bare_rate,
    build_operators,
    install,
    json_lines,
    measure,
)

MODEL = ROOT / "quickstart/smollm2-135m-instruct"
NUM_ROWS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, two cells, one round")
    parser.add_argument("--rows", type=Path, default=CACHE / "gsm8k.jsonl")
    parser.add_argument("--repeats", type=int, help="rounds; default 3, with --quick 1")
    parser.add_argument("--minutes", type=float, help="no run starts later; default 70 or 4.5")
    parser.add_argument("--results", type=Path, help="default build/bench/speed.jsonl or quick")
    parser.add_argument("--cells", nargs="*", help="only cells with one of these names")
    parser.add_argument("--tools", nargs="*", help="only tools with one of these names")
    parser.add_argument("--install", action="store_true", help="only install the environments")
    arguments = parser.parse_args()
    cells = QUICK_CELLS if arguments.quick and not arguments.cells else CELLS
    cells = [cell for cell in cells if not arguments.cells or cell.name in arguments.cells]
    tools = [tool for cell in cells for tool in cell.tools]
    tools = [tool for tool in tools if not arguments.tools or tool.name in arguments.tools]
    for name in {tool.environment: None for tool in tools}:
        if name is not None:
            install(name)
        build_operators(name)
    if arguments.install:
        return
    default = ROOT / f"build/bench/{'quick' if arguments.quick else 'speed'}.jsonl"
    results = arguments.results or default
    results.parent.mkdir(parents=True, exist_ok=True)
    repeats = arguments.repeats or (1 if arguments.quick else 3)
    minutes = arguments.minutes or (4.5 if arguments.quick else 70)
    deadline = time.monotonic() + 60 * minutes
    download_model()
    with tempfile.TemporaryDirectory() as folder:
        model = _with_few_layers(Path(folder) / "model") if arguments.quick else MODEL
        rows, name = write_rows(arguments.rows, Path(folder))
        common = _machine() | {"rows": name, "quick": arguments.quick, "commit": _commit()}
        pending = [
            (repeat, cell, tool)
            for repeat in range(repeats)
            for cell in cells
            for tool in missing_runs(results, cell, arguments.tools, repeat, common)
        ]
        rates: dict[tuple[int, str], float] = {}
        for number, (repeat, cell, tool) in enumerate(pending):
            if time.monotonic() > deadline:
                print(f"no time for {len(pending) - number} runs; the same command continues")
                break
            if (repeat, cell.name) not in rates:
                rates[repeat, cell.name] = bare_rate(str(model))
            settings = cell.settings(is_quick=arguments.quick)
            files = {"model": str(model), "rows": str(rows)}
            print(f"{cell.name}: {tool.name}, round {repeat + 1} ...", end=" ", flush=True)
            line = _run(tool, settings | files | {"seed": repeat + 1})
            line |= {"cell": cell.name, "tool": tool.name, "repeat": repeat, "settings": settings}
            _append(results, common | line | {"bare_flops": rates[repeat, cell.name]})
    subprocess.run([sys.executable, ROOT / "docs/speed_tables.py", results], check=True)


def missing_runs(
    results: Path, cell: Cell, names: list[str] | None, repeat: int, common: dict
) -> list[Tool]:
    """The tools that the file has no run of, for this cell, round and commit; only these names.

    The order starts with another tool in each round. Failed runs are repeated.
    """
    lines = json_lines(results) if results.is_file() else []
    key = {"cell": cell.name, "repeat": repeat} | {k: common[k] for k in ("commit", "quick")}
    done = {line["tool"] for line in lines if key.items() <= line.items() and "error" not in line}
    start = repeat % len(cell.tools)
    return [
        tool
        for tool in cell.tools[start:] + cell.tools[:start]
        if tool.name not in done and (names is None or tool.name in names)
    ]


def _run(tool: Tool, case: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        line = measure(tool, case | {"folder": folder}, Path(folder))
    if "error" in line:
        print(line["error"], flush=True)
    else:
        line["flops_per_token"] = flops_per_token(case)
        print(f"{line['useful_per_s']:.0f} useful tokens/s", flush=True)
    return line


def flops_per_token(case: dict) -> float:
    """FLOPs that a useful token needs: forward, backward and, with checkpointing, recomputation.

    A frozen weight has no gradient. Attention needs half of the scores of each document. Logits are
    counted for supervised tokens only. Padding is not counted, so a tool that pads reaches less.
    """
    config = json.loads((Path(case["model"]) / "config.json").read_text())
    hidden, inner, layers = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    keys = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    sizes = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 3
    base = layers * sum(a * b for a, b in sizes)
    adapter = layers * case["lora_r"] * sum(a + b for a, b in sizes)
    recomputed = 1 if case["gradient_checkpointing"] is True else 0  # forward passes
    attended = float((LENGTHS**2).sum() / LENGTHS.sum())
    scores = 2 * attended * hidden * layers  # the causal half of two products
    logits = 4 * config["vocab_size"] * hidden * _supervised_share(Path(case["rows"]))
    products = (4 + 2 * recomputed) * base + (6 + 2 * recomputed) * adapter
    return products + (3.5 + recomputed) * scores + logits


def _supervised_share(rows: Path) -> float:
    """Share of the characters of the assistant, which is close to that of its tokens."""
    turns = [line["messages"] for line in json_lines(rows)]
    answers = sum(len(messages[1]["content"]) for messages in turns)
    return answers / sum(len(m["content"]) for messages in turns for m in messages)


def write_rows(source: Path, folder: Path) -> tuple[Path, str]:
    """Write conversations as JSON lines; returns the file, and what the rows are."""
    random_source = random.Random(0)
    if source.is_file():
        name = f"{NUM_ROWS} rows of GSM8K"
        pairs = [(row["question"], row["answer"]) for row in json_lines(source)]
        pairs = random_source.sample(pairs, min(NUM_ROWS, len(pairs)))
    else:
        name = f"{NUM_ROWS} rows of random words, as long as rows of GSM8K"
        words = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").split()
        lengths = [
            max(20, int(n * 0.6)) for n in random_source.choices(LENGTHS.tolist(), k=NUM_ROWS)
        ]
        texts = [random_source.choices(words, k=length) for length in lengths]
        pairs = [(" ".join(t[: len(t) // 2]), " ".join(t[len(t) // 2 :])) for t in texts]
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for question, answer in pairs:
            turns = [("user", question), ("assistant", answer)]
            row = {"messages": [{"role": role, "content": text} for role, text in turns]}
            print(json.dumps(row), file=file)
    return path, name


def download_model() -> None:
    """Download the quickstart's model, unless its folder has it."""
    code = "import sys; from download_model import download_model as d; from pathlib import Path; "
    code += "d(Path(sys.argv[1]))"
    folder = ROOT / "launch/quickstart"
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}
    subprocess.run([sys.executable, "-c", code, MODEL], check=True, env=environment)


def _with_few_layers(folder: Path) -> Path:
    """The model with its first layers only, for the short form."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((MODEL / "config.json").read_text()) | {"num_hidden_layers": QUICK_LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(MODEL / "model.safetensors")
    layers = {key: re.search(r"\.layers\.(\d+)\.", key) for key in tensors}
    kept = {key for key, layer in layers.items() if not layer or int(layer[1]) < QUICK_LAYERS}
    save_file({key: tensors[key] for key in kept}, folder / "model.safetensors", {"format": "pt"})
    return folder


def _machine() -> dict:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    models = Counter(line.split(": ")[1] for line in info if line.startswith("model name"))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": ", ".join(f"{count} x {name}" for name, count in models.items()),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "python": platform.python_version(),
        "ranks": RANKS,
    }


def _commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=9"]
    return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()


def _append(results: Path, line: dict) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
