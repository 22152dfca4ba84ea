"""Benchmarks of data preparation and loading: prints figures, asserts nothing.

    python -m tests.bench.data MODEL GSM8K [PART ...] [--rows N] [--megabytes M]

MODEL is a folder with a tokenizer and a chat template. GSM8K is the data set's train.jsonl
(question, answer). Parts, by default all:

    speed    prepare, compared with the tokenizer alone, on M megabytes of text
    agents   prepare on long agent rows, compared with short rows
    memory   peak of all processes of prepare, on N synthetic rows of 1 kB
    start    time to the first micro-batch on prepared data, of N rows and of 1,000
    packing  fill rate of each packing algorithm on GSM8K and other lengths
    waiting  time that a rank waits for its next micro-batch
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
from tests.bench import batch_wait
from tests.bench.agents import agents
from tests.bench.gsm8k import LENGTHS

PROCESSES = usable_cpus()
_CHUNK_ROWS = 250  # for the tokenizer alone: 1/4 MB, as in prepare
_SENTENCES_A_ROW = 10
_MANY_LENGTHS = 10_000_000


def main() -> None:
    """Run the chosen parts."""
    parts = {
        "speed": speed,
        "agents": lambda arguments, folder: agents(arguments.model, arguments.gsm8k, folder),
        "memory": memory,
        "start": start,
        "packing": packing,
        "waiting": lambda arguments, folder: batch_wait.main(),
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
    """Settings of a run on these rows."""
    keys = {"model": str(model), "train_data": str(data), "output_dir": str(folder)}
    return RunSettings.model_validate(keys | values)


# Speed


class TokenCounter:
    """Worker that only tokenises: texts -> number of tokens."""

    def __init__(self, model: Path, call: str) -> None:
        self._encode: Any = getattr(load_tokenizer(model).backend_tokenizer, call)

    def __call__(self, texts: list[str]) -> int:
        return sum(len(encoding) for encoding in self._encode(texts, add_special_tokens=False))


def speed(arguments: argparse.Namespace, folder: Path) -> None:
    """Compare prepare with the tokenizer alone: same text and processes, the best of two runs.

    The figures include process starts, and for prepare also reading, packing and writing. The
    tokenizer alone is measured with offsets (encode_batch) and without (encode_batch_fast).
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
        for repeat in range(2):
            settings = settings_of(arguments.model, data, folder / f"{kind}-{repeat}")
            for call in calls:
                costs[call].append(_cost(_run_tokenizer, arguments.model, call, texts))
            costs["prepare"].append(_cost(_run_prepare, settings))
        print(f"speed     {kind}: {len(rows):,} rows, {size / 1e6:.0f} MB, {PROCESSES} processes")
        for index, unit in enumerate(("seconds", "CPU seconds of all processes")):
            best = {name: min(run[index] for run in runs) for name, runs in costs.items()}
            # The speed of prepare relative to that of the tokenizer alone.
            shares = " and ".join(
                f"{100 * best[call] / best['prepare']:.0f} % of {call}" for call in calls
            )
            rates = ", ".join(
                f"{name} {cost:.1f} ({size / cost / 1e6:.2f} MB/s)" for name, cost in best.items()
            )
            print(f"          {unit}: {rates}: {shares}", flush=True)


def _run_tokenizer(model: Path, call: str, texts: list[str]) -> None:
    chunks = (texts[i : i + _CHUNK_ROWS] for i in range(0, len(texts), _CHUNK_ROWS))
    for _ in parallel_map(chunks, partial(TokenCounter, model, call), processes=PROCESSES):
        pass


def _gsm8k_rows(path: Path, num_bytes: int) -> Iterator[tuple[str, str]]:
    """Questions and answers, repeated up to `num_bytes`; repetitions differ by a number."""
    with path.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    yielded = repetition = 0
    while yielded < num_bytes:
        for row in rows:
            question, answer = row["question"], row["answer"]
            if repetition:
                question, answer = f"{repetition}. {question}", f"{answer} ({repetition})"
            yield question, answer
            yielded += len(question) + len(answer)
        repetition += 1


def _value(kind: str, question: str, answer: str) -> dict[str, Any]:
    if kind == "text":
        return {"text": f"{question}\n{answer}"}
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _run_prepare(settings: RunSettings) -> None:
    prepare_data(settings, Path(settings.output_dir) / "data", processes=PROCESSES)


