"""The prepare verb as a script; its arguments and wiring are in pipeline/cli/prepare.py."""

from pipeline.cli.prepare import main

if __name__ == "__main__":
    main()
