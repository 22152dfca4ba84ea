"""Script for `rankzero score`; the arguments are in pipeline/cli/score.py."""

from pipeline.cli.score import main

if __name__ == "__main__":
    main()
