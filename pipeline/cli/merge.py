"""Merge LoRA adapters into their base. The merged model loads without peft.

    {command} RUN_FOLDER [--onto original|dequantized] [--check]
    {command} --base MODEL --adapter FOLDER[:WEIGHT] ... --out DIR

Writes RUN_FOLDER/merged, or with --undo RUN_FOLDER/unmerged. If the merge is interrupted, the same
command writes the shards that are missing. {docs}/merging.md says which options to choose.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.adapter.adapter_file import read_adapter, require_adapter
from pipeline.adapter.merge import merge_adapters
from pipeline.adapter.merge_output import MARKER
from pipeline.adapter.merge_plan import MergeOptions, TrainedBase, WeightedAdapter
from pipeline.adapter.trained_on import (
    adapter_sha256,
    corrects_quantisation,
    require_corrected_base,
    require_same_base,
)
from pipeline.cli.arguments import Parser, run_settings
from pipeline.cluster.exits import run_main
from pipeline.config.hub import snapshot_folder
from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.files import dump_json, read_json, write_text

# Values of --dtype -> dtypes as safetensors names them; None: the dtype of the base.
_DTYPES: dict[str, Any] = {"keep": None, "bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True, kw_only=True)
class _MergeRequest:
    """The arguments of the command; those not given are taken from the run.

    `run_folder`, `settings`: of the run; None for a merge of adapters without a run.
    """

    run_folder: Path | None
    settings: RunSettings | None
    base: Path
    adapters: tuple[WeightedAdapter, ...]
    out: Path
    options: MergeOptions


def merge() -> None:
    """Parse the command line, merge and, with --check, compare with base plus adapter."""
    parser = _parser()
    args = parser.parse_args()
    if args.run_folder is None and not (args.adapter and args.base and args.out):
        parser.error("name a run folder, or --adapter, --base and --out")
    request = _complete_arguments(args)
    report = merge_adapters(request.base, request.adapters, request.out, request.options)
    print(
        f"{request.out}: {report.tensors_merged} weights of {request.base} "
        f"{'unmerged' if args.undo else 'merged'}\n"
        f"  {report.shards} shard(s), {report.num_bytes / 2**20:.0f} MiB, {report.seconds:.1f} s\n"
        f"  largest change of a weight: {100 * report.largest_change:.2g} % of its norm, "
        f"{report.most_changed}"
    )
    if args.check or (args.check is None and _is_checked_by_default(request)):
        _check_merged_model(request)


def _parser() -> Parser:
    parser = Parser("merge", help_template=__doc__)
    parser.add_argument("run_folder", type=Path, nargs="?", help="output_dir of a run")
    parser.add_argument(
        "--onto",
        choices=("original", "dequantized"),
        help="if the run quantised its base: merge into the original weights, or into the "
        "dequantised ones that training used (default: original; with init_lora_weights: loftq "
        "dequantized)",
    )
    parser.add_argument(
        "--adapter",
        type=_weighted_adapter,
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER[:WEIGHT]",
        help="PEFT folders to merge instead of the run's adapter, each times its weight (1)",
    )
    parser.add_argument("--base", metavar="MODEL", help="base: folder or cached hub name")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="keep",
        help="dtype of the merged model; keep: as in the base",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="compare with base plus adapter on held-out rows (default: if the base is quantised)",
    )
    parser.add_argument(
        "--undo", action="store_true", help="subtract the adapters from a merged model"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write")
    return parser


def _weighted_adapter(text: str) -> WeightedAdapter:
    """Value of --adapter: FOLDER:WEIGHT, or FOLDER, whose name may contain a colon."""
    folder, colon, weight = text.rpartition(":")
    if not colon or Path(text).is_dir():
        return WeightedAdapter(Path(text))
    try:
        value = float(weight)
    except ValueError:
        return WeightedAdapter(Path(text))
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: the weight is not a finite number")
    return WeightedAdapter(Path(folder), value)


def _complete_arguments(args: argparse.Namespace) -> _MergeRequest:
    """Complete the arguments from the run; UserError if one is missing or contradicts another."""
    run_folder: Path | None = args.run_folder
    settings = None if run_folder is None else run_settings(run_folder)
    adapters = tuple(args.adapter)
    if run_folder is not None and not adapters:
        adapters = (WeightedAdapter(require_adapter(run_folder)),)
    if args.undo and (args.check or args.onto == "dequantized"):
        raise UserError("--undo cannot be combined with --check or --onto")
    base = _base_folder(args, settings, adapters)
    trained_base = _trained_base_to_merge_into(args, run_folder, settings, adapters)
    if args.check and (settings is None or settings.eval_data is None):
        raise UserError("--check needs a run folder with held-out rows (eval_data)")
    if args.device == "cuda":
        _require_cuda()
    out = args.out
    if out is None:
        assert run_folder is not None
        out = run_folder / ("unmerged" if args.undo else "merged")
    return _MergeRequest(
        run_folder=run_folder,
        settings=settings,
        base=base,
        adapters=adapters,
        out=out,
        options=MergeOptions(
            dtype=_DTYPES[args.dtype],
            device=args.device,
            onto=trained_base,
            is_undone=args.undo,
            trust_remote_code=settings is not None and settings.trust_remote_code,
        ),
    )


def _base_folder(
    args: argparse.Namespace,
    settings: RunSettings | None,
    adapters: tuple[WeightedAdapter, ...],
) -> Path:
    """The base to merge into: --base, else the run's base; with --undo the run's merged model."""
    if args.base is not None:
        return _model_folder(args.base)
    if args.undo:
        merged: Path = args.run_folder / "merged"
        _require_merged_from(merged, adapters)
        return merged
    assert settings is not None
    base = settings.model_folder
    if not base.is_dir():
        raise UserError(f"base: {base} is not a folder; name the base with --base")
    for adapter in adapters:
        require_same_base(base, adapter.folder)
    return base


def _model_folder(model: str) -> Path:
    """The folder of --base. Raises UserError if it is neither a folder nor a cached hub model."""
    folder = Path(model).expanduser()
    folder = folder if folder.is_dir() else snapshot_folder(model) or folder
    if not folder.is_dir():
        raise UserError(
            f"base: {model} is neither a folder nor a hub model in the local cache; download it "
            f"with `hf download {model}`"
        )
    return folder


def _trained_base_to_merge_into(
    args: argparse.Namespace,
    run_folder: Path | None,
    settings: RunSettings | None,
    adapters: tuple[WeightedAdapter, ...],
) -> TrainedBase | None:
    """The quantised base of the run if the adapters are merged into it; None for the original base.

    An adapter that was initialised with LoftQ corrects the errors of its 4-bit base, and is merged
    into that base by default. Raises UserError if it would be merged into another base.
    """
    if args.undo:
        return None
    has_4bit_run = settings is not None and settings.load_in_4bit and run_folder is not None
    if args.onto is None and has_4bit_run:
        is_dequantised = any(corrects_quantisation(adapter.folder) for adapter in adapters)
    else:
        is_dequantised = args.onto == "dequantized"
    trained_base = _trained_base(run_folder, settings) if is_dequantised else None
    quantised_settings = None if trained_base is None else trained_base.settings
    for adapter in adapters:
        remedy = "name its run folder, without --onto original"
        require_corrected_base(adapter.folder, quantised_settings, remedy)
    return trained_base


def _trained_base(run_folder: Path | None, settings: RunSettings | None) -> TrainedBase:
    """How the run quantised its base. UserError if there is no run, or it did not quantise."""
    if run_folder is None or settings is None:
        raise UserError(
            "--onto dequantized needs the run folder, which records how the base was quantised"
        )
    if not settings.is_quantised:
        raise UserError(
            f"{run_folder}: --onto dequantized: the run did not quantise its base (load_in_4bit, "
            "load_in_8bit); use --onto original"
        )
    path = run_folder / "plan.json"
    try:
        return TrainedBase(settings, str(read_json(path)["model"]["training_dtype"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: the training dtype cannot be read: {error!r}") from None


def _require_merged_from(merged: Path, adapters: tuple[WeightedAdapter, ...]) -> None:
    """Raise UserError unless these adapters, with these weights, were merged into the folder.

    The folder's file MARKER records the adapters.
    """
    if not merged.is_dir():
        raise UserError(f"--undo: {merged} does not exist; name the merged model with --base")
    for adapter in adapters:
        read_adapter(adapter.folder)  # raises UserError if there is none
    try:
        entries = read_json(merged / MARKER)["adapters"]
        recorded = [(entry["sha256"], entry["weight"]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--undo: {merged} has no record of its adapters ({MARKER}); name it with --base to "
            "subtract the adapter anyway"
        ) from None
    if recorded != [(adapter_sha256(adapter.folder), adapter.weight) for adapter in adapters]:
        raise UserError(
            f"--undo: {merged} was merged from other adapters or weights; name those with --adapter"
        )


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")


def _is_checked_by_default(request: _MergeRequest) -> bool:
    """Whether the run quantised its base, and has prepared held-out rows for the comparison."""
    settings = request.settings
    return (
        settings is not None
        and settings.is_quantised
        and request.run_folder is not None
        and (request.run_folder / "data" / "index.json").is_file()
        and settings.eval_data is not None
        and not request.options.is_undone
    )


def _check_merged_model(request: _MergeRequest) -> None:
    """Compare the merged model with base plus adapter; print and record the differences."""
    assert request.run_folder is not None
    assert request.settings is not None
    from pipeline.evaluate.merge_check import MergedModel, compare_merged  # imports torch

    settings = request.settings
    trained_base = _trained_base(request.run_folder, settings) if settings.is_quantised else None
    merged = MergedModel(
        folder=request.out,
        base=request.base,
        adapters=request.adapters,
        trained=trained_base,
        trust_remote_code=settings.trust_remote_code,
    )
    differences = compare_merged(request.run_folder, merged)
    _print_differences(differences)
    record = read_json(request.out / MARKER) | {"check": differences}
    write_text(request.out / MARKER, dump_json(record))


def _print_differences(differences: dict[str, Any]) -> None:
    """Print a table of the result of `compare_merged`.

    `differences`: two numbers, `positions` and `loss`, and a dict for each base with which the
    merged model was compared.
    """
    table = Table(
        title=f"logits at {differences['positions']} held-out positions; loss of the merged model "
        f"{differences['loss']:.4f}"
    )
    table.add_column("merged model")
    for column in ("difference", "mean", "largest", "KL", "loss of base + adapter"):
        table.add_column(column, justify="right")
    for name, difference in differences.items():
        if isinstance(difference, dict):
            table.add_row(
                name,
                f"{100 * difference['relative']:.2g} %",
                *(f"{difference[key]:.2g}" for key in ("mean_logit", "largest_logit", "kl")),
                f"{difference['loss']:.4f}",
            )
    Console().print(table)


def main() -> None:
    """Run this command and end the process with its exit code."""
    run_main(merge)


if __name__ == "__main__":
    main()
