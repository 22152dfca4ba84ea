"""Tokenise the data of a run file, and show what happened to its rows.

    {command} RUN.yaml [key=value ...] [--show N]

Training does the same if the data has not been prepared yet.
"""

import json
from pathlib import Path

from rich.console import Console

from pipeline.cli.arguments import Parser
from pipeline.cluster.devices import detect_hardware
from pipeline.cluster.exits import run_main
from pipeline.commands import command
from pipeline.config.load import load_settings
from pipeline.config.settings import RunSettings
from pipeline.data.chat.tokenizer import run_tokenizer
from pipeline.data.dataset.reader import open_split
from pipeline.data.prepare.audit_table import audit_table
from pipeline.data.prepare.parallel import exclude_torch
from pipeline.data.prepare.prepare import check_first_rows, prepare_data
from pipeline.data.prepare.show import number_of_documents, show_documents
from pipeline.errors import UserError
from pipeline.model.complete import require_complete
from pipeline.plan.choose import Cluster
from pipeline.plan.given.class_proof import (
    cached_proof,
    ensure_proof,
    without_mixing_packs,
)
from pipeline.plan.given.data_size import DataSize
from pipeline.plan.given.shape import read_shape
from pipeline.plan.length import length_texts
from pipeline.preflight.host import require_writable
from pipeline.rows.fetch import fetch
from pipeline.train.owner import Ownership
from pipeline.train.start import require_own_folder


def prepare() -> None:
    """Parse the command line, fetch and tokenise the data, and print the audit."""
    parser = Parser("prepare", help_template=__doc__)
    parser.add_run_file()
    parser.add_argument(
        "--show", type=number_of_documents, default=0, metavar="N", help="print N documents"
    )
    args, console = parser.parse_intermixed_args(), Console(markup=False, emoji=False)
    settings = load_settings(args.run_file, args.overrides)
    folder = Path(settings.output_dir)
    data_dir = folder / "data"
    require_own_folder(folder)
    require_writable(folder)
    # This command removes outdated data, so no run may read data/ at the same time.
    with Ownership(folder, command("prepare")):
        settings = _require_trainable_model(settings)
        fetch(settings.train_sources, "train_data")
        fetch(settings.eval_sources, "eval_data")
        check_first_rows(settings)  # reports wrong columns before the long tokenisation
        if not settings.trust_remote_code:  # the model's own code may need torch
            exclude_torch()
        index = prepare_data(settings, data_dir)
    if args.show:
        tokenizer = run_tokenizer(settings)
        show_documents(console, open_split(index.train), tokenizer, args.show)
    audit = json.loads((data_dir / "audit.json").read_text(encoding="utf-8"))
    console.print(audit_table(audit))
    for sentence in _length_sentences(settings, index.train.size):
        console.print(sentence, soft_wrap=True)
    console.print(f"prepared in {data_dir}; rejected rows: {data_dir / 'rejects.jsonl'}")


def _length_sentences(settings: RunSettings, size: DataSize) -> list[str]:
    """Sentences about documents longer than `max_length`, and the memory that they would need."""
    shape = read_shape(str(settings.model_folder), trust_remote_code=settings.trust_remote_code)
    try:
        hardware = detect_hardware()
        cluster = Cluster(hardware=hardware, nodes=1, ranks_per_node=hardware.devices_per_node)
        sentences = length_texts(size, settings, shape, cluster)
    except UserError:  # no device here, or a global_batch_size for another number of devices
        sentences = length_texts(size, settings, shape, None)
    if sentences:
        sentences.append(f"for another machine: {command('plan')} RUN.yaml --gpu NAME max_length=N")
    return sentences


def _require_trainable_model(settings: RunSettings) -> RunSettings:
    """Raise UserError if weights are missing, or the model's class cannot be trained correctly.

    Returns the settings, with `packing: false` if tokens of a packed document depend on the other
    documents of its sequence in this class. The results of the checks of a class are cached.
    """
    shape = read_shape(str(settings.model_folder), trust_remote_code=settings.trust_remote_code)
    require_complete(shape, trust_remote_code=settings.trust_remote_code)
    ensure_proof(settings, shape)
    proof = cached_proof(shape, settings)
    if proof is not None and proof.refusals:
        raise UserError(f"model: {settings.model} cannot be trained correctly: {proof.refusals[0]}")
    return without_mixing_packs(settings, shape, proof)[0]


def main() -> None:
    """Run this command and end the process with its exit code."""
    run_main(prepare)


if __name__ == "__main__":
    main()
