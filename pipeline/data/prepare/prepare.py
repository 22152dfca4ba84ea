"""Prepare the data of a run file: rows -> the prepared data set in the run folder, with its audit.

A prepared data set has the splits `train` and, if there is held-out data, `eval`. The key of a
split is a hash of all its inputs; a split with the same key is reused. Only one process at a time
may run `prepare_data`; any number may read the splits. `check_rows` imports neither transformers
nor torch.
"""

import errno
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np

from pipeline.cluster.progress import show_progress
from pipeline.config.settings import RunSettings, settings_without_effect
from pipeline.data.dataset.reader import (
    INDEX,
    REJECTS,
    DataIndex,
    SplitIndex,
    read_column,
    read_published,
)
from pipeline.data.dataset.writer import SplitWriter, join_files, tokenising_versions
from pipeline.data.prepare.audit import (
    RowCounts,
    read_rejects,
    refuse_bad_row,
    require_usable,
    without_numbers,
)
from pipeline.data.prepare.digests import digest
from pipeline.data.prepare.job import Job, JobRun
from pipeline.data.prepare.keys import Fingerprints, split_keys
from pipeline.data.prepare.lines import read_line
from pipeline.errors import RankZeroError, UserError
from pipeline.files import dump_json, is_abandoned, read_json_or_empty, write_text
from pipeline.plan.estimate import estimate
from pipeline.plan.given.data_size import DataSize
from pipeline.rows.examples import Example
from pipeline.rows.sources import Source, read_lines, require_disjoint, resolve_sources

logger = logging.getLogger(__name__)
_FIRST_ROWS = 2000  # rows of each source that are checked before transformers is imported
_SplitWithAudit = tuple[SplitIndex, dict[str, Any]]  # a split's index and audit
_SPLIT_FOLDER = re.compile(r"(train|eval)-[0-9a-f]{16}")


def check_rows(
    settings: RunSettings, first: int | None = None, *, data_dir: Path | None = None
) -> None:
    """Parse the rows of training and held-out data. Raises UserError if too many are bad.

    `first`: number of rows of each source to parse. If too many of these are bad, the whole source
    is parsed, so that the message counts all bad rows. `data_dir`: if the data is refused, its bad
    rows are written to rejects.jsonl in this folder; nothing else is written.
    """
    for key, sources in _resolved_sources(settings).items():
        with TemporaryDirectory(prefix="rankzero-") as folder:
            rejects = Path(folder) / REJECTS
            parsed = []
            with rejects.open("w", encoding="utf-8", errors="backslashreplace") as stream:
                for source in sources:
                    counts = _parse_rows(settings, source, first, stream)
                    if counts is not None:
                        parsed.append((source.name, counts))
            with _save_rejects_on_refusal([rejects], data_dir):
                require_usable(key, parsed, settings.max_rejected)


def check_first_rows(settings: RunSettings) -> None:
    """Call `check_rows` for the first rows of each source, which takes a fraction of a second."""
    check_rows(settings, _FIRST_ROWS, data_dir=Path(settings.output_dir) / "data")


def train_key(settings: RunSettings) -> str:
    """Key of the prepared training data for these settings; the data need not be prepared."""
    return data_keys(settings)["train"]


def data_keys(settings: RunSettings) -> dict[str, str]:
    """Keys of the splits `train` and, if there is held-out data, `eval`.

    The splits need not be prepared.
    """
    fingerprints = Fingerprints(Path(settings.output_dir) / "data")
    return {
        split: key for job in _jobs(settings, fingerprints, None) for split, key in job.keys.items()
    }


def data_size(settings: RunSettings) -> DataSize | None:
    """Size of the training set: counted if the data is prepared, otherwise estimated from a sample.

    The count must belong to these settings and this data. If the data files cannot be read on this
    machine, that cannot be checked, and the count is used.
    """
    try:
        index = DataIndex.load(Path(settings.output_dir) / "data")
    except UserError:
        return estimate(settings)
    try:
        is_current = train_key(settings) == index.train.key
    except (UserError, OSError):  # the rows or the template cannot be read here
        return index.train.size
    return index.train.size if is_current else estimate(settings)


