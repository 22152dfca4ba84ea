"""Script for `rankzero plan`; the arguments are in pipeline/cli/plan.py."""

try:
    from pipeline.cli.plan import main
except ModuleNotFoundError as error:
    from not_installed import exit_with_advice

    exit_with_advice(error)

if __name__ == "__main__":
    main()
