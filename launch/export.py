"""Script for `rankzero export`; the arguments are in pipeline/cli/export.py."""

from pipeline.cli.export import main

if __name__ == "__main__":
    main()
