"""Rows of the run file -> the prepared data set in the run folder, with its audit.

One process runs `prepare`; any number may read what it leaves. Tokenising imports transformers,
and only where there is something to do; checking rows imports neither it nor torch.
"""

import errno
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline.config.settings import RunSettings
from pipeline.data.dataset.reader import (
    INDEX,
    REJECTS,
    DataIndex,
    SplitIndex,
    read_column,
    read_published,
)
from pipeline.data.dataset.writer import SplitWriter, join_files
from pipeline.data.prepare.audit import Tally, read_rejects
from pipeline.data.prepare.documents import digest, parsed_example, reject_of
from pipeline.data.prepare.keys import Fingerprints, split_keys
from pipeline.data.prepare.splits import Job, Making, refuse
from pipeline.errors import RankZeroError, UserError
from pipeline.files import dump_json, is_abandoned, read_json, write_text
from pipeline.rows.formats import Example
from pipeline.rows.sources import Source, lines, require_apart, resolve

_FIRST_ROWS = 2000  # of each source: checked before anything is loaded
_Indexed = tuple[SplitIndex, dict[str, Any]]  # a split's index and audit
_SPLIT_FOLDER = re.compile(r"(train|eval)-[0-9a-f]{16}")


def check_rows(
    settings: RunSettings, first: int | None = None, *, data_dir: Path | None = None
) -> None:
    """Parse rows of training and held-out data; UserError for more bad ones than allowed.

    With `first` only so many rows of each source, unless more of them are bad than allowed: a
    beginning says too little to refuse the whole, so then all are parsed.
    With `data_dir` the bad rows of refused data are in its rejects.jsonl; else nothing is written.
    """
    for key, sources in _sources(settings).items():
        with TemporaryDirectory(prefix="rankzero-") as folder:
            rejects = Path(folder) / REJECTS
            whole, is_whole = _checked(settings, sources, first, rejects)
            is_bad = whole.reasons.total() > settings.max_rejected * whole.read
            if not is_whole and (is_bad or whole.lost_sources):
                whole, is_whole = _checked(settings, sources, None, rejects)
            if is_whole:
                with _kept_if_refused([rejects], data_dir):
                    whole.judge(key, settings.max_rejected)
                    whole.require_all_sources(key, [source.name for source in sources])


def check_first_rows(settings: RunSettings) -> None:
    """`check_rows` in a fraction of a second; what it does not see, `prepare` does.

    Nothing is written unless the data is refused: then its bad rows are in rejects.jsonl.
    """
    check_rows(settings, _FIRST_ROWS, data_dir=Path(settings.output_dir) / "data")


def train_key(settings: RunSettings) -> str:
    """Key that the prepared training data has, or would have."""
    fingerprints = Fingerprints(Path(settings.output_dir) / "data")
    return _jobs(settings, fingerprints, None)[0].keys["train"]


