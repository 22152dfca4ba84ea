"""The track verb as a script; its arguments and wiring are in pipeline/cli/track.py."""

from pipeline.cli.track import main

if __name__ == "__main__":
    main()
