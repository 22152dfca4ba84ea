"""Compare base, adapter and merged model on the held-out rows of a run.

    python launch/score.py RUN_FOLDER [--rows N]

Writes RUN_FOLDER/score.json, which the report shows.
"""

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.cluster.devices import detect_hardware, set_environment
from pipeline.cluster.exits import run_main
from pipeline.cluster.placement import Placement
from pipeline.config.load import load_settings
from pipeline.files import dump_json


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_folder", type=Path, help="output_dir of a run")
    parser.add_argument("--rows", type=int, default=200, help="at most so many rows (200)")
    return parser.parse_args()


def score() -> None:
    arguments = parse()
    settings = load_settings(arguments.run_folder / "run.yaml")
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    set_environment(Placement(), detect_hardware())
    from pipeline.evaluate.score import score_run

    found = score_run(arguments.run_folder, settings, arguments.rows)
    (arguments.run_folder / "score.json").write_text(dump_json(found), encoding="utf-8")
    table = Table(title=f"{found['rows']} held-out rows")
    for column in ("", "held-out loss", "exact match", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for name, said in found["models"].items():
        match, seconds = f"{100 * said['exact_match']:.1f} %", f"{said['seconds']:.1f}"
        table.add_row(name, f"{said['loss']:.4f}", match, seconds)
    Console().print(table)


if __name__ == "__main__":
    run_main(score)
