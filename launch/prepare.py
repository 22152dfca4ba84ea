"""Tokenise the data of a run file once, and show what happened to every row.

    python launch/prepare.py RUN.yaml [key=value ...] [--show N]

Training does the same by itself; what is prepared here, it finds.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from pipeline.cluster.exits import run_main
from pipeline.config.load import load_settings
from pipeline.data.chat.encoder import load_tokenizer
from pipeline.data.dataset.reader import open_split
from pipeline.data.prepare.audit_table import audit_table
from pipeline.data.prepare.prepare import check_first_rows, prepare
from pipeline.data.prepare.show import number_of_documents, show_documents
from pipeline.preflight.inputs import check_output
from pipeline.rows.fetch import fetch
from pipeline.train.owner import Ownership


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_file", type=Path, help="run file (docs/configuration.md)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for this start")
    parser.add_argument(
        "--show", type=number_of_documents, default=0, metavar="N", help="print N documents"
    )
    return parser.parse_intermixed_args()


def main() -> None:
    arguments, console = parse(), Console(markup=False, emoji=False)
    settings = load_settings(arguments.run_file, arguments.overrides)
    folder = Path(settings.output_dir)
    data_dir = folder / "data"
    check_output(folder)
    # A run reads what lies there, and prepare removes what is out of date.
    with Ownership(folder, "launch/prepare.py"):
        fetch(settings.train_sources, "train_data")
        fetch(settings.eval_sources, "eval_data")
        check_first_rows(settings)
        index = prepare(settings, data_dir, say=console.print)
    if arguments.show:
        tokenizer = load_tokenizer(Path(settings.model), settings.trust_remote_code)
        show_documents(console, open_split(index.train), tokenizer, arguments.show)
    audit = json.loads((data_dir / "audit.json").read_text(encoding="utf-8"))
    console.print(audit_table(audit))
    console.print(f"prepared in {data_dir}; rejected rows: {data_dir / 'rejects.jsonl'}")


if __name__ == "__main__":
    run_main(main)