def prepare_data(
    settings: RunSettings,
    data_dir: Path,
    limit: int | None = None,
    *,
    processes: int | None = None,
) -> DataIndex:
    """Write the prepared data set to `data_dir`, or reuse the splits that are there.

    `limit`: number of rows to use per split; max_rejected does not apply then. `processes`:
    tokenisation workers, by default chosen from the size of the data; the result does not depend
    on it. Raises UserError for bad data, a bad tokenizer or chat template, and RankZeroError if the
    disk is full. After an error `data_dir` is as before, except that rejects.jsonl has the rejected
    rows if the data is refused.
    """
    with _report_full_disk(data_dir):
        fingerprints = Fingerprints(data_dir)
        with show_progress("hashing the data"):
            jobs = _jobs(settings, fingerprints, limit)
        for job in jobs:
            for source in job.sources:
                for note in source.notes:
                    logger.info("%s", note)
        _create_folder(data_dir)
        splits: dict[str, _SplitWithAudit] = {}
        written: dict[str, SplitWriter] = {}
        with ExitStack() as stack:
            # eval_data first: it is small, so that bad rows in it are reported early.
            for job in reversed(jobs):
                if (published := _reusable_splits(settings, job, data_dir, limit)) is not None:
                    _log_other_versions([index for index, _ in published.values()])
                    splits |= published
                    continue
                writers = {
                    split: stack.enter_context(SplitWriter(data_dir / f"{split}-{key}", key))
                    for split, key in job.keys.items()
                }
                run = JobRun(settings, job, writers, limit)
                run.run(processes)
                rejects = [writer.flushed_rejects() for writer in writers.values()]
                with _save_rejects_on_refusal(rejects, data_dir if limit is None else None):
                    run.require_usable(_max_rejected(settings, limit))
                with show_progress(f"{job.setting}: packing and writing"):
                    splits |= run.finish()
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
        _remove_outdated(data_dir, index)
        _warn_of_settings_without_effect(settings, [audit for _, audit in splits.values()])
        return index


def eval_examples(settings: RunSettings, split: SplitIndex) -> Iterator[Example]:
    """Yield the examples of the prepared held-out split, which are read from the data files again.

    If rows of the training data are held out, they are recognised by their digests.
    """
    digests = None
    if settings.held_out is None:
        sources = resolve_sources(settings.eval_sources, "eval_data")
    else:
        sources = resolve_sources(settings.train_sources, "train_data")
        digests = set(read_column(split.folder, "digests").tolist())
    for source in sources:
        for line in read_lines(source):
            _, result = read_line(line, settings)
            if isinstance(result, str):  # the reason why the row is bad
                continue
            example = result.example
            # Version 0.1 wrote digests in which white space counts exactly.
            if digests is None or not digests.isdisjoint(
                (digest(example), digest(example, keeps_space=True))
            ):
                yield example


def _warn_of_settings_without_effect(
    settings: RunSettings, audits: Sequence[Mapping[str, Any]]
) -> None:
    """Name the settings that have no effect on rows of the formats that the data has."""
    sources = [source for audit in audits for source in audit["sources"]]
    formats = sorted({name for source in sources for name in source["formats"]})
    named_by_plan = settings_without_effect(settings)
    without_effect = settings_without_effect(settings, formats)
    if names := [name for name in without_effect if name not in named_by_plan]:
        logger.warning(
            "%s: no effect, because all rows have the format %s",
            ", ".join(names), " or ".join(formats),
        )  # fmt: skip
    if settings.columns and not any(source.get("rows_mapped", 1) for source in sources):
        logger.warning(
            "columns: no effect, because no row has %s", " or ".join(settings.columns.values())
        )


def _max_rejected(settings: RunSettings, limit: int | None) -> float | None:
    """The share of rejected rows that is allowed; None for a trial on a few rows."""
    return settings.max_rejected if limit is None else None


def _reusable_splits(
    settings: RunSettings, job: Job, data_dir: Path, limit: int | None
) -> dict[str, _SplitWithAudit] | None:
    """The prepared splits of a job by name; None if one of them does not exist.

    Raises UserError if the current settings do not allow their rejected rows.
    """
    folders = {split: data_dir / f"{split}-{key}" for split, key in job.keys.items()}
    splits: dict[str, _SplitWithAudit] = {}
    for split, folder in folders.items():
        if (published := read_published(folder)) is None:
            return None
        splits[split] = published
    counts = [RowCounts() for _ in job.sources]
    for split, (_, audit) in splits.items():
        for total, source in zip(counts, audit["sources"], strict=True):
            total.add(RowCounts.from_json(source))
        if settings.on_bad_row == "fail" and audit["rejected"]:
            for reject in read_rejects(folders[split] / REJECTS):
                # The file also has dropped rows, which are not bad rows.
                if without_numbers(reject.reason) in audit["rejected"]:
                    refuse_bad_row(f"{reject.file}:{reject.line}", reject.reason)
    names = [source.name for source in job.sources]
    rejects = [folder / REJECTS for folder in folders.values()]
    with _save_rejects_on_refusal(rejects, data_dir):
        named = list(zip(names, counts, strict=True))
        require_usable(job.setting, named, _max_rejected(settings, limit))
    return splits


def _log_other_versions(indexes: Sequence[SplitIndex]) -> None:
    """Log the splits that were written with other versions of the tokenising packages.

    Versions are not in the key: a run that is resumed after an update of the environment keeps the
    documents that it was trained on.
    """
    installed = tokenising_versions()
    for index in indexes:
        changed = [
            name for name, version in index.made_with.items() if installed.get(name) != version
        ]
        if changed:
            logger.info(
                "%s: reused; it was prepared with %s, but %s is installed; remove the folder to "
                "prepare it again",
                index.folder,
                ", ".join(f"{name} {index.made_with[name]}" for name in changed),
                ", ".join(f"{name} {installed[name]}" for name in changed),
            )


