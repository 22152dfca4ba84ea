"""Script for `rankzero export`; the arguments are in pipeline/cli/export.py."""

try:
    from pipeline.cli.export import main
except ModuleNotFoundError as error:
    from not_installed import exit_with_advice

    exit_with_advice(error)

if __name__ == "__main__":
    main()
