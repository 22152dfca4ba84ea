"""Check a run before it is paid for: on this machine, or on every rank that a launcher starts.

python launch/preflight.py RUN.yaml [key=value ...] [--json]
deepspeed launch/preflight.py RUN.yaml [key=value ...]    (torchrun, srun and mpirun likewise)
"""

import argparse
from pathlib import Path

from pipeline.cluster.exits import run_main
from pipeline.preflight.examine import preflight


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_file", type=Path, help="run file (docs/configuration.md)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for this check")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    # DeepSpeed's launcher puts it before our arguments; the environment says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


def main() -> None:
    given = parse()
    run_main(lambda: preflight(given.run_file, given.overrides, as_json=given.json))


if __name__ == "__main__":
    main()
