"""The train verb as a script; its arguments and wiring are in pipeline/cli/train.py."""

from pipeline.cli.train import main

if __name__ == "__main__":
    main()
