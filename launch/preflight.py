"""Script for `rankzero preflight`; the arguments are in pipeline/cli/preflight.py."""

try:
    from pipeline.cli.preflight import main
except ModuleNotFoundError as error:
    from not_installed import exit_with_advice

    exit_with_advice(error)

if __name__ == "__main__":
    main()
