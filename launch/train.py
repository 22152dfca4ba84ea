"""Train an adapter as a run file says.

deepspeed launch/train.py RUN.yaml [key=value ...]        every GPU of this machine
python launch/train.py RUN.yaml [key=value ...]           one process
python launch/train.py RUN.yaml --debug                   a short run with every check on
"""

import argparse
from pathlib import Path

from pipeline.cluster.exits import run_main
from pipeline.config.load import load_settings
from pipeline.train.run import run_training


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_file", type=Path, help="run file (docs/configuration.md)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for this start")
    parser.add_argument("--debug", action="store_true", help="few rows and steps, tracebacks shown")
    # DeepSpeed's launcher puts it before our arguments; the environment says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse()
    run_main(
        lambda: run_training(
            load_settings(arguments.run_file, arguments.overrides), is_debug=arguments.debug
        ),
        tracebacks=arguments.debug,
    )


if __name__ == "__main__":
    main()
