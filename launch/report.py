"""Script for `rankzero report`; the arguments are in pipeline/cli/report.py."""

try:
    from pipeline.cli.report import main
except ModuleNotFoundError as error:
    from not_installed import exit_with_advice

    exit_with_advice(error)

if __name__ == "__main__":
    main()
