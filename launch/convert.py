"""Script for `rankzero convert`; the arguments are in pipeline/cli/convert.py."""

try:
    from pipeline.cli.convert import main
except ModuleNotFoundError as error:
    from not_installed import exit_with_advice

    exit_with_advice(error)

if __name__ == "__main__":
    main()
