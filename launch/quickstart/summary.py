"""The end of the quickstart: three answers, the scores, the files and the next command."""

import json
import os
import shutil
import sys
from pathlib import Path


def print_summary(run: Path, run_file: str) -> None:
    scored = json.loads((run / "score.json").read_text(encoding="utf-8"))
    for answer in scored["answers"][:3]:
        print(f"\n  order    {answer['prompt']}")
        print(f"  before   {answer['base'].strip()[:150]!r}")
        print(f"  after    {answer['adapter'].strip()}")
    print(f"\nThree of {scored['rows']} held-out orders. Scores:")
    for name, result in scored["models"].items():
        match = f"{100 * result['exact_match']:.1f} % answered exactly"
        print(f"  {name:<8} {match}, held-out loss {result['loss']:.4f}")
    for label, name in (("adapter", "adapter"), ("merged", "merged"), ("report", "report.html")):
        print(f"{label:<8} {run / name}")
    own = os.path.relpath(Path(sys.executable).with_name("rankzero"))
    command = "rankzero" if shutil.which("rankzero") else own
    print("\nNext, with your own file (JSONL, JSON, CSV or Parquet: docs/howto/data.md):")
    print(f"  {command} train {run_file} train_data=FILE eval_data=0.1 output_dir=my-run\n")
