"""Checks of a run's inputs: settings, plan, base model, tokenizer, rows and prepared data."""

import tempfile
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from typing import Any

from pipeline.commands import DOCS, command
from pipeline.data.chat.tokenizer import require_tokenizer, run_tokenizer
from pipeline.data.dataset.reader import INDEX, DataIndex
from pipeline.data.prepare.prepare import check_rows, prepare_data
from pipeline.errors import UserError
from pipeline.model.complete import require_complete
from pipeline.model.fingerprint import sampled_fingerprint
from pipeline.model.tensor_files import read_header, weight_files
from pipeline.plan.given.shape import read_shape
from pipeline.preflight.check import (
    Check,
    Finding,
    ProbeResults,
    compare,
    flatten,
    format_bytes,
    ok,
    warn,
)
from pipeline.preflight.context import RankContext

_SAMPLE_DOCUMENTS = 32
# Limits on the size of the training data, so that a preflight ends within a minute. Rows are parsed
# at tens of MB/s. `prepare_data` hashes all data files at hundreds of MB/s, even for a sample.
_MAX_PARSED_BYTES = 100 * 10**6
_MAX_HASHED_BYTES = 2 * 10**9


def _probe_settings(context: RankContext) -> dict[str, str]:
    """All settings after overrides and defaults."""
    return flatten(context.known_settings.model_dump(mode="json"))


def _assess_settings(results: ProbeResults) -> Iterable[Finding]:
    remedy = "start every rank with the same run file and the same key=value overrides"
    return compare(results, "valid, and the same on all ranks", remedy)


def _probe_plan(context: RankContext) -> dict[str, str]:
    """Layout (ZeRO stage, batch sizes, dtype and so on) and DeepSpeed config of the plan."""
    plan = context.known_plan
    return flatten({"layout": vars(plan.layout), "deepspeed": dict(plan.deepspeed)})


def _assess_plan(results: ProbeResults) -> Iterable[Finding]:
    assert results.plan is not None, "the check is skipped if rank 0 has no plan"
    plan, layout = results.plan, results.plan.layout
    need = format_bytes(plan.memory.device_peak_bytes)
    limit = format_bytes(plan.hardware.usable_bytes(layout.ranks_per_node))
    text = (
        f"ZeRO-{layout.zero_stage}, {layout.training_dtype}, global batch "
        f"{layout.global_batch_size} on {layout.nodes} x {layout.ranks_per_node} x "
        f"{plan.hardware.name}: {need} of {limit} per rank"
    )
    remedy = (
        "use nodes with equal devices and memory, or set the values that differ in the run file"
    )
    return compare(results, text, remedy)


def _probe_model(context: RankContext) -> dict[str, Any]:
    """Number and bytes of the weight files. Raises UserError if the model folder is incomplete."""
    folder = context.model_folder
    files = weight_files(folder)
    for path in files:
        read_header(path)  # raises UserError if the file is shorter than its header says
    require_tokenizer(folder)
    trust = context.known_settings.trust_remote_code
    require_complete(read_shape(str(folder), trust_remote_code=trust), trust_remote_code=trust)
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def _assess_model(results: ProbeResults) -> Iterable[Finding]:
    count, size = results.first["files"], format_bytes(results.first["bytes"])
    each = " on each node" if len(results.by_rank) > 1 else ""
    yield ok(f"{count} weight file{'s' * (count > 1)}, {size}, and a tokenizer{each}")


def _probe_base(context: RankContext) -> dict[str, str]:
    """Fingerprint of a few parts of the weight files. Training computes one from all bytes."""
    return {"base": sampled_fingerprint(context.model_folder)}


def _assess_base(results: ProbeResults) -> Iterable[Finding]:
    text = f"{results.first['base'][:16]}, the same on all nodes"
    return compare(results, text, "copy the model folder to these nodes again")


def _probe_prepared_data(context: RankContext) -> dict[str, str]:
    """Key of each prepared split ("train", "eval") in the run folder; empty if none is prepared.

    The key is a hash of everything that determines the documents, such as rows and tokenizer.
    """
    data = context.run_folder / "data"
    if not (data / INDEX).is_file():
        return {}
    return {name: split.key for name, split in DataIndex.load(data).splits.items()}


