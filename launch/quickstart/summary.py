"""The end of the quickstart: three answers, the scores, the files and the next command."""

import json
import os
import shutil
import sys
import textwrap
from pathlib import Path


def print_summary(run: Path, run_file: str) -> None:
    scored = json.loads((run / "score.json").read_text(encoding="utf-8"))
    for answer in scored["answers"][:3]:
        print()
        print_wrapped("order", answer["prompt"])
        print_wrapped("before", repr(answer["base"].strip()[:150]))
        print_wrapped("after", answer["adapter"].strip())
    print(f"\nThree of {scored['rows']} held-out orders. Scores:")
    for name, result in scored["models"].items():
        match = f"{100 * result['exact_match']:.1f} % answered exactly"
        print(f"  {name:<8} {match}, held-out loss {result['loss']:.4f}")
    for label, name in (("adapter", "adapter"), ("merged", "merged"), ("report", "report.html")):
        print(f"{label:<8} {run / name}")
    own = os.path.relpath(Path(sys.executable).with_name("rankzero"))
    command = "rankzero" if shutil.which("rankzero") else own
    print("\nNext, with your own file (JSONL, JSON, CSV or Parquet: docs/howto/data.md):")
    print(f"  {command} train {run_file} \\")
    print("      train_data=FILE eval_data=0.1 output_dir=my-run\n")


def print_wrapped(label: str, text: str) -> None:
    width, indent = shutil.get_terminal_size().columns, 11 * " "
    print(textwrap.fill(text, width, initial_indent=f"  {label:<9}", subsequent_indent=indent))