@contextmanager
def _save_rejects_on_refusal(rejects: Sequence[Path], data_dir: Path | None) -> Iterator[None]:
    """If the body raises UserError, copy its rejected rows to rejects.jsonl and name that file.

    `rejects`: files that are concatenated. `data_dir`: None to raise the error unchanged.
    """
    try:
        yield
    except UserError as error:
        if data_dir is None or not any(path.stat().st_size for path in rejects):
            raise
        _create_folder(data_dir)
        try:
            join_files(data_dir / REJECTS, rejects)
        except OSError:  # a full disk: the original error is raised
            raise error from None
        raise UserError(f"{error}\nall rejected rows are in {data_dir / REJECTS}") from None


@contextmanager
def _report_full_disk(data_dir: Path) -> Iterator[None]:
    """Context manager that turns the OSError of a full disk into a RankZeroError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RankZeroError(
            f"{data_dir}: {error.strerror} while the data is prepared; existing files "
            "are unchanged; free disk space or set another output_dir, and start again"
        ) from None


def _create_folder(data_dir: Path) -> None:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir: {data_dir} cannot be created ({error.strerror}); give another folder"
        ) from None


def _resolved_sources(settings: RunSettings) -> dict[str, list[Source]]:
    """The sources of `train_data` and `eval_data`, with paths and globs resolved to files."""
    sources = {"train_data": resolve_sources(settings.train_sources, "train_data")}
    if settings.eval_sources:
        sources["eval_data"] = resolve_sources(settings.eval_sources, "eval_data")
        require_disjoint(sources["train_data"], sources["eval_data"])
    return sources


def _jobs(settings: RunSettings, fingerprints: Fingerprints, limit: int | None) -> list[Job]:
    """A job for `train_data` and, if it is set, one for `eval_data`."""
    jobs = []
    for setting, sources in _resolved_sources(settings).items():
        held_out = settings.held_out if setting == "train_data" else None
        both_keys = split_keys(settings, sources, fingerprints, held_out=held_out, limit=limit)
        keys = {setting.removesuffix("_data"): both_keys["rest"]}
        if held_out is not None:
            keys["eval"] = both_keys["held_out"]
        jobs.append(Job(setting=setting, sources=sources, keys=keys))
    return jobs


def _parse_rows(
    settings: RunSettings, source: Source, first: int | None, rejects: IO[str]
) -> RowCounts | None:
    """Counts of all rows of a source; None if only its first rows were read and they pass.

    `first`: number of rows to read at first; None for all. `rejects`: file to which the rejected
    rows are written.
    """
    start, counts = rejects.tell(), RowCounts()
    remaining = read_lines(source)
    for line in islice(remaining, first):
        row, result = read_line(line, settings)
        if isinstance(result, str):  # the reason why the row is bad
            if settings.on_bad_row == "fail":
                refuse_bad_row(f"{row.file}:{row.line}", result)
            rejects.write(counts.reject(row, result).as_line())
        else:
            counts.numbers["rows_used"] += 1
    if first is None or next(remaining, None) is None:
        return counts
    rows = counts.rows
    if rows["rows_rejected"] <= settings.max_rejected * rows["rows_read"] and rows["rows_used"]:
        return None
    rejects.seek(start)
    rejects.truncate()
    return _parse_rows(settings, source, None, rejects)


def _is_current(data_dir: Path, index: DataIndex) -> bool:
    """Whether index, audit.json and rejects.jsonl exist and belong to these splits."""
    is_published = read_json_or_empty(data_dir / INDEX) == index.as_json()
    if not is_published or not (data_dir / "audit.json").is_file():
        return False
    # If later data was refused, rejects.jsonl has the rejected rows of that data.
    return _joined_content([data_dir / REJECTS]) == _joined_content(_reject_files(index))


def _reject_files(index: DataIndex) -> list[Path]:
    return [split.folder / REJECTS for split in index.splits.values()]


def _joined_content(paths: Sequence[Path]) -> bytes | None:
    """Concatenated content of files; None if one is missing."""
    try:
        return b"".join(path.read_bytes() for path in paths)
    except OSError:
        return None


def _write_summary(data_dir: Path, index: DataIndex, audits: dict[str, dict[str, Any]]) -> None:
    """Write audit.json and rejects.jsonl for all splits, then the index of the splits."""
    if index.eval is not None:
        train = read_column(index.train.folder, "digests")
        held_out = read_column(index.eval.folder, "digests")
        shared = int(np.isin(held_out, train).sum())
        audits["eval"] = {**audits["eval"], "rows_also_in_train": shared}
    # The index is removed first, so that after a kill in between all three are written again.
    (data_dir / INDEX).unlink(missing_ok=True)
    join_files(data_dir / REJECTS, _reject_files(index))
    audit = {split: audits[split] for split in index.splits}
    write_text(data_dir / "audit.json", dump_json(audit), is_durable=True)
    write_text(data_dir / INDEX, dump_json(index.as_json()), is_durable=True)


def _remove_outdated(data_dir: Path, index: DataIndex) -> None:
    """Remove splits with other keys, and temporary files of killed processes."""
    current = {split.folder.name for split in index.splits.values()}
    for path in list(data_dir.iterdir()):
        is_outdated = _SPLIT_FOLDER.fullmatch(path.name) and path.name not in current
        if not is_outdated and not is_abandoned(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