def prepare(
    settings: RunSettings,
    data_dir: Path,
    limit: int | None = None,
    *,
    processes: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> DataIndex:
    """Make the prepared data set in `data_dir`, or find it there; `limit`: rows used a split.

    `say` hears how far it is with a large one.
    By default as many processes tokenise as pay; what is written is the same for any number.
    Raises UserError for bad data, a bad tokenizer or template; then what was there before stays,
    but for rejects.jsonl, which is of the rows that were refused last.
    With a limit the share of bad rows is not judged: a few rows say nothing of it.
    Raises RankZeroError where the disk is full; what was begun is removed.
    """
    with _full_disk_is_said(data_dir):
        return _prepare(settings, data_dir, limit, processes, say)


def _prepare(
    settings: RunSettings,
    data_dir: Path,
    limit: int | None,
    processes: int | None,
    say: Callable[[str], None],
) -> DataIndex:
    fingerprints = Fingerprints(data_dir)
    jobs = _jobs(settings, fingerprints, limit)
    _make(data_dir)
    allowed = settings.max_rejected if limit is None else 1.0
    splits: dict[str, _Indexed] = {}
    written: dict[str, SplitWriter] = {}
    with ExitStack() as stack:
        # The held-out rows first, which are few: what is wrong with them is known sooner.
        for job in reversed(jobs):
            if (found := _found(settings, job, data_dir, allowed)) is not None:
                splits |= found
                continue
            writers = {
                split: stack.enter_context(SplitWriter(data_dir / f"{split}-{key}", key))
                for split, key in job.keys.items()
            }
            making = Making(settings, job, writers, limit, say)
            making.run(processes)
            rejects = [writer.flushed_rejects() for writer in writers.values()]
            with _kept_if_refused(rejects, data_dir if limit is None else None):
                making.tally.judge(job.setting, allowed)
                if limit is None:
                    making.tally.require_all_sources(
                        job.setting, [source.name for source in job.sources]
                    )
            splits |= making.finish()
            written |= writers
        if written:
            fingerprints.require_unchanged()
        for split, writer in written.items():
            writer.publish(splits[split][1])
    indexes = {split: index for split, (index, _) in splits.items()}
    index = DataIndex(train=indexes["train"], eval=indexes.get("eval"))
    if written or not _is_current(data_dir, index):
        _write_summary(data_dir, index, {split: audit for split, (_, audit) in splits.items()})
    fingerprints.save()
    _remove_others(data_dir, index)
    return index


def eval_examples(settings: RunSettings, split: SplitIndex) -> Iterator[Example]:
    """The held-out rows as they were before they became the documents of a prepared split."""
    held_out = None
    if settings.held_out is not None:
        held_out = set(read_column(split.folder, "digests").tolist())
    sources = settings.eval_sources if held_out is None else settings.train_sources
    for source in resolve(sources, "eval_data"):
        for line in lines(source):
            _, example = parsed_example(line, settings)
            if isinstance(example, str):
                continue
            if held_out is None or digest(example) in held_out:
                yield example


def _found(
    settings: RunSettings, job: Job, data_dir: Path, max_rejected: float
) -> dict[str, _Indexed] | None:
    """The splits of a job where all are there already, judged again: the limit may be another."""
    places = {split: data_dir / f"{split}-{key}" for split, key in job.keys.items()}
    found: dict[str, _Indexed] = {}
    for split, place in places.items():
        if (published := read_published(place)) is None:
            return None
        found[split] = published
    earlier = [audit for _, audit in found.values()]
    if settings.on_bad_row == "fail":
        for place, audit in zip(places.values(), earlier, strict=True):
            for reject in read_rejects(place / REJECTS):
                if reject.reason in audit["rejected"]:  # and not only dropped
                    refuse(reject)
    rejects = [place / REJECTS for place in places.values()]
    with _kept_if_refused(rejects, data_dir):
        Tally.of(earlier, rejects).judge(job.setting, max_rejected)
    return found


@contextmanager
def _kept_if_refused(rejects: Sequence[Path], data_dir: Path | None) -> Iterator[None]:
    """Where the rows are refused, leave all that are bad in rejects.jsonl, and say so."""
    try:
        yield
    except UserError as error:
        if data_dir is None or not any(path.stat().st_size for path in rejects):
            raise
        _make(data_dir)
        try:
            join_files(data_dir / REJECTS, rejects)
        except OSError:  # a full disk: what is wrong with the rows is still the thing to say
            raise error from None
        raise UserError(f"{error}; each row is named in {data_dir / REJECTS}") from None


@contextmanager
def _full_disk_is_said(data_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RankZeroError(
            f"{data_dir}: {error.strerror} while the data is prepared; what was there stays; make "
            "room, or give another output_dir, and start again"
        ) from None


def _make(data_dir: Path) -> None:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir: {data_dir} cannot be made ({error.strerror}); give another folder"
        ) from None


def _sources(settings: RunSettings) -> dict[str, list[Source]]:
    """By the name of the setting."""
    found = {"train_data": resolve(settings.train_sources, "train_data")}
    if settings.eval_sources:
        found["eval_data"] = resolve(settings.eval_sources, "eval_data")
        require_apart(found["train_data"], found["eval_data"])
    return found


def _jobs(settings: RunSettings, fingerprints: Fingerprints, limit: int | None) -> list[Job]:
    jobs = []
    for setting, sources in _sources(settings).items():
        held_out = settings.held_out if setting == "train_data" else None
        found = split_keys(settings, sources, fingerprints, held_out=held_out, limit=limit)
        keys = {setting.removesuffix("_data"): found["rest"]}
        if held_out is not None:
            keys["eval"] = found["held_out"]
        jobs.append(Job(setting=setting, sources=sources, keys=keys))
    return jobs


def _checked(
    settings: RunSettings, sources: Sequence[Source], first: int | None, rejects: Path
) -> tuple[Tally, bool]:
    """Rows parsed, and whether they were all; the bad ones are written to `rejects`."""
    tally, is_whole = Tally(), True
    with rejects.open("w", encoding="utf-8") as stream:
        for number, source in enumerate(sources):
            left = lines(source)
            for line in islice(left, first):
                row, example = parsed_example(line, settings)
                tally.count(number, 1, not isinstance(example, str))
                if isinstance(example, str):
                    reject = reject_of(row, example)
                    if settings.on_bad_row == "fail":
                        refuse(reject)
                    tally.reject(number, reject)
                    stream.write(reject.as_line())
            is_whole &= first is None or next(left, None) is None
    return tally, is_whole


def _is_current(data_dir: Path, index: DataIndex) -> bool:
    """Whether the files beside the splits are there and speak of these splits."""
    try:
        found = read_json(data_dir / INDEX)
    except (OSError, ValueError):
        return False
    if found != index.as_json() or not (data_dir / "audit.json").is_file():
        return False
    # Refused rows may have taken the place of those of the splits.
    return _content([data_dir / REJECTS]) == _content(_rejects(index))


def _rejects(index: DataIndex) -> list[Path]:
    return [split.folder / REJECTS for split in index.splits.values()]


def _content(paths: Sequence[Path]) -> bytes | None:
    """Of all files together; None where one is not there."""
    try:
        return b"".join(path.read_bytes() for path in paths)
    except OSError:
        return None


def _write_summary(data_dir: Path, index: DataIndex, audits: dict[str, dict[str, Any]]) -> None:
    """audit.json and rejects.jsonl of all splits, and last of all the index that names them."""
    if index.eval is not None:
        known = read_column(index.train.folder, "digests")
        shared = np.isin(read_column(index.eval.folder, "digests"), known)
        audits["eval"] = {**audits["eval"], "rows_also_in_train": int(shared.sum())}
    # Without an index, what a kill leaves here is written anew.
    (data_dir / INDEX).unlink(missing_ok=True)
    join_files(data_dir / REJECTS, _rejects(index))
    audit = {split: audits[split] for split in index.splits}
    write_text(data_dir / "audit.json", dump_json(audit), durable=True)
    write_text(data_dir / INDEX, dump_json(index.as_json()), durable=True)


def _remove_others(data_dir: Path, index: DataIndex) -> None:
    """Splits under older keys, and what killed processes left."""
    current = {split.folder.name for split in index.splits.values()}
    for path in list(data_dir.iterdir()):
        is_older = _SPLIT_FOLDER.fullmatch(path.name) and path.name not in current
        if not is_older and not is_abandoned(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
