"""Rows of the run file -> the prepared data set in the run folder, with its audit.

One process runs `prepare`; any number may read what it leaves. Tokenising imports transformers,
and only where there is something to do; `check_rows` imports neither it nor torch.
"""

import hashlib
import json
import logging
import re
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.settings import RunSettings
from pipeline.data.audit import Tally, make_audit
from pipeline.data.chat import Document, encode, load_tokenizer
from pipeline.data.formats import Example, RowError, to_example
from pipeline.data.prepared import INDEX, DataIndex, SplitIndex, read_digests, read_published
from pipeline.data.sources import BadRow, Row, data_files, read_rows
from pipeline.data.writing import REJECTS, SplitWriter, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 2  # of the prepared files and of how documents are made: raise it when either changes
_TOKENIZER_FILES = (
    "tokenizer*",
    "*chat_template*",
    "additional_chat_templates/*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
_SPLIT_FOLDER = re.compile(r"(train|eval)-[0-9a-f]{16}|\.(train|eval)-[0-9a-f]{16}\.tmp")
_ROWS_A_LOG_LINE = 20_000
_log = logging.getLogger(__name__)


def check_rows(settings: RunSettings) -> None:
    """Parse every row of training and held-out data; UserError for more bad ones than allowed."""
    for split, files in _files(settings).items():
        tally = Tally()
        for row in read_rows(files):
            tally.read += 1
            parsed = _parse(row)
            if isinstance(parsed, str):
                tally.reject(row.file, row.line, parsed)
        tally.judge(f"{split}_data", settings.max_rejected)


def train_key(settings: RunSettings) -> str:
    """Key that the prepared training data has, or would have; reads the files' content."""
    return _key(settings, _files(settings)["train"], None)


def prepare(settings: RunSettings, data_dir: Path, limit: int | None = None) -> DataIndex:
    """Make the prepared data set in `data_dir`, or find it there; `limit`: documents a split.

    Raises UserError for bad data, a bad tokenizer or template; then what was there before stays.
    With a limit the share of bad rows is not judged: a few rows say nothing of it.
    """
    files = _files(settings)
    keys = {split: _key(settings, paths, limit) for split, paths in files.items()}
    places = {split: data_dir / f"{split}-{key}" for split, key in keys.items()}
    data_dir.mkdir(parents=True, exist_ok=True)
    audits: dict[str, dict[str, Any]] = {}
    indexes: dict[str, SplitIndex] = {}
    allowed = settings.max_rejected if limit is None else 1.0
    tokenizer = None
    writers: dict[str, SplitWriter] = {}
    with ExitStack() as stack:
        for split, place in places.items():
            if (found := read_published(place)) is not None:
                indexes[split], audits[split] = found
                earlier = Tally.of(audits[split], place / REJECTS)
                earlier.judge(f"{split}_data", allowed)
                continue
            if tokenizer is None:
                tokenizer = load_tokenizer(Path(settings.model), settings.trust_remote_code)
            writers[split] = stack.enter_context(SplitWriter(place, keys[split]))
            made = _SplitMaker(settings, tokenizer, writers[split])
            made.read(files[split], limit)
            made.tally.judge(f"{split}_data", allowed)
            indexes[split], audits[split] = made.finish()
        for split, writer in writers.items():
            writer.publish(audits[split])
    index = DataIndex(train=indexes["train"], eval=indexes.get("eval"))
    if writers or not _is_current(data_dir, index):
        _write_summary(data_dir, index, audits)
    _remove_others(data_dir, index)
    return index


class _SplitMaker:
    """Rows of one split -> its writer."""

    def __init__(
        self, settings: RunSettings, tokenizer: "PreTrainedTokenizerBase", writer: SplitWriter
    ) -> None:
        self.tally = Tally()
        self._settings, self._tokenizer, self._writer = settings, tokenizer, writer
        self._truncated_rows = self._tokens_lost = 0

    def read(self, files: list[Path], limit: int | None) -> None:
        for row in read_rows(files):
            self.tally.read += 1
            reason = self._add(row)
            if reason is not None:
                rejected = self.tally.reject(row.file, row.line, reason)
                line = json.dumps(asdict(rejected), ensure_ascii=False)
                self._writer.rejects.write(f"{line}\n")
            if self.tally.read % _ROWS_A_LOG_LINE == 0:
                _log.info("%s: %d rows tokenised", row.file, self.tally.read)
            if self.tally.used == limit:
                return

    def finish(self) -> tuple[SplitIndex, dict[str, Any]]:
        index = self._writer.close(
            max_length=self._settings.max_length, packing=self._settings.packing
        )
        digests = read_digests(self._writer.folder)
        audit = make_audit(
            self.tally,
            index,
            self._writer.lengths,
            truncated_rows=self._truncated_rows,
            tokens_lost=self._tokens_lost,
            duplicate_rows=len(digests) - len(np.unique(digests)),
        )
        return index, audit

    def _add(self, row: Row | BadRow) -> str | None:
        """Write the row's document, or say why there is none."""
        example = _parse(row)
        if isinstance(example, str):
            return example
        try:
            document = encode(example, self._tokenizer, self._settings.train_on)
        except RowError as error:
            return str(error)
        if not any(document.supervised):
            return "no supervised token"
        length = self._settings.max_length
        kept = Document(document.ids[:length], document.supervised[:length])
        if not any(kept.supervised):
            return f"no supervised token within max_length ({length})"
        lost = len(document.ids) - len(kept.ids)
        self._truncated_rows += lost > 0
        self._tokens_lost += lost
        self._writer.add(kept.ids, kept.supervised, _digest(example))
        return None


def _files(settings: RunSettings) -> dict[str, list[Path]]:
    files = {"train": data_files(settings.train_sources, "train_data")}
    if settings.eval_sources:
        files["eval"] = data_files(settings.eval_sources, "eval_data")
    return files


def _parse(row: Row | BadRow) -> Example | str:
    """The row's example, or the reason why it has none."""
    if isinstance(row, BadRow):
        return row.reason
    try:
        return to_example(row)
    except RowError as error:
        return str(error)


def _digest(example: Example) -> int:
    """64 bits of an example: rows that differ in their spelling as JSON alone are the same."""
    text = json.dumps(asdict(example), sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _key(settings: RunSettings, files: list[Path], limit: int | None) -> str:
    """16 hex digits of all that the documents of a split are made from."""
    model = Path(settings.model)
    patterns = (*_TOKENIZER_FILES, *(["*.py"] if settings.trust_remote_code else []))
    tokenizer = {path for pattern in patterns for path in model.glob(pattern) if path.is_file()}
    made_from = {
        "format": _FORMAT,
        "data": [_sha256(path) for path in files],
        "tokenizer": {str(p.relative_to(model)): _sha256(p) for p in sorted(tokenizer)},
        "max_length": settings.max_length,
        "packing": settings.packing,
        "train_on": settings.train_on,
        "limit": limit,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_current(data_dir: Path, index: DataIndex) -> bool:
    """Whether the files beside the splits are there and speak of these splits."""
    try:
        found = json.loads((data_dir / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = ("audit.json", REJECTS)
    return found == index.as_json() and all((data_dir / name).is_file() for name in names)


def _write_summary(data_dir: Path, index: DataIndex, audits: dict[str, dict[str, Any]]) -> None:
    """audit.json and rejects.jsonl of all splits, and last of all the index that names them."""
    if index.eval is not None:
        known = read_digests(index.train.folder)
        shared = np.isin(read_digests(index.eval.folder), known)
        audits["eval"] = {**audits["eval"], "rows_also_in_train": int(shared.sum())}
    rejects = (split.folder / REJECTS for split in index.splits.values())
    write_text(data_dir / REJECTS, "".join(path.read_text(encoding="utf-8") for path in rejects))
    write_json(data_dir / "audit.json", {split: audits[split] for split in index.splits})
    write_json(data_dir / INDEX, index.as_json())


def _remove_others(data_dir: Path, index: DataIndex) -> None:
    """Splits under older keys, and what a killed prepare left."""
    current = {split.folder.name for split in index.splits.values()}
    for path in list(data_dir.iterdir()):
        if _SPLIT_FOLDER.fullmatch(path.name) and path.name not in current:
            shutil.rmtree(path)
