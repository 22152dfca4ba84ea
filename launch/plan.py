"""Say what a run file will do on this machine or another, without a GPU, weights or torch.

python launch/plan.py RUN.yaml [key=value ...] [--gpu h100-80gb --nodes N --gpus-per-node N] ...
"""

import argparse
from pathlib import Path

from pipeline.cluster.devices import machine
from pipeline.cluster.exits import run_main
from pipeline.config.load import load_settings
from pipeline.data.dataset.reader import data_size
from pipeline.files import dump_json
from pipeline.plan.command import start_commands
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import DoesNotFitError, rank_plans
from pipeline.plan.render import candidates_text, plan_json, plan_text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_file", type=Path, help="run file (docs/configuration.md)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for this plan")
    parser.add_argument("--nodes", type=int, default=1, help="machines (1)")
    parser.add_argument("--gpus-per-node", type=int, help="ranks a machine (as many as it has)")
    parser.add_argument("--gpu", help="plan for this GPU (docs/speed.md lists them)")
    parser.add_argument("--gpu-memory-gib", type=float, help="plan for a GPU of this size")
    parser.add_argument("--gpu-tflops", type=float, help="its dense 16-bit rate")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--all", action="store_true", help="show every candidate, best first")
    return parser.parse_intermixed_args()


def plan() -> None:
    given = parse()
    settings = load_settings(given.run_file, given.overrides)
    hardware = machine(given.gpu, given.gpu_memory_gib, given.gpu_tflops)
    ranks = given.gpus_per_node if given.gpus_per_node is not None else hardware.devices_per_node
    on = {"nodes": given.nodes, "ranks_per_node": ranks}
    try:
        made, ranked = rank_plans(settings, read_shape(settings.model), hardware, **on)
    except DoesNotFitError as error:
        if given.json:
            print(dump_json(plan_json(error.nearest)), end="")
        elif given.all:
            print(candidates_text(error.ranked), end="\n\n")
        raise
    size = data_size(made.settings)
    made = made.with_data(size) if size is not None else made
    if given.json:
        print(dump_json(plan_json(made)), end="")
    else:
        print(plan_text(made), *start_commands(made, given.run_file, given.overrides), sep="\n")
        print(f"\n{candidates_text(ranked)}\n" if given.all else "", end="")


if __name__ == "__main__":
    run_main(plan)
