"""`make quickstart`: download the model, generate the data, then run the documented commands.

A command is skipped if its output is newer than its input, so a second `make quickstart` repeats
nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from download_model import download_model
from make_data import make_data

from pipeline.cluster.devices import detect_hardware
from pipeline.cluster.exits import run_main

FOLDER, RUN_FILE = Path("quickstart"), "launch/runs/quickstart.yaml"
RUN = FOLDER / "run"


def run(command: str, source: Path, output: Path) -> None:
    """Print a command and run it, unless its output is up to date."""
    print(f"\n$ {command}", flush=True)
    if output.exists() and output.stat().st_mtime >= source.stat().st_mtime:
        print(f"  already done: {output}", flush=True)
        return
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if code := subprocess.run(command.split(), env=environment, check=False).returncode:
        sys.exit(f"the command ended with exit code {code}")


def print_summary() -> None:
    scored = json.loads((RUN / "score.json").read_text(encoding="utf-8"))
    for answer in scored["answers"][:3]:
        print(f"\n  order    {answer['prompt']}")
        print(f"  before   {answer['base'].strip()[:150]!r}")
        print(f"  after    {answer['adapter'].strip()}")
    print(f"\nThree of {scored['rows']} held-out orders; {'model':<10} held-out loss  exact match")
    for name, result in scored["models"].items():
        print(f"{'':<30}{name:<10} {result['loss']:>13.4f} {100 * result['exact_match']:>10.1f} %")
    for label, name in (("adapter", "adapter"), ("merged", "merged"), ("report", "report.html")):
        print(f"{label:<8} {RUN / name}")


def main() -> None:
    download_model(FOLDER / "smollm2-135m-instruct")
    make_data(FOLDER)
    ranks = "--num_accelerators 2 " if detect_hardware().kind == "cpu" else ""
    trained, merged = RUN / "adapter/README.md", RUN / "merged/config.json"
    run(f"deepspeed --quiet {ranks}launch/train.py {RUN_FILE}", FOLDER / "train.jsonl", trained)
    run(f"python launch/merge.py {RUN}", trained, merged)
    run(f"python launch/score.py {RUN}", merged, RUN / "score.json")
    run(f"python launch/report.py {RUN}", RUN / "score.json", RUN / "report.html")
    print_summary()


if __name__ == "__main__":
    run_main(main)
