"""The score verb as a script; its arguments and wiring are in pipeline/cli/score.py."""

from pipeline.cli.score import main

if __name__ == "__main__":
    main()
