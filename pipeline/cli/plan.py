"""Print what a run file will do on this machine or another, without a GPU, weights or torch.

python launch/plan.py RUN.yaml [key=value ...] [--gpu h100-80gb --nodes N --gpus-per-node N] ...
"""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.arguments import Parser, count, positive
from pipeline.cluster.devices import hardware_from_options
from pipeline.cluster.exits import run_main
from pipeline.config.load import load_settings
from pipeline.data.prepare.prepare import data_size
from pipeline.files import dump_json
from pipeline.plan.given.hardware import GIB
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import DoesNotFitError, Plan, rank_plans
from pipeline.plan.render import candidates_text, plan_json, plan_text

# Host memory beyond the prediction: Python and CUDA while starting, files while they are read.
_SPARE_MEMORY = 1.25
_CPUS_PER_GPU = 4  # one trains, others read and prepare its input


def plan() -> None:
    """Parse the command line and print the plan."""
    given = _parser().parse_intermixed_args()
    settings = load_settings(given.run_file, given.overrides)
    hardware = hardware_from_options(given.gpu, given.gpu_memory_gib, given.gpu_tflops)
    ranks = given.gpus_per_node or hardware.devices_per_node
    on = {"nodes": given.nodes, "ranks_per_node": ranks}
    try:
        best, ranked = rank_plans(settings, read_shape(str(settings.model_folder)), hardware, **on)
    except DoesNotFitError as error:
        if given.json:
            print(dump_json(plan_json(error.nearest)), end="")
        elif given.all:
            print(candidates_text(error.ranked), end="\n\n")
        raise
    if (size := data_size(best.settings)) is not None:
        best = best.with_data(size)
    if given.json:
        print(dump_json(plan_json(best)), end="")
        return
    print(plan_text(best), *start_commands(best, given.run_file, given.overrides), sep="\n")
    if given.all:
        print(f"\n{candidates_text(ranked)}")


def start_commands(plan: Plan, run_file: Path, overrides: Sequence[str]) -> list[str]:
    """The command that starts the planned run here; with GPUs also the one for sbatch."""
    words = shlex.join([str(run_file), *overrides])
    ranks, nodes = plan.layout.ranks_per_node, plan.layout.nodes
    if plan.hardware.kind == "cpu":
        here = f"deepspeed --num_accelerators {ranks} launch/train.py {words}"
        return [f"start      {here if ranks > 1 else f'python launch/train.py {words}'}"]
    # --num_gpus only where fewer than the visible GPUs are meant: with it DeepSpeed's launcher
    # ignores CUDA_VISIBLE_DEVICES (0.19.8 launcher/runner.py), and so what a scheduler has granted.
    fewer = f"--num_gpus {ranks} " if ranks < plan.hardware.devices_per_node else ""
    hosts = f"--hostfile HOSTS --num_nodes {nodes} " if nodes > 1 else ""
    here = f"deepspeed {hosts}{fewer}launch/train.py {words}"
    if nodes == ranks == 1:
        here = f"python launch/train.py {words}"
    memory = math.ceil(plan.memory.host_peak_bytes * _SPARE_MEMORY / GIB)
    options = (
        f"--nodes={nodes} --gpus-per-node={ranks} --cpus-per-gpu={_CPUS_PER_GPU} --mem={memory}G"
    )
    return [f"start      {here}", f"sbatch     sbatch {options} slurm/train.sbatch {words}"]


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_run_file()
    parser.add_argument("--nodes", type=count, default=1, metavar="N", help="machines (1)")
    parser.add_argument(
        "--gpus-per-node", type=count, metavar="N", help="ranks a machine (as many as it has)"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="plan for this GPU (docs/speed.md lists them)"
    )
    parser.add_argument(
        "--gpu-memory-gib", type=positive, metavar="GIB", help="plan for a GPU of this size"
    )
    parser.add_argument(
        "--gpu-tflops", type=positive, metavar="TFLOPS", help="its dense 16-bit rate"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--all", action="store_true", help="list every candidate, best first")
    return parser


def main() -> None:
    """Run the verb and leave the process with its exit code."""
    run_main(plan)


if __name__ == "__main__":
    main()
