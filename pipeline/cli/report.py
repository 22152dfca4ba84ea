"""Write the report of a run, or a comparison of runs, as one HTML file, and print its path.

{command} RUN_FOLDER            writes RUN_FOLDER/report.html
{command} RUN_FOLDER --watch    waits for the run, and writes it again until the run ends
{command} RUN_FOLDER RUN_FOLDER ...
                                              writes comparison.html next to the run folders
"""

from pathlib import Path

from pipeline.cli.arguments import Parser, require_folder
from pipeline.cluster.exits import run_main
from pipeline.errors import UserError
from pipeline.report.comparison import write_comparison
from pipeline.report.folder import is_run_folder
from pipeline.report.page import write_report
from pipeline.report.watch import wait_for_run, watch_run


def report() -> None:
    """Parse the command line, write the page and print its path."""
    parser = Parser("report", help_template=__doc__)
    parser.add_argument("run_folders", type=Path, nargs="+", help="output_dir of one or more runs")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="wait for the run, and write the report again until it ends",
    )
    args = parser.parse_args()
    if args.watch and len(args.run_folders) > 1:
        raise UserError("--watch follows one run; name one run folder")
    if args.watch:
        _watch(args.run_folders[0])
        return
    for folder in args.run_folders:
        require_folder(folder)
    if len(args.run_folders) > 1:
        print(write_comparison(args.run_folders))
    else:
        print(write_report(args.run_folders[0]))


def _watch(folder: Path) -> None:
    """Follow a run, which may begin later."""
    if folder.exists():
        require_folder(folder)  # it is not a file
    if not is_run_folder(folder):
        print(f"{folder} has no run yet; waiting for it to begin ...", flush=True)
        wait_for_run(folder)
    state = watch_run(folder, _announce)
    print(f"the run is {state}" if state else "the run has no status.json")


def _announce(path: Path) -> None:
    """Called by `watch_run` when the report is first written."""
    print(path)
    print(
        "open it in a browser, where it follows the run; Ctrl-C here does not stop the run",
        flush=True,
    )


def main() -> None:
    """Run this command and end the process with its exit code."""
    run_main(report)


if __name__ == "__main__":
    main()
