"""Train an adapter with the settings of a run file.

deepspeed {script} RUN.yaml [key=value ...]        every GPU of this machine
{command} RUN.yaml [key=value ...]           one process
{command} RUN.yaml --debug                   a short run with all checks
"""

import sys

from pipeline.cli.arguments import Parser
from pipeline.cluster.exits import run_main
from pipeline.cluster.logs import show_details
from pipeline.config.load import load_settings
from pipeline.train.run import run_training


def train() -> None:
    """Parse the command line and train. Collective."""
    parser = Parser("train", help_template=__doc__)
    parser.add_run_file()
    parser.add_argument("--debug", action="store_true", help="few rows and steps, tracebacks shown")
    parser.add_verbose()
    parser.add_local_rank()
    args = parser.parse_intermixed_args()
    if args.verbose:
        show_details()
    run_training(load_settings(args.run_file, args.overrides), is_debug=args.debug)


def main() -> None:
    """Run this command and end the process with its exit code."""
    # A run whose console output is lost, for example on a full disk, has still succeeded.
    run_main(train, tracebacks="--debug" in sys.argv, needs_output=False)


if __name__ == "__main__":
    main()
