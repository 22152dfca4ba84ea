"""Script for `rankzero prepare`; the arguments are in pipeline/cli/prepare.py."""

from pipeline.cli.prepare import main

if __name__ == "__main__":
    main()
