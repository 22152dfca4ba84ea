"""Print the plan of a run for this machine or another. Needs no GPU, weights or torch.

{command} RUN.yaml [key=value ...] [--gpu h100-80gb --nodes N --gpus-per-node N] ...
{command} --model Qwen/Qwen3-32B [key=value ...] [--gpu ...]   before any download
{command} --fits [key=value ...] [--gpu ...]                   which models fit here
{command} --schema                                             JSON schema of RUN.yaml

The sizes of about 60 models ship with the package. If the model is a folder or a hub model in the
local cache, its own config.json is used.
"""

import argparse
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pipeline.cli.arguments import Parser, count, positive
from pipeline.cluster.devices import hardware_from_options
from pipeline.cluster.exits import run_main
from pipeline.cluster.logs import fit_to_terminal
from pipeline.cluster.progress import Work, show_progress
from pipeline.commands import DOCS, command, script
from pipeline.config.load import load_settings, settings_without_file
from pipeline.config.schema import run_file_schema
from pipeline.config.settings import RunSettings
from pipeline.data.prepare.prepare import data_size
from pipeline.errors import UserError
from pipeline.files import dump_json
from pipeline.model.complete import require_complete
from pipeline.plan.choose import Cluster
from pipeline.plan.fits import fit_rows, fits_text
from pipeline.plan.given.hardware import GIB
from pipeline.plan.given.published import PublishedModel, published_models, published_shape
from pipeline.plan.given.shape import ModelShape, read_shape
from pipeline.plan.plan import DoesNotFitError, Plan, plan_and_candidates
from pipeline.plan.render import candidates_text, plan_json, plan_text
from pipeline.plan.rules.rule import raise_refusals, refusals_text

# The printed sbatch command requests this multiple of the predicted host memory, because Python,
# CUDA and the reading of files need more at the start.
_HOST_MEMORY_FACTOR = 1.25
_CPUS_PER_GPU = 4  # one for the training process, three for reading and preparing its input


def plan() -> None:
    """Parse the command line and print the plan."""
    args = _parser().parse_intermixed_args()
    if args.schema:
        print(dump_json(run_file_schema()), end="")
        return
    settings = _settings(args)
    hardware = hardware_from_options(args.gpu, args.gpu_memory_gib, args.gpu_tflops)
    ranks_per_node = args.gpus_per_node or hardware.devices_per_node
    if args.fits:
        cluster = Cluster(hardware=hardware, nodes=args.nodes, ranks_per_node=ranks_per_node)
        models = published_models()
        with show_progress("planning", total=len(models)) as work:
            rows = fit_rows(_counted(models, work), settings, cluster)
        print(fits_text(rows, settings, cluster))
        return
    try:
        best, candidates = plan_and_candidates(
            settings,
            _shape(settings),
            hardware,
            nodes=args.nodes,
            ranks_per_node=ranks_per_node,
        )
    except DoesNotFitError as error:
        if args.json:
            print(dump_json(plan_json(error.nearest)), end="")
        elif args.all:
            print(candidates_text(error.ranked), end="\n\n")
        if refusals := refusals_text(error.nearest.rules):
            raise UserError(f"{error}\n{refusals}") from None
        raise
    if (size := data_size(best.settings)) is not None:
        best = best.with_data(size)  # adds the number of steps
    if args.json:
        print(dump_json(plan_json(best)), end="")
    else:
        # The commands are not wrapped, so that they can be copied.
        print(fit_to_terminal(plan_text(best)), *_next_steps(best, args), sep="\n")
        if args.all:
            print(f"\n{candidates_text(candidates)}")
    # `plan_and_candidates` raises the refusals of a model in a folder. Those of a published model
    # are raised here, after its plan was printed.
    raise_refusals(best.rules)


def _counted(models: Iterable[PublishedModel], work: Work) -> Iterator[PublishedModel]:
    """The models; each is counted as work when the next one is requested."""
    for model in models:
        yield model
        work.advance()


