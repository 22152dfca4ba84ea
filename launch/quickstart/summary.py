"""The end of the quickstart: three answers, the scores, the files and the next command."""

import json
import os
import shutil
import sys
import textwrap
from pathlib import Path

NUM_ANSWERS = 3
MAX_BASE_ANSWER = 150  # characters; the untrained model may write much


def print_summary(run: Path, run_file: str) -> None:
    """Print the summary of the run in the folder `run`, whose settings are in `run_file`."""
    score = json.loads((run / "score.json").read_text(encoding="utf-8"))
    for answer in score["answers"][:NUM_ANSWERS]:
        print()
        print_wrapped("order", answer["prompt"])
        print_wrapped("before", repr(answer["base"].strip()[:MAX_BASE_ANSWER]))
        print_wrapped("after", answer["adapter"].strip())
    print(f"\nThree of {score['rows']} held-out orders. Scores:")
    for name, result in score["models"].items():
        match = f"{100 * result['exact_match']:.1f} % answered exactly"
        print(f"  {name:<8} {match}, held-out loss {result['loss']:.4f}")
    for label, name in (("adapter", "adapter"), ("merged", "merged"), ("report", "report.html")):
        print(f"{label:<8} {run / name}")
    path_in_venv = os.path.relpath(Path(sys.executable).with_name("rankzero"))
    command = "rankzero" if shutil.which("rankzero") else path_in_venv
    print("\nNext, with your own file (JSONL, JSON, CSV or Parquet: docs/howto/data.md):")
    print(f"  {command} train {run_file} \\")
    print("      train_data=FILE eval_data=0.1 output_dir=my-run\n")


def print_wrapped(label: str, text: str) -> None:
    """Print a label and a text that is wrapped at the width of the terminal."""
    width, indent = shutil.get_terminal_size().columns, 11 * " "
    print(textwrap.fill(text, width, initial_indent=f"  {label:<9}", subsequent_indent=indent))
