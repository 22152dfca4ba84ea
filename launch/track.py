"""Script for `rankzero track`; the arguments are in pipeline/cli/track.py."""

from pipeline.cli.track import main

if __name__ == "__main__":
    main()
