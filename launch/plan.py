"""Script for `rankzero plan`; the arguments are in pipeline/cli/plan.py."""

from pipeline.cli.plan import main

if __name__ == "__main__":
    main()
