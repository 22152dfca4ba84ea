"""Hub data sets: their download, and the files of a split in the local cache."""

import logging
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.commands import command
from pipeline.config.data_names import DataSource
from pipeline.config.hub import HubSplit
from pipeline.errors import UserError
from pipeline.rows.content import SUFFIXES
from pipeline.rows.files import has_known_suffix


def split_files(split: HubSplit, key: str) -> list[Path]:
    """The files of a split in the local cache; nothing is downloaded.

    Raises a UserError that names the setting `key` if the snapshot is missing or incomplete, or if
    the data set has no such split.
    """
    snapshot = split.snapshot()
    if snapshot is None:
        raise UserError(
            f"{key}: {split}: no such file, and no hub data set of this name and revision in the "
            f"local cache; download it: {command('prepare')} RUN.yaml"
        )
    if not _is_complete(split, snapshot):
        raise UserError(
            f"{key}: {split}: the local cache lacks some of its files, as after an interrupted "
            f"download; download the rest: {command('prepare')} RUN.yaml"
        )
    import datasets

    for library in ("datasets", "huggingface_hub"):  # they warn of missing fields in the card
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with TemporaryDirectory(prefix="rankzero-") as cache:
            builder = datasets.load_dataset_builder(str(snapshot), cache_dir=cache)
    except Exception as error:  # noqa: BLE001 - several configurations, a loading script, no data ...
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: {split}: {reason}; or name the files in {snapshot}") from None
    by_split = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    if split.split not in by_split:
        splits = ", ".join(by_split) or "none"
        raise UserError(f"{key}: {split}: no such split; the data set has {splits}")
    files = [Path(file) for file in by_split[split.split]]
    if unknown := [file for file in files if not has_known_suffix(file)]:
        raise UserError(f"{key}: {split}: {unknown[0]} has none of the suffixes {SUFFIXES}")
    return files


def fetch(sources: Iterable[DataSource], key: str) -> None:
    """Download the hub data sets among `sources` that are missing or incomplete in the local cache.

    Raises a UserError that names the setting `key` if a download fails.
    """
    for source in sources:
        split = HubSplit.parse(source.path)
        if split is None:  # a local file, folder or glob
            continue
        snapshot = split.snapshot()
        if snapshot is not None and _is_complete(split, snapshot):
            continue
        from huggingface_hub import snapshot_download

        try:
            snapshot_download(split.name, repo_type="dataset", revision=split.revision)
        except Exception as error:  # noqa: BLE001 - network, name, access or disk
            reason = " ".join(str(error).split())
            raise UserError(
                f"{key}: {split}: cannot be downloaded from the hub: {reason}; check the name and "
                "the network (a private data set needs `hf auth login`), or name local files"
            ) from None


def _is_complete(split: HubSplit, snapshot: Path) -> bool:
    """Whether a snapshot has all files of the hub's list, which the cache recorded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        snapshot_download(
            split.name,
            repo_type="dataset",
            revision=split.revision,
            cache_dir=snapshot.parents[2],
            local_files_only=True,
        )
    except IncompleteSnapshotError:
        return False
    except LocalEntryNotFoundError:  # the cache has no record of a shortened commit hash
        return True
    return True
