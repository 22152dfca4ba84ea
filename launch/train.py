"""Script for `rankzero train`; the arguments are in pipeline/cli/train.py."""

from pipeline.cli.train import main

if __name__ == "__main__":
    main()
