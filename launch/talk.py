"""Script for `rankzero talk`; the arguments are in pipeline/cli/talk.py."""

from pipeline.cli.talk import main

if __name__ == "__main__":
    main()
