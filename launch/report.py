"""Write a run's report.html and print where it is: python launch/report.py RUN_FOLDER."""

import argparse
from pathlib import Path

from pipeline.cluster.exits import run_main
from pipeline.report.page import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_folder", type=Path, help="output_dir of a run, finished or not")
    print(write_report(parser.parse_args().run_folder))


if __name__ == "__main__":
    run_main(main)