def _settings(args: argparse.Namespace) -> RunSettings:
    """The settings of the run file or, without a run file, default settings with `--model`."""
    # If there is no run file, argparse parses the first key=value as the run file.
    if args.run_file is not None and "=" in str(args.run_file):
        args.overrides.insert(0, str(args.run_file))
        args.run_file = None
    model = [] if args.model is None else [f"model={args.model}"]
    if args.run_file is not None:
        return load_settings(args.run_file, [*args.overrides, *model])
    if args.model is None and not args.fits:
        raise UserError("expected RUN.yaml, --model NAME or --fits; --help explains them")
    values = {"model": "MODEL", "train_data": "TRAIN_DATA", "output_dir": "OUTPUT_DIR"}
    return settings_without_file(values, [*args.overrides, *model])


def _shape(settings: RunSettings) -> ModelShape:
    """The sizes of the model, from its folder or, if it has none, from the list of this package.

    Raises UserError if the folder's checkpoint lacks tensors that the model needs.
    """
    folder = settings.model_folder
    if not folder.exists():
        return published_shape(settings.model)
    shape = read_shape(str(folder), trust_remote_code=settings.trust_remote_code)
    require_complete(shape, trust_remote_code=settings.trust_remote_code)
    return shape


def _next_steps(plan: Plan, args: argparse.Namespace) -> list[str]:
    """Lines with the commands that download the model or start the run."""
    if plan.shape.source is not None:
        return [
            f"sizes      {plan.shape.source}; the model itself has not been read",
            f"download   hf download {plan.settings.model}",
        ]
    if args.run_file is None:
        return [
            f"start      needs a run file: model, train_data and output_dir ({DOCS}/quickstart.md)"
        ]
    return start_commands(plan, args.run_file, args.overrides)


def start_commands(plan: Plan, run_file: Path, overrides: Sequence[str]) -> list[str]:
    """Command line that starts the planned run; for GPUs also a command line for sbatch."""
    arguments = shlex.join([str(run_file), *overrides])
    single_process = f"{command('train')} {arguments}"
    ranks, nodes = plan.layout.ranks_per_node, plan.layout.nodes
    if plan.hardware.kind == "cpu":
        start = f"deepspeed --num_accelerators {ranks} {script('train')} {arguments}"
        return [f"start      {start if ranks > 1 else single_process}"]
    # --num_gpus only if the run uses fewer GPUs than are visible: with this option DeepSpeed's
    # launcher ignores CUDA_VISIBLE_DEVICES (0.19.8 launcher/runner.py), which a scheduler may set.
    num_gpus = f"--num_gpus {ranks} " if ranks < plan.hardware.devices_per_node else ""
    hostfile = f"--hostfile HOSTS --num_nodes {nodes} " if nodes > 1 else ""
    start = f"deepspeed {hostfile}{num_gpus}{script('train')} {arguments}"
    if nodes == ranks == 1:
        start = single_process
    memory_gib = math.ceil(plan.memory.host_peak_bytes * _HOST_MEMORY_FACTOR / GIB)
    options = (
        f"--nodes={nodes} --gpus-per-node={ranks} --cpus-per-gpu={_CPUS_PER_GPU} "
        f"--mem={memory_gib}G"
    )
    lines = [f"start      {start}", f"sbatch     sbatch {options} slurm/train.sbatch {arguments}"]
    if not Path("slurm/train.sbatch").is_file():
        lines.append("           (`rankzero slurm .` writes slurm/train.sbatch)")
    return lines


def _parser() -> Parser:
    parser = Parser("plan", help_template=__doc__)
    parser.add_run_file(is_required=False)
    parser.add_argument(
        "--model", metavar="NAME", help="plan for this model, with or without a run file"
    )
    parser.add_argument(
        "--fits",
        action="store_true",
        help="list the models that fit, with their longest sequence and speed",
    )
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON schema of run files, for editors"
    )
    parser.add_argument("--nodes", type=count, default=1, metavar="N", help="machines (1)")
    parser.add_argument(
        "--gpus-per-node", type=count, metavar="N", help="ranks per machine (one per GPU)"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help=f"plan for this GPU ({DOCS}/speed.md lists them)"
    )
    parser.add_argument(
        "--gpu-memory-gib", type=positive, metavar="GIB", help="plan for a GPU with this memory"
    )
    parser.add_argument(
        "--gpu-tflops", type=positive, metavar="TFLOPS", help="dense 16-bit rate of this GPU"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--all", action="store_true", help="list all layouts considered, best first"
    )
    return parser


def main() -> None:
    """Run this command and end the process with its exit code."""
    run_main(plan)


if __name__ == "__main__":
    main()
