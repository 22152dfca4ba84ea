"""Script for `rankzero track`; the arguments are in pipeline/cli/track.py."""

try:
    from pipeline.cli.track import main
except ModuleNotFoundError as error:
    from not_installed import exit_with_advice

    exit_with_advice(error)

if __name__ == "__main__":
    main()
