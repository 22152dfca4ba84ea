"""Script for `rankzero convert`; the arguments are in pipeline/cli/convert.py."""

from pipeline.cli.convert import main

if __name__ == "__main__":
    main()
