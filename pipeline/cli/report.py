"""Write a run's report.html and print its path: python launch/report.py RUN_FOLDER."""

from pipeline.cli.arguments import Parser, require_folder
from pipeline.cluster.exits import run_main
from pipeline.report.page import write_report


def report() -> None:
    """Parse the command line, write the report and print its path."""
    parser = Parser(__doc__)
    parser.add_run_folder()
    run_folder = parser.parse_args().run_folder
    require_folder(run_folder)
    print(write_report(run_folder))


def main() -> None:
    """Run the verb and end the process with its exit code."""
    run_main(report)


if __name__ == "__main__":
    main()
