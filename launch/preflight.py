"""Script for `rankzero preflight`; the arguments are in pipeline/cli/preflight.py."""

from pipeline.cli.preflight import main

if __name__ == "__main__":
    main()
