"""Script for `rankzero train`; the arguments are in pipeline/cli/train.py."""

try:
    from pipeline.cli.train import main
except ModuleNotFoundError as error:
    from not_installed import exit_with_advice

    exit_with_advice(error)

if __name__ == "__main__":
    main()
