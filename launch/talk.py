"""Script for `rankzero talk`; the arguments are in pipeline/cli/talk.py."""

try:
    from pipeline.cli.talk import main
except ModuleNotFoundError as error:
    from not_installed import exit_with_advice

    exit_with_advice(error)

if __name__ == "__main__":
    main()
