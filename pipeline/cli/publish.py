"""Publish the adapter or the merged model of a run on the Hugging Face hub.

    {command} RUN_FOLDER --to ORG/NAME [--merged] [--private] [--base-model ORG/NAME]

Sends the weights, the tokenizer, a model card, the scores, the plan, and the counts of the data
audit. No text of a row is sent, and nothing at all if a file has an access token or a path in the
home folder. No other command publishes.
"""

import tempfile
from pathlib import Path

from pipeline.adapter.adapter_file import require_adapter
from pipeline.adapter.hub import (
    Publication,
    base_model_name,
    gather_files,
    require_hub_name,
    upload,
)
from pipeline.cli.arguments import Parser, run_settings
from pipeline.cli.export import require_merged
from pipeline.cluster.exits import run_main
from pipeline.errors import RankZeroError


def publish() -> None:
    """Parse the command line, collect and check the files, and send them."""
    parser = Parser("publish", help_template=__doc__)
    parser.add_run_folder()
    parser.add_argument("--to", metavar="ORG/NAME", help="repository on the hub (required)")
    parser.add_argument("--merged", action="store_true", help="the merged model, not the adapter")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument(
        "--base-model", metavar="ORG/NAME", help="hub name of the base, if the run has a folder"
    )
    args = parser.parse_args()
    run_folder: Path = args.run_folder
    settings = run_settings(run_folder)
    require_adapter(run_folder)
    if args.to is None:
        parser.error("--to ORG/NAME is required")
    name = require_hub_name("--to", args.to)
    if args.merged:
        require_merged(run_folder)
    publication = Publication(
        name=name,
        run_folder=run_folder,
        settings=settings,
        base_model=base_model_name(settings, args.base_model),
        is_merged=args.merged,
    )
    try:
        with tempfile.TemporaryDirectory(dir=run_folder, prefix=".publish-") as folder:
            gather_files(publication, Path(folder))
            print(upload(Path(folder), name, is_private=args.private))
    except OSError as error:
        raise RankZeroError(
            f"{run_folder}: the files to publish cannot be collected: {error}"
        ) from error


def main() -> None:
    """Run this command and end the process with its exit code."""
    run_main(publish)


if __name__ == "__main__":
    main()
