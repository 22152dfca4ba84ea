"""Script for `rankzero merge`; the arguments are in pipeline/cli/merge.py."""

try:
    from pipeline.cli.merge import main
except ModuleNotFoundError as error:
    from not_installed import exit_with_advice

    exit_with_advice(error)

if __name__ == "__main__":
    main()
