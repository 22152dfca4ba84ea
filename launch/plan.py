"""Say what a run file will do on this machine or another, without a GPU, weights or torch.

python launch/plan.py RUN.yaml [key=value ...] [--nodes N] [--gpus-per-node N]
    [--gpu-memory-gib G] [--json]
"""

import argparse
import dataclasses
from pathlib import Path

from pipeline.cluster.devices import detect_hardware
from pipeline.cluster.exits import run_main
from pipeline.config.load import load_settings
from pipeline.plan.hardware import GIB, Hardware
from pipeline.plan.plan import dump_json, make_plan
from pipeline.plan.shape import read_shape


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_file", type=Path, help="run file (docs/configuration.md)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for this plan")
    parser.add_argument("--nodes", type=int, default=1, help="machines (1)")
    parser.add_argument("--gpus-per-node", type=int, help="ranks a machine (as many as it has)")
    parser.add_argument("--gpu-memory-gib", type=float, help="plan for a GPU of this size")
    parser.add_argument("--json", action="store_true", help="print plan.json")
    return parser.parse_intermixed_args()


def hardware_for(arguments: argparse.Namespace) -> Hardware:
    here = detect_hardware()
    if arguments.gpu_memory_gib is None:
        return here
    size = arguments.gpu_memory_gib
    return dataclasses.replace(
        here,
        kind="cuda",
        name=f"GPU of {size:g} GiB",
        device_bytes=int(size * GIB),
        compute_capability=here.compute_capability or (8, 0),
    )


def plan() -> None:
    arguments = parse()
    settings = load_settings(arguments.run_file, arguments.overrides)
    hardware = hardware_for(arguments)
    ranks = arguments.gpus_per_node or hardware.devices_per_node
    shape = read_shape(settings.model)
    made = make_plan(settings, shape, hardware, nodes=arguments.nodes, ranks_per_node=ranks)
    print(dump_json(made.as_json()) if arguments.json else made.render())


if __name__ == "__main__":
    run_main(plan)
