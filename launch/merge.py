"""The merge verb as a script; its arguments and wiring are in pipeline/cli/merge.py."""

from pipeline.cli.merge import main

if __name__ == "__main__":
    main()