def _assess_prepared_data(results: ProbeResults) -> Iterable[Finding]:
    keys = ", ".join(f"{split} {key}" for split, key in results.first.items())
    not_prepared = (
        f"not prepared yet: rank 0 prepares the data when training starts, or {command('prepare')} "
        "prepares it in advance"
    )
    remedy = "put output_dir on a file system that all nodes share"
    return compare(results, keys or not_prepared, remedy)


def _probe_tokenizer(context: RankContext) -> dict[str, Any]:
    """Number of tokens of the tokenizer, and whether it has a chat template.

    Raises UserError if the tokenizer has more tokens than the model has embeddings.
    """
    settings, shape = context.known_settings, context.known_plan.shape
    tokenizer = run_tokenizer(settings)
    if len(tokenizer) > shape.vocab_size:
        raise UserError(
            f"model: {context.model_folder}: the tokenizer has {len(tokenizer)} tokens, but the "
            f"model has only {shape.vocab_size} embeddings; name all added tokens in "
            "new_tokens, or use the model's original tokenizer"
        )
    return {"tokens": len(tokenizer), "has_template": tokenizer.chat_template is not None}


def _assess_tokenizer(results: ProbeResults) -> Iterable[Finding]:
    template = "with" if results.first["has_template"] else "without"
    yield ok(f"{results.first['tokens']:,} tokens, {template} a chat template")


def _probe_rows(context: RankContext) -> dict[str, Any]:
    """Parse all rows if there are at most 100 MB of them, and tokenise the first documents.

    Raises UserError if prepare would refuse the rows or the chat template.
    """
    settings = context.known_settings
    sizes = [_size_on_disk(source.path) for source in settings.train_sources]
    # A hub data set is not a local path, so its size is unknown.
    total = None if None in sizes else sum(size for size in sizes if size)
    all_rows_parsed = total is not None and total <= _MAX_PARSED_BYTES
    if all_rows_parsed:
        check_rows(settings)
    documents = tokens = 0
    if total is None or total <= _MAX_HASHED_BYTES:
        with tempfile.TemporaryDirectory(prefix="preflight-") as folder:
            index = prepare_data(settings, Path(folder), _SAMPLE_DOCUMENTS).train
            documents, tokens = index.documents, index.supervised_tokens
    return {
        "all_rows_parsed": all_rows_parsed,
        "documents": documents,
        "supervised_tokens": tokens,
    }


def _assess_rows(results: ProbeResults) -> Iterable[Finding]:
    rows = results.first
    sample = (
        f"the first {rows['documents']} documents have {rows['supervised_tokens']:,} supervised "
        "tokens"
    )
    if rows["all_rows_parsed"]:
        yield ok(f"every row can be read; {sample}")
    else:
        tokenised = sample if rows["documents"] else "no document was tokenised"
        yield warn(
            f"there are too many rows to read all of them in a preflight; {tokenised}",
            f"run {command('prepare')} before GPUs are allocated: it reads all rows",
        )


def _size_on_disk(name: str) -> int | None:
    """Bytes of a file, a folder or the matches of a glob pattern; None if nothing matches."""
    # Path.glob refuses absolute patterns.
    matches = [path for path in map(Path, glob(name)) if path.exists()]  # noqa: PTH207
    if not matches:
        return None
    files = [file for path in matches for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file())


SETTINGS = Check(
    "settings", _probe_settings, _assess_settings, f"see {DOCS}/configuration.md for every setting",
    needs="nothing",
)  # fmt: skip
PLAN = Check(
    "plan",
    _probe_plan,
    _assess_plan,
    f"run {command('plan')}, which shows what would fit",
    needs="settings",
)
MODEL = Check("model", _probe_model, _assess_model, "download the model again", runs_on="node")
BASE = Check("base", _probe_base, _assess_base, "download the model again", runs_on="node")
PREPARED_DATA = Check(
    "prepared data", _probe_prepared_data, _assess_prepared_data,
    f"run {command('prepare')} with the run file",
)  # fmt: skip
TOKENIZER = Check(
    "tokenizer", _probe_tokenizer, _assess_tokenizer, "copy the model's tokenizer files again",
    runs_on="node",
)  # fmt: skip
ROWS = Check(
    "rows",
    _probe_rows,
    _assess_rows,
    f"run {command('prepare')}, which shows details",
    runs_on="rank 0",
)
