"""Check a run before it is paid for: settings, model folder, plan, disk and every row of data.

python launch/preflight.py RUN.yaml [key=value ...]
"""

import argparse
from pathlib import Path

from pipeline.cluster.devices import detect_hardware
from pipeline.cluster.exits import run_main
from pipeline.config.load import load_settings
from pipeline.data.prepare import check_rows
from pipeline.plan.plan import make_plan
from pipeline.plan.shape import read_shape
from pipeline.preflight.inputs import check_inputs


def preflight() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_file", type=Path, help="run file (docs/configuration.md)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for this check")
    arguments = parser.parse_args()
    settings = load_settings(arguments.run_file, arguments.overrides)
    print(f"ok    settings   {arguments.run_file}")
    hardware, shape = detect_hardware(), read_shape(settings.model)
    ranks = hardware.devices_per_node
    plan = make_plan(settings, shape, hardware, nodes=1, ranks_per_node=ranks)
    print(f"ok    plan       fits on {ranks} x {hardware.name}")
    check_inputs(plan)
    print(f"ok    model      {settings.model}: config, weights, tokenizer; disk for the run")
    check_rows(settings)
    print("ok    data       every row can be read")


if __name__ == "__main__":
    run_main(preflight)
