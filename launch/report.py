"""The report verb as a script; its arguments and wiring are in pipeline/cli/report.py."""

from pipeline.cli.report import main

if __name__ == "__main__":
    main()
