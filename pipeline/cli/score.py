"""Compare the base, the adapter and the merged model on the held-out rows of a run.

    python launch/score.py RUN_FOLDER [--rows N]

Writes RUN_FOLDER/score.json, which the report shows.
"""

import os

from rich.console import Console
from rich.table import Table

from pipeline.adapter.trained_on import require_scorable
from pipeline.cli.arguments import Parser, count, run_settings
from pipeline.cluster.devices import detect_hardware, set_environment
from pipeline.cluster.exits import run_main
from pipeline.cluster.placement import Placement
from pipeline.cluster.progress import show_progress
from pipeline.files import dump_json, write_text


def score() -> None:
    """Parse the command line, score, write score.json and print a table."""
    parser = Parser(__doc__)
    parser.add_run_folder()
    parser.add_argument("--rows", type=count, default=200, metavar="N", help="at most N rows (200)")
    args = parser.parse_args()
    settings = run_settings(args.run_folder)
    require_scorable(args.run_folder, settings)
    # Waiting threads sleep. If they spun, they would take cores from the threads that compute when
    # other programs use the machine too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    set_environment(Placement(), detect_hardware())
    with show_progress("importing PyTorch"):
        from pipeline.evaluate.score import score_run

    scores = score_run(args.run_folder, settings, args.rows)
    write_text(args.run_folder / "score.json", dump_json(scores))
    table = Table(title=f"{scores['rows']} held-out rows")
    for column in ("", "held-out loss", "exact match", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for name, result in scores["models"].items():
        match, seconds = f"{100 * result['exact_match']:.1f} %", f"{result['seconds']:.1f}"
        table.add_row(name, f"{result['loss']:.4f}", match, seconds)
    Console().print(table)


def main() -> None:
    """Run the verb and end the process with its exit code."""
    run_main(score)


if __name__ == "__main__":
    main()
