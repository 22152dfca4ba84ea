"""Convert a configuration of another training program to a run file.

It reads files of axolotl, LLaMA-Factory, ms-swift, torchtune and TRL in YAML or JSON, and the
options of a command in a shell script:

    {command} CONFIG.yaml --gpus 8 > RUN.yaml

Comments in the run file name the option from which each setting comes. They also name the options
that are not converted, with the reason.
"""

import sys
from pathlib import Path

from pipeline.cli.arguments import Parser, count
from pipeline.cluster.exits import run_main
from pipeline.config.convert import run_file_text
from pipeline.config.peer_files import read_peer_config


def convert() -> None:
    """Parse the command line and print the run file."""
    parser = Parser("convert", help_template=__doc__)
    parser.add_argument("config", type=Path, help="configuration of the other program")
    parser.add_argument(
        "--gpus",
        type=count,
        default=1,
        help="number of GPUs that the other program used; global_batch_size depends on it (1)",
    )
    arguments = parser.parse_args()
    sys.stdout.write(run_file_text(read_peer_config(arguments.config), arguments.gpus))


def main() -> None:
    """Run this command and end the process with its exit code."""
    run_main(convert)


if __name__ == "__main__":
    main()
