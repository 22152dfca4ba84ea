"""Script for `rankzero publish`; the arguments are in pipeline/cli/publish.py."""

from pipeline.cli.publish import main

if __name__ == "__main__":
    main()
