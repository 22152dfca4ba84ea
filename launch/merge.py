"""Script for `rankzero merge`; the arguments are in pipeline/cli/merge.py."""

from pipeline.cli.merge import main

if __name__ == "__main__":
    main()
