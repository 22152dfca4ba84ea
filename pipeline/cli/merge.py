"""Merge the adapter of a run into its base. The merged model loads without peft.

    python launch/merge.py RUN_FOLDER [--out DIR] [--base DIR]

Writes RUN_FOLDER/merged. A base that was quantised for training is merged in its original dtype.
"""

from pathlib import Path

from pipeline.adapter.merge import merge_adapter
from pipeline.adapter.trained_on import require_same_base
from pipeline.cli.arguments import Parser, run_settings
from pipeline.cluster.exits import run_main
from pipeline.errors import UserError


def merge() -> None:
    """Parse the command line and merge."""
    parser = Parser(__doc__)
    parser.add_run_folder()
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (RUN_FOLDER/merged)"
    )
    parser.add_argument("--base", type=Path, metavar="DIR", help="base model (the run's own)")
    args = parser.parse_args()
    run_folder, adapter = args.run_folder, args.run_folder / "adapter"
    out = args.out or run_folder / "merged"
    settings = run_settings(run_folder)
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{run_folder} has no adapter; finish the training of this run first")
    base = args.base or settings.model_folder
    if not base.is_dir():
        raise UserError(f"base: {base} is not a folder; name the folder of the base with --base")
    if args.base is None:
        require_same_base(base, adapter)
    report = merge_adapter(base, adapter, out)
    print(
        f"{out}: {report.tensors_merged} weights of {base} merged, {report.shards} shard(s), "
        f"{report.num_bytes / 2**20:.0f} MiB, largest change {100 * report.largest_change:.2g} % "
        f"({report.most_changed}), {report.seconds:.1f} s"
    )


def main() -> None:
    """Run the verb and end the process with its exit code."""
    run_main(merge)


if __name__ == "__main__":
    main()
