"""Measure every model kind in an end-to-end run, and write the results to results.jsonl.

    python -m tests.models.matrix [KIND ...]        (`make models`)

The file gets one line for each kind as soon as it is measured. Without arguments, a kind is skipped
if its line was made from the same config, library versions and pipeline code: an interrupted run of
the command resumes.
"""

import hashlib
import json
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests import ROOT
from tests.models.end_to_end import MODES, check_class, train, verify
from tests.models.kinds import ALL
from tests.ranks import run_processes

RESULTS = ROOT / "tests/models/results.jsonl"
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")
LOSS_LIMIT = 1e-4
MERGE_LIMIT = 1e-6


def main():
    """Measure the kinds of the command line, or all whose line is missing or outdated."""
    names = sys.argv[1:]
    done = {} if names else {line["kind"]: line["key"] for line in read_results()}
    for kind in names or ALL:
        if done.get(kind) == key_of(kind):
            continue
        start = time.monotonic()
        line = {"kind": kind, "key": key_of(kind), **measure(kind)}
        line["versions"] = [f"{name} {version(name)}" for name in PACKAGES]
        line |= {"seconds": round(time.monotonic() - start, 1), "date": f"{datetime.now(UTC):%F}"}
        write_result(line)
        sys.stdout.write(f"{line['state']:8}{kind} {line['seconds']} s {line.get('reason', '')}\n")
        sys.stdout.flush()


def key_of(kind):
    """Hash of the inputs of a result: config, library versions and pipeline code."""
    parts = [json.dumps(ALL[kind]), *(f"{name} {version(name)}" for name in PACKAGES)]
    parts += [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("pipeline/**/*.py"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def read_results():
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def write_result(line):
    """Add or replace the line of a kind; lines are in the order of ALL."""
    lines = {old["kind"]: old for old in read_results()} | {line["kind"]: line}
    ordered = [json.dumps(lines[kind]) for kind in ALL if kind in lines]
    RESULTS.write_text("\n".join(ordered) + "\n", encoding="utf-8")


def measure(kind):
    """The line of a kind: its results, with `state` (pass, refused or failed) and its reason."""
    work = Path(tempfile.mkdtemp(prefix="rankzero-models-"))
    try:
        return with_state(*_measure(kind, work / "model"))
    finally:
        shutil.rmtree(work)


def _measure(kind, folder):
    result, problems = {}, []
    try:
        [result] = run_processes(check_class, [(kind, ALL, folder)], 240)
        if "refused" in result:
            return result, problems
        # `without_reentrant`: the reasons why the class cannot use re-entrant checkpointing.
        is_recomputable = not result["without_reentrant"]
        for mode in MODES:
            if mode == "experts" and not result["has_experts"]:
                continue
            changes = {} if is_recomputable else {"gradient_checkpointing": False}
            try:
                train(folder, mode, changes)
                [result[mode]] = run_processes(verify, [(folder, mode)], 240)
            except AssertionError as error:
                problems.append(f"{mode}: {error}")
    except AssertionError as error:
        problems.append(str(error))
    return result, problems


def with_state(result, problems):
    """The results of a kind, with `state` (pass, refused or failed) and its reason."""
    if "refused" in result:
        return {"state": "refused", "reason": result["refused"], **result}
    for mode in MODES:
        values = result.get(mode)
        if values is None:
            continue
        if values["loss_error"] > LOSS_LIMIT:
            problems.append(f"{mode}: held-out loss differs by {values['loss_error']:.1e}")
        if values["zero_matrices"]:
            problems.append(f"{mode}: {values['zero_matrices']} matrices of the adapter are zero")
        # The error of the merged weights, or a text that says why there is no merged model. A text
        # is not a problem if the checks of the class found the same (`without_merge`).
        merged = values.get("merged", 0.0)
        has_no_merge = isinstance(merged, str)
        if (has_no_merge and not result["without_merge"]) or (
            not has_no_merge and merged > MERGE_LIMIT
        ):
            problems.append(f"{mode}: merge: {merged}")
    if problems:
        return {"state": "failed", "reason": "; ".join(_short(text) for text in problems), **result}
    return {"state": "pass", **result}


def _short(text):
    """The first line of a traceback and its last, which names the exception."""
    lines = text.strip().splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


if __name__ == "__main__":
    main()
