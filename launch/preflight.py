"""The preflight verb as a script; its arguments and wiring are in pipeline/cli/preflight.py."""

from pipeline.cli.preflight import main

if __name__ == "__main__":
    main()
