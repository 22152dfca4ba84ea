"""Script for `rankzero score`; the arguments are in pipeline/cli/score.py."""

try:
    from pipeline.cli.score import main
except ModuleNotFoundError as error:
    from not_installed import exit_with_advice

    exit_with_advice(error)

if __name__ == "__main__":
    main()
