"""Check a run before it uses GPU hours: on this machine, or on all ranks that a launcher starts.

{command} RUN.yaml [key=value ...] [--json]
deepspeed {script} RUN.yaml [key=value ...]    (torchrun, srun and mpirun likewise)
"""

from pipeline.cli.arguments import Parser
from pipeline.cluster.exits import run_main
from pipeline.preflight.stages import check_run


def preflight() -> None:
    """Parse the command line and run the checks. Collective."""
    parser = Parser("preflight", help_template=__doc__)
    parser.add_run_file()
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_local_rank()
    args = parser.parse_intermixed_args()
    check_run(args.run_file, args.overrides, as_json=args.json)


def main() -> None:
    """Run this command and end the process with its exit code."""
    run_main(preflight)


if __name__ == "__main__":
    main()
