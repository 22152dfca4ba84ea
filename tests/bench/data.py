"""Speed and memory of prepare, and the cost of a start on prepared data: prints, asserts nothing.

    python -m tests.bench.data MODEL GSM8K [PART ...] [--rows N] [--megabytes M]

MODEL: a folder with a tokenizer and a chat template; GSM8K: its train.jsonl (question, answer).
Parts: speed (against the bare tokenizer), agents (long agent rows against short rows), memory (of
all processes, on N synthetic rows of 1 kB), start (on prepared data, N rows against a thousand),
packing (of GSM8K and of other lengths, by each algorithm), waiting (of a step for its next
micro-batch).
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pipeline.config.settings import RunSettings
from pipeline.data.chat.tokenizer import load_tokenizer
from pipeline.data.dataset.packing import best_fit_decreasing, fill_gaps, make_packs
from pipeline.data.prepare.parallel import parallel_map, usable_cpus
from pipeline.data.prepare.prepare import prepare_data
from tests.bench import waiting
from tests.bench.agents import agents
from tests.bench.gsm8k import LENGTHS

PROCESSES = usable_cpus()
_CHUNK_ROWS = 250  # of the bare tokenizer: 1/4 MB, as in prepare
_SENTENCES_A_ROW = 10
_MANY_LENGTHS = 10_000_000


def main() -> None:
    """Run the parts that are named, or all."""
    parts = {
        "speed": speed,
        "agents": lambda arguments, folder: agents(arguments.model, arguments.gsm8k, folder),
        "memory": memory,
        "start": start,
        "packing": packing,
        "waiting": lambda arguments, folder: waiting.main(),
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=list(parts))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--megabytes", type=int, default=60, help="text to measure the speed on")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        for name in arguments.parts:
            parts[name](arguments, Path(folder))


def settings_of(model: Path, data: Path, folder: Path, **values: Any) -> RunSettings:
    """A run file's settings for these rows."""
    given = {"model": str(model), "train_data": str(data), "output_dir": str(folder)}
    return RunSettings.model_validate(given | values)


# Speed


class Bare:
    """The tokenizer alone: texts -> the number of their tokens."""

    def __init__(self, model: Path, call: str) -> None:
        self._encode: Any = getattr(load_tokenizer(model).backend_tokenizer, call)

    def __call__(self, texts: list[str]) -> int:
        return sum(len(encoding) for encoding in self._encode(texts, add_special_tokens=False))


def speed(arguments: argparse.Namespace, folder: Path) -> None:
    """Prepare against the bare tokenizer: the same text and processes, the best of two runs.

    All costs count: starting processes, and for prepare also reading, packing and writing. The bare
    tokenizer is called with offsets, its default, and without.
    """
    calls = ("encode_batch", "encode_batch_fast")
    rows = list(_gsm8k_rows(arguments.gsm8k, arguments.megabytes * 10**6))
    tokenizer = load_tokenizer(arguments.model)
    for kind in ("text", "chat"):
        data = folder / f"{kind}.jsonl"
        values = [_value(kind, question, answer) for question, answer in rows]
        data.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
        if kind == "text":
            texts = [value["text"] for value in values]
        else:
            chats = [value["messages"] for value in values]
            texts = [str(t) for t in tokenizer.apply_chat_template(chats, tokenize=False)]
        size = sum(map(len, texts))
        costs: dict[str, list[tuple[float, float]]] = {name: [] for name in (*calls, "prepare")}
        for turn in range(2):
            settings = settings_of(arguments.model, data, folder / f"{kind}-{turn}")
            for call in calls:
                costs[call].append(_cost(_run_bare, arguments.model, call, texts))
            costs["prepare"].append(_cost(_run_prepare, settings))
        print(f"speed     {kind}: {len(rows):,} rows, {size / 1e6:.0f} MB, {PROCESSES} processes")
        for i, what in enumerate(("seconds", "CPU seconds of all processes")):
            best = {name: min(turn[i] for turn in turns) for name, turns in costs.items()}
            ours = best["prepare"]
            shares = " and ".join(f"{100 * best[call] / ours:.0f} % of {call}" for call in calls)
            each = ", ".join(
                f"{name} {cost:.1f} ({size / cost / 1e6:.2f} MB/s)" for name, cost in best.items()
            )
            print(f"          {what}: {each}: {shares}", flush=True)


def _run_bare(model: Path, call: str, texts: list[str]) -> None:
    chunks = (texts[i : i + _CHUNK_ROWS] for i in range(0, len(texts), _CHUNK_ROWS))
    for _ in parallel_map(chunks, partial(Bare, model, call), processes=PROCESSES):
        pass


def _gsm8k_rows(path: Path, num_bytes: int) -> Iterator[tuple[str, str]]:
    """Questions and answers, repeated with other numbers."""
    with path.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    done = turn = 0
    while done < num_bytes:
        for row in rows:
            question, answer = row["question"], row["answer"]
            if turn:
                question, answer = f"{turn}. {question}", f"{answer} ({turn})"
            yield question, answer
            done += len(question) + len(answer)
        turn += 1


def _value(kind: str, question: str, answer: str) -> dict[str, Any]:
    if kind == "text":
        return {"text": f"{question}\n{answer}"}
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _run_prepare(settings: RunSettings) -> None:
    prepare_data(settings, Path(settings.output_dir) / "data", processes=PROCESSES)


