"""Script for `rankzero report`; the arguments are in pipeline/cli/report.py."""

from pipeline.cli.report import main

if __name__ == "__main__":
    main()
