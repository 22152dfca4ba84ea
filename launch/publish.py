"""Script for `rankzero publish`; the arguments are in pipeline/cli/publish.py."""

try:
    from pipeline.cli.publish import main
except ModuleNotFoundError as error:
    from not_installed import exit_with_advice

    exit_with_advice(error)

if __name__ == "__main__":
    main()