def _cost(work: Callable[..., Any], *given: Any) -> tuple[float, float]:
    """Seconds of wall time, and CPU seconds of this process and its ended children.

    CPU seconds are the better measure on a busy machine.
    """
    begun, before = time.perf_counter(), _cpu_seconds()
    work(*given)
    return time.perf_counter() - begun, _cpu_seconds() - before


def _cpu_seconds() -> float:
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


# Memory and start


def memory(arguments: argparse.Namespace, folder: Path) -> None:
    """Peak memory of all processes together while synthetic rows are prepared."""
    data, run = (
        synthetic_rows(arguments.gsm8k, folder, arguments.rows),
        folder / f"run-{arguments.rows}",
    )
    shutil.rmtree(run, ignore_errors=True)
    command = [*_command(arguments.model, data, run), "prepare"]
    begun = time.perf_counter()
    with subprocess.Popen(command) as process:
        most = _watched(process)
    assert process.returncode == 0
    size = data.stat().st_size
    seconds = time.perf_counter() - begun
    peaks = ", ".join(f"{name} {value / 2**20:,.0f} MiB" for name, value in most.items())
    print(
        f"memory    {arguments.rows:,} rows, {size / 1e9:.2f} GB: {seconds:.0f} s "
        f"({size / seconds / 1e6:.1f} MB/s); all processes together at most: {peaks}",
        flush=True,
    )


def start(arguments: argparse.Namespace, folder: Path) -> None:
    """Seconds from the settings to the first micro-batch on prepared data."""
    seconds = {}
    for rows in (1000, arguments.rows):
        data, run = synthetic_rows(arguments.gsm8k, folder, rows), folder / f"run-{rows}"
        time.sleep(3)  # a file that has just been written is hashed each time
        for _ in range(2):  # the first prepares, or at least remembers the hash of the data
            subprocess.run([*_command(arguments.model, data, run), "prepare"], check=True)
        measured = [
            json.loads(subprocess.check_output([*_command(arguments.model, data, run), "start"]))
            for _ in range(3)
        ]
        seconds[rows] = min(measured)
    few, many = seconds.values()
    print(
        f"start     on {arguments.rows:,} prepared rows {many:.3f} s, on 1,000 {few:.3f} s: "
        f"{many - few:.3f} s more",
        flush=True,
    )


def synthetic_rows(gsm8k: Path, folder: Path, rows: int) -> Path:
    """Chat rows of about 1 kB: a number, and sentences of GSM8K drawn at random."""
    path = folder / f"synthetic-{rows}.jsonl"
    if path.exists():
        return path
    random = np.random.default_rng(0)
    text = " ".join(f"{question} {answer}" for question, answer in _gsm8k_rows(gsm8k, 1))
    sentences = [f"{sentence}. " for sentence in text.split(". ") if 20 < len(sentence) < 300]
    with path.open("w", encoding="utf-8") as stream:
        for row in range(rows):
            drawn = [sentences[i] for i in random.integers(0, len(sentences), _SENTENCES_A_ROW)]
            value = _value("chat", f"{row}. {''.join(drawn[:3])}", "".join(drawn[3:]))
            stream.write(json.dumps(value) + "\n")
    return path


def _command(model: Path, data: Path, run: Path) -> list[str]:
    return [sys.executable, "-m", "tests.bench.data_case", str(model), str(data), str(run)]


def _watched(process: "subprocess.Popen[bytes]") -> dict[str, int]:
    """Peak memory of a process tree: shared pages counted once (PSS), and in each (RSS)."""
    most = {"PSS": 0, "RSS": 0}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.5):
            for name, value in _tree_memory(process.pid).items():
                most[name] = max(most[name], value)

    watcher = threading.Thread(target=sample)
    watcher.start()
    process.wait()
    done.set()
    watcher.join()
    return most


def _tree_memory(pid: int) -> dict[str, int]:
    total = {"PSS": 0, "RSS": 0}
    try:
        parent = psutil.Process(pid)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return total
    for process in tree:
        try:
            memory = process.memory_full_info()
        except psutil.Error:
            continue  # it has just ended
        total["PSS"] += memory.pss
        total["RSS"] += memory.rss
    return total


# Packing


def packing(arguments: argparse.Namespace, folder: Path) -> None:
    """How full the packs of either algorithm are, and what 10 million lengths cost."""
    random = np.random.default_rng(0)
    cases = [("GSM8K", LENGTHS[size >= LENGTHS], size) for size in (512, 640, 768, 1024, 2048)]
    cases += [(f"{n:,} of 50 to 900", random.integers(50, 901, n), 1024) for n in (300, 3000)]
    # Lognormal, as the lengths of chat rows are: median 250 tokens.
    drawn = random.lognormal(np.log(250), 0.6, _MANY_LENGTHS)
    cases.append((f"{_MANY_LENGTHS:,}", np.clip(drawn, 8, 1024).astype(np.int64), 1024))
    for name, lengths, size in cases:
        counts = np.bincount(lengths, minlength=size + 1)
        full = {}
        for algorithm in (fill_gaps, best_fit_decreasing):
            packs = sum(times for _, times in algorithm(counts.copy(), size))
            full[algorithm.__name__] = (
                f"{packs:,} packs, {100 * lengths.sum() / packs / size:.2f} %"
            )
        begun = time.perf_counter()
        make_packs(lengths, size)
        seconds = time.perf_counter() - begun
        each = "; ".join(f"{name} {value}" for name, value in full.items())
        print(f"packing   {name} documents, packs of {size}: {each}; both {seconds:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"          process at most {peak:,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
