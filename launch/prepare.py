"""Script for `rankzero prepare`; the arguments are in pipeline/cli/prepare.py."""

try:
    from pipeline.cli.prepare import main
except ModuleNotFoundError as error:
    from not_installed import exit_with_advice

    exit_with_advice(error)

if __name__ == "__main__":
    main()
