"""Merge LoRA adapters into their base. The merged model loads without peft.

    python launch/merge.py RUN_FOLDER [--onto original|dequantized] [--check]
    python launch/merge.py --base MODEL --adapter FOLDER[:WEIGHT] ... --out DIR

Writes RUN_FOLDER/merged, or with --undo RUN_FOLDER/unmerged. If it is interrupted, the same command
continues with the shards that are missing. docs/merging.md says which options to choose.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.adapter.adapter_file import require_adapter
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

_DTYPES: dict[str, Any] = {"keep": None, "bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True, kw_only=True)
class _Merge:
    """Inputs and output of the command, with the defaults of the run."""

    run_folder: Path | None
    settings: RunSettings | None
    base: Path
    adapters: tuple[WeightedAdapter, ...]
    out: Path
    options: MergeOptions


def merge() -> None:
    """Parse the command line, merge, and compare the merged model if that is asked for."""
    parser = _parser()
    given = parser.parse_args()
    if given.run_folder is None and not (given.adapter and given.base and given.out):
        parser.error("name a run folder, or --adapter, --base and --out")
    request = _request(given)
    report = merge_adapters(request.base, request.adapters, request.out, request.options)
    print(
        f"{request.out}: {report.tensors_merged} weights of {request.base} "
        f"{'unmerged' if given.undo else 'merged'}\n"
        f"  {report.shards} shard(s), {report.num_bytes / 2**20:.0f} MiB, {report.seconds:.1f} s\n"
        f"  largest change {100 * report.largest_change:.2g} %: {report.most_changed}"
    )
    if given.check or (given.check is None and _is_checked_by_default(request)):
        _check(request)


def _parser() -> Parser:
    parser = Parser(__doc__)
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


def _request(given: argparse.Namespace) -> _Merge:
    """Complete the arguments from the run; UserError if one is missing or contradicts another."""
    run_folder: Path | None = given.run_folder
    settings = None if run_folder is None else run_settings(run_folder)
    adapters = tuple(given.adapter)
    if run_folder is not None and not adapters:
        adapters = (WeightedAdapter(require_adapter(run_folder)),)
    if given.undo and (given.check or given.onto == "dequantized"):
        raise UserError("--undo cannot be combined with --check or --onto")
    base = _base(given, settings, adapters)
    onto = _onto(given, run_folder, settings, adapters)
    if given.check and (settings is None or settings.eval_data is None):
        raise UserError("--check needs a run folder with held-out rows (eval_data)")
    if given.device == "cuda":
        _require_cuda()
    out = given.out
    if out is None:
        assert run_folder is not None
        out = run_folder / ("unmerged" if given.undo else "merged")
    return _Merge(
        run_folder=run_folder,
        settings=settings,
        base=base,
        adapters=adapters,
        out=out,
        options=MergeOptions(
            dtype=_DTYPES[given.dtype],
            device=given.device,
            onto=onto,
            is_undone=given.undo,
            trust_remote_code=settings is not None and settings.trust_remote_code,
        ),
    )


def _base(
    given: argparse.Namespace,
    settings: RunSettings | None,
    adapters: tuple[WeightedAdapter, ...],
) -> Path:
    """The base to merge into: --base, else the run's base; with --undo the run's merged model."""
    if given.base is not None:
        return _model_folder(given.base)
    if given.undo:
        merged: Path = given.run_folder / "merged"
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
    folder = Path(model).expanduser()
    folder = folder if folder.is_dir() else snapshot_folder(model) or folder
    if not folder.is_dir():
        raise UserError(
            f"base: {model} is neither a folder nor a hub model in the local cache; download it "
            f"with `hf download {model}`"
        )
    return folder


def _onto(
    given: argparse.Namespace,
    run_folder: Path | None,
    settings: RunSettings | None,
    adapters: tuple[WeightedAdapter, ...],
) -> TrainedBase | None:
    """The quantised base to merge into; None for the original one.

    Raises UserError if an adapter corrects a quantised base other than this one (LoftQ).
    """
    if given.undo:
        return None
    is_corrected = settings is not None and settings.load_in_4bit and run_folder is not None
    if given.onto is None and is_corrected:
        is_dequantised = any(corrects_quantisation(each.folder) for each in adapters)
    else:
        is_dequantised = given.onto == "dequantized"
    onto = _trained_base(run_folder, settings) if is_dequantised else None
    for each in adapters:
        remedy = "name its run folder, without --onto original"
        require_corrected_base(each.folder, None if onto is None else onto.settings, remedy)
    return onto


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
    """Raise UserError unless the folder's record says that these adapters were merged into it."""
    if not merged.is_dir():
        raise UserError(f"--undo: {merged} does not exist; name the merged model with --base")
    try:
        recorded = [
            (each["sha256"], each["weight"]) for each in read_json(merged / MARKER)["adapters"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--undo: {merged} has no record of its adapters ({MARKER}); name it with --base to "
            "subtract the adapter anyway"
        ) from None
    if recorded != [(adapter_sha256(each.folder), each.weight) for each in adapters]:
        raise UserError(
            f"--undo: {merged} was merged from other adapters or weights; name those with --adapter"
        )


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")


def _is_checked_by_default(request: _Merge) -> bool:
    settings = request.settings
    return (
        settings is not None
        and settings.is_quantised
        and request.run_folder is not None
        and (request.run_folder / "data" / "index.json").is_file()
        and settings.eval_data is not None
        and not request.options.is_undone
    )


def _check(request: _Merge) -> None:
    """Print the differences to base plus adapter, and add them to the record of the merge."""
    assert request.run_folder is not None
    assert request.settings is not None
    from pipeline.evaluate.merge_check import MergedModel, compare_merged  # imports torch

    settings = request.settings
    trained = _trained_base(request.run_folder, settings) if settings.is_quantised else None
    merged = MergedModel(
        folder=request.out,
        base=request.base,
        adapters=request.adapters,
        trained=trained,
        trust_remote_code=settings.trust_remote_code,
    )
    differences = compare_merged(request.run_folder, merged)
    _print_differences(differences)
    record = read_json(request.out / MARKER) | {"check": differences}
    write_text(request.out / MARKER, dump_json(record))


def _print_differences(differences: dict[str, Any]) -> None:
    table = Table(
        title=f"logits at {differences['positions']} held-out positions; loss of the merged model "
        f"{differences['loss']:.4f}"
    )
    columns = ("merged model", "difference", "mean", "largest", "KL", "loss of the other")
    for column in columns:
        table.add_column(column, justify="right" if column != columns[0] else "left")
    for name, each in differences.items():
        if isinstance(each, dict):
            table.add_row(
                name,
                f"{100 * each['relative']:.2g} %",
                *(f"{each[key]:.2g}" for key in ("mean_logit", "largest_logit", "kl")),
                f"{each['loss']:.4f}",
            )
    Console().print(table)


def main() -> None:
    """Run the verb and end the process with its exit code."""
    run_main(merge)


if __name__ == "__main__":
    main()
