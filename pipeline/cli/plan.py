"""Print what a run file will do on this machine or another, without a GPU, weights or torch.

python launch/plan.py RUN.yaml [key=value ...] [--gpu h100-80gb --nodes N --gpus-per-node N] ...
"""

from pipeline.cli.arguments import Parser, count, positive
from pipeline.cluster.devices import machine
from pipeline.cluster.exits import run_main
from pipeline.config.load import load_settings
from pipeline.data.dataset.reader import data_size
from pipeline.files import dump_json
from pipeline.plan.command import start_commands
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import DoesNotFitError, rank_plans
from pipeline.plan.render import candidates_text, plan_json, plan_text


def plan() -> None:
    """Parse the command line and print the plan."""
    given = _parser().parse_intermixed_args()
    settings = load_settings(given.run_file, given.overrides)
    hardware = machine(given.gpu, given.gpu_memory_gib, given.gpu_tflops)
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
