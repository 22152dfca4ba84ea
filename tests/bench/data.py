"""Speed, memory and cost of a start of prepared data: prints, asserts nothing.

    python -m tests.bench.data MODEL GSM8K [PART ...] [--rows N] [--megabytes M]

MODEL: a folder with a tokenizer and a chat template; GSM8K: its train.jsonl (question, answer).
Parts: speed (against the bare tokenizer), memory (of all processes, on N made-up rows of 1 kB),
start (on prepared data, N rows against a thousand), packing (of GSM8K, and of 10 million lengths),
waiting (of a step for its next micro-batch).
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
from pipeline.data.chat.encoder import load_tokenizer
from pipeline.data.prepare.parallel import in_order, usable_cpus
from pipeline.data.prepare.prepare import prepare
from tests.bench import waiting

PROCESSES = usable_cpus()
_PIECE_ROWS = 250  # of the bare tokenizer: 1/4 MB, as prepare's
_SENTENCES_A_ROW = 10
_MANY_LENGTHS = 10_000_000


def main() -> None:
    """Run the parts that are named, or all."""
    parts = {
        "speed": speed,
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
    """The tokenizer alone: texts -> how many tokens they have. Nothing else is done with them."""

    def __init__(self, model: Path, call: str) -> None:
        self._encode: Any = getattr(load_tokenizer(model).backend_tokenizer, call)

    def __call__(self, texts: list[str]) -> int:
        return sum(len(encoding) for encoding in self._encode(texts, add_special_tokens=False))


def speed(arguments: argparse.Namespace, folder: Path) -> None:
    """Prepare against the bare tokenizer: the same text, the same processes, the best of turns.

    Everything counts: starting processes, and of prepare also reading, packing and writing.
    The bare tokenizer by its default call, and by the one that does not say where characters lie.
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
    pieces = (texts[i : i + _PIECE_ROWS] for i in range(0, len(texts), _PIECE_ROWS))
    for _ in in_order(pieces, partial(Bare, model, call), processes=PROCESSES):
        pass


def _gsm8k_rows(path: Path, num_bytes: int) -> Iterator[tuple[str, str]]:
    """Questions and answers, with other numbers each time around."""
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
    prepare(settings, Path(settings.output_dir) / "data", processes=PROCESSES)


def _cost(work: Callable[..., Any], *given: Any) -> tuple[float, float]:
    """Seconds that it takes, and of CPUs in this process and those that it starts and ends.

    The second says more where the machine has other work.
    """
    begun, before = time.perf_counter(), _cpu_seconds()
    work(*given)
    return time.perf_counter() - begun, _cpu_seconds() - before


def _cpu_seconds() -> float:
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


# Memory and start


def memory(arguments: argparse.Namespace, folder: Path) -> None:
    """Most memory of all processes together while the made-up rows are prepared."""
    data, run = made_up(arguments.gsm8k, folder, arguments.rows), folder / f"run-{arguments.rows}"
    shutil.rmtree(run, ignore_errors=True)
    command = [*_command(arguments.model, data, run), "prepare"]
    begun = time.perf_counter()
    with subprocess.Popen(command) as process:
        most = _watched(process)
    assert process.returncode == 0
    size = data.stat().st_size
    seconds = time.perf_counter() - begun
    said = ", ".join(f"{name} {value / 2**20:,.0f} MiB" for name, value in most.items())
    print(
        f"memory    {arguments.rows:,} rows, {size / 1e9:.2f} GB: {seconds:.0f} s "
        f"({size / seconds / 1e6:.1f} MB/s); all processes together at most: {said}",
        flush=True,
    )


def start(arguments: argparse.Namespace, folder: Path) -> None:
    """From settings to the first micro-batch, where everything is prepared already."""
    seconds = {}
    for rows in (1000, arguments.rows):
        data, run = made_up(arguments.gsm8k, folder, rows), folder / f"run-{rows}"
        time.sleep(3)  # a file that has just been written is hashed each time
        for _ in range(2):  # the first prepares, or at least remembers the hash of the data
            subprocess.run([*_command(arguments.model, data, run), "prepare"], check=True)
        found = [
            json.loads(subprocess.check_output([*_command(arguments.model, data, run), "start"]))
            for _ in range(3)
        ]
        seconds[rows] = min(found)
    few, many = seconds.values()
    print(
        f"start     on {arguments.rows:,} prepared rows {many:.3f} s, on 1,000 {few:.3f} s: "
        f"{many - few:.3f} s more",
        flush=True,
    )


def made_up(gsm8k: Path, folder: Path, rows: int) -> Path:
    """Chat rows of about 1 kB: a number, and sentences of GSM8K drawn at random."""
    path = folder / f"made-up-{rows}.jsonl"
    if path.exists():
        return path
    random = np.random.default_rng(0)
    told = " ".join(f"{question} {answer}" for question, answer in _gsm8k_rows(gsm8k, 1))
    sentences = [f"{sentence}. " for sentence in told.split(". ") if 20 < len(sentence) < 300]
    with path.open("w", encoding="utf-8") as stream:
        for row in range(rows):
            said = [sentences[i] for i in random.integers(0, len(sentences), _SENTENCES_A_ROW)]
            value = _value("chat", f"{row}. {''.join(said[:3])}", "".join(said[3:]))
            stream.write(json.dumps(value) + "\n")
    return path


def _command(model: Path, data: Path, run: Path) -> list[str]:
    return [sys.executable, "-m", "tests.bench.data_case", str(model), str(data), str(run)]


def _watched(process: "subprocess.Popen[bytes]") -> dict[str, int]:
    """The most that a process and its children had at once, shared pages counted once and each."""
    most = {"PSS": 0, "RSS": 0}
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.5):
            found = _tree_memory(process.pid)
            for name, value in found.items():
                most[name] = max(most[name], value)

    watcher = threading.Thread(target=look)
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
            found = process.memory_full_info()
        except psutil.Error:
            continue  # it has just ended
        total["PSS"] += found.pss
        total["RSS"] += found.rss
    return total


# Packing


def packing(arguments: argparse.Namespace, folder: Path) -> None:
    """How full the packs of GSM8K are, and what 10 million lengths cost."""
    rows = _gsm8k_rows(arguments.gsm8k, 1)
    data = folder / "gsm8k.jsonl"
    values = (json.dumps(_value("chat", question, answer)) for question, answer in rows)
    data.write_text("".join(f"{value}\n" for value in values), encoding="utf-8")
    for kind, given in (("GSM8K", str(data)), ("10 million lengths", str(_MANY_LENGTHS))):
        command = [*_command(arguments.model, Path(given), folder / "packed"), "packs"]
        said = json.loads(subprocess.check_output(command))
        print(
            f"packing   {kind}: {said['documents']:,} documents of up to {said['max_length']} "
            f"tokens in {said['packs']:,} packs, {100 * said['full']:.2f} % full, in "
            f"{said['seconds']:.2f} s, process at most {said['peak'] / 2**20:,.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
