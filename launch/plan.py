"""Say what a run file will do on this machine or another, without a GPU, weights or torch.

python launch/plan.py RUN.yaml [key=value ...] [--nodes N] [--gpus-per-node N]
    [--gpu-memory-gib G] [--json]
"""

import argparse
from pathlib import Path

from pipeline.cluster.devices import detect_hardware
from pipeline.cluster.exits import run_main
from pipeline.config.load import load_settings
from pipeline.data.prepared import DataIndex
from pipeline.plan.catalogue import gpu_like
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


def plan() -> None:
    arguments = parse()
    settings = load_settings(arguments.run_file, arguments.overrides)
    gib, ranks = arguments.gpu_memory_gib, arguments.gpus_per_node
    hardware = detect_hardware() if gib is None else gpu_like(gib)
    if ranks is None:
        ranks = hardware.devices_per_node
    shape = read_shape(settings.model)
    made = make_plan(settings, shape, hardware, nodes=arguments.nodes, ranks_per_node=ranks)
    data = Path(settings.output_dir) / "data"
    is_prepared = (data / "index.json").is_file()
    if is_prepared:
        made = made.with_data(DataIndex.load(data).train.documents)
    print(dump_json(made.as_json()) if arguments.json else made.render())
    if not is_prepared and not arguments.json:
        print(f"steps      known once the data is prepared: launch/prepare.py {arguments.run_file}")


if __name__ == "__main__":
    run_main(plan)
