"""What the run reads, tried: tokenizer, chat template, the first rows. Imports transformers."""

import tempfile
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from typing import Any

from pipeline.data.chat.encoder import load_tokenizer
from pipeline.data.prepare.prepare import check_rows, prepare
from pipeline.errors import UserError
from pipeline.preflight.check import Finding, ProbeResults, ok, warn
from pipeline.preflight.context import RankContext

_DOCUMENTS = 32
# Parsing goes at tens of MB a second, and a preflight is to be over in a minute.
_ALL_ROWS_BYTES = 100 * 10**6
# Hashing, which preparing begins with, at hundreds.
_FIRST_ROWS_BYTES = 2 * 10**9


def probe_tokenizer(context: RankContext) -> dict[str, Any]:
    """The tokenizer, loaded. Raises UserError where that fails or the base lacks ids of it."""
    settings, shape = context.known_settings, context.known_plan.shape
    tokenizer = load_tokenizer(context.model_folder, settings.trust_remote_code)
    if len(tokenizer) > shape.vocab_size:
        raise UserError(
            f"model: {context.model_folder}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"{shape.vocab_size} embeddings; take the tokenizer that belongs to the model"
        )
    return {"tokens": len(tokenizer), "has_template": tokenizer.chat_template is not None}


def assess_tokenizer(seen: ProbeResults) -> Iterable[Finding]:
    """It loads on every machine, or probe_tokenizer has raised."""
    first = next(iter(seen.answers.values()))
    template = "with" if first["has_template"] else "without"
    yield ok(f"{first['tokens']:,} tokens, {template} a chat template")


def probe_rows(context: RankContext) -> dict[str, Any]:
    """Parse every row, and make documents of the first: template, masks, lengths.

    Raises UserError for rows or a chat template that preparing would refuse.
    """
    settings = context.known_settings
    sizes = [_bytes_of(source.path) for source in settings.train_sources]
    known = None if None in sizes else sum(size for size in sizes if size)
    is_whole = known is not None and known <= _ALL_ROWS_BYTES
    if is_whole:
        check_rows(settings)
    documents = tokens = 0
    if known is None or known <= _FIRST_ROWS_BYTES:
        with tempfile.TemporaryDirectory(prefix="preflight-") as folder:
            index = prepare(settings, Path(folder), _DOCUMENTS).train
            documents, tokens = index.documents, index.supervised_tokens
    return {"is_whole": is_whole, "documents": documents, "supervised": tokens}


def assess_rows(seen: ProbeResults) -> Iterable[Finding]:
    """What was looked at is good, or probe_rows has raised; say how much that was."""
    (rows,) = seen.answers.values()
    first = f"the first {rows['documents']} make {rows['supervised']:,} supervised tokens"
    if rows["is_whole"]:
        yield ok(f"every row can be read; {first}")
    else:
        looked = first if rows["documents"] else "none was made a document"
        yield warn(
            f"too many rows to read all of them here; {looked}",
            "launch/prepare.py reads them all, before GPUs are held",
        )


def _bytes_of(name: str) -> int | None:
    """Of a file, a folder or all that a pattern finds; None for what is neither."""
    # Not Path.glob: a pattern may be absolute.
    found = [path for path in map(Path, glob(name)) if path.exists()]  # noqa: PTH207
    files = [file for path in found for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file()) if found else None