def _cost(work: Callable[..., Any], *args: Any) -> tuple[float, float]:
    """Wall-clock seconds of a call, and CPU seconds of this process and its ended children.

    CPU seconds depend less on other load of the machine.
    """
    start_time, before = time.perf_counter(), _cpu_seconds()
    work(*args)
    return time.perf_counter() - start_time, _cpu_seconds() - before


def _cpu_seconds() -> float:
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


# Memory and start


def memory(arguments: argparse.Namespace, folder: Path) -> None:
    """Peak memory of all processes of prepare together, on synthetic rows."""
    data, run = (
        synthetic_rows(arguments.gsm8k, folder, arguments.rows),
        folder / f"run-{arguments.rows}",
    )
    shutil.rmtree(run, ignore_errors=True)
    command = [*_command(arguments.model, data, run), "prepare"]
    start_time = time.perf_counter()
    with subprocess.Popen(command) as process:
        peak = _peak_memory(process)
    assert process.returncode == 0
    size = data.stat().st_size
    seconds = time.perf_counter() - start_time
    peaks = ", ".join(f"{name} {value / 2**20:,.0f} MiB" for name, value in peak.items())
    print(
        f"memory    {arguments.rows:,} rows, {size / 1e9:.2f} GB: {seconds:.0f} s "
        f"({size / seconds / 1e6:.1f} MB/s); all processes together at most: {peaks}",
        flush=True,
    )


def start(arguments: argparse.Namespace, folder: Path) -> None:
    """Seconds from loading the settings to the first micro-batch on prepared data."""
    seconds = {}
    for rows in (1000, arguments.rows):
        data, run = synthetic_rows(arguments.gsm8k, folder, rows), folder / f"run-{rows}"
        time.sleep(3)  # the hash of a file that was just written is not cached
        for _ in range(2):  # the first prepares the data, or caches its hash
            subprocess.run([*_command(arguments.model, data, run), "prepare"], check=True)
        measured = [
            json.loads(subprocess.check_output([*_command(arguments.model, data, run), "start"]))
            for _ in range(3)
        ]
        seconds[rows] = min(measured)
    of_1000, of_all = seconds.values()
    print(
        f"start     on {arguments.rows:,} prepared rows {of_all:.3f} s, on 1,000 {of_1000:.3f} s: "
        f"{of_all - of_1000:.3f} s more",
        flush=True,
    )


def synthetic_rows(gsm8k: Path, folder: Path, rows: int) -> Path:
    """Write chat rows of about 1 kB: a number, and random sentences of GSM8K."""
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


def _peak_memory(process: "subprocess.Popen[bytes]") -> dict[str, int]:
    """Peak memory of a process tree; PSS counts a shared page once, RSS in each process."""
    peak = {"PSS": 0, "RSS": 0}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.5):
            for name, value in _tree_memory(process.pid).items():
                peak[name] = max(peak[name], value)

    watcher = threading.Thread(target=sample)
    watcher.start()
    process.wait()
    done.set()
    watcher.join()
    return peak


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
    """Fill rate of the packs of each algorithm, and time and memory for 10 million lengths."""
    random = np.random.default_rng(0)
    cases = [("GSM8K", LENGTHS[size >= LENGTHS], size) for size in (512, 640, 768, 1024, 2048)]
    cases += [(f"{n:,} of 50 to 900", random.integers(50, 901, n), 1024) for n in (300, 3000)]
    # Lognormal, like the lengths of chat rows, with a median of 250 tokens.
    drawn = random.lognormal(np.log(250), 0.6, _MANY_LENGTHS)
    cases.append((f"{_MANY_LENGTHS:,}", np.clip(drawn, 8, 1024).astype(np.int64), 1024))
    for name, lengths, size in cases:
        counts = np.bincount(lengths, minlength=size + 1)
        fill_rates = {}
        for algorithm in (fill_gaps, best_fit_decreasing):
            packs = sum(times for _, times in algorithm(counts.copy(), size))
            fill_rates[algorithm.__name__] = (
                f"{packs:,} packs, {100 * lengths.sum() / packs / size:.2f} %"
            )
        start_time = time.perf_counter()
        make_packs(lengths, size)
        seconds = time.perf_counter() - start_time
        rates = "; ".join(f"{algorithm} {value}" for algorithm, value in fill_rates.items())
        print(f"packing   {name} documents, packs of {size}: {rates}; both {seconds:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"          process at most {peak:,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
