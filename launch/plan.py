"""The plan verb as a script; its arguments and wiring are in pipeline/cli/plan.py."""

from pipeline.cli.plan import main

if __name__ == "__main__":
    main()
