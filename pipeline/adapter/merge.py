"""Merge adapters into a base, shard by shard. If a merge is interrupted, the next call resumes it.

A shard is one of the safetensors files of a model. Tensors that are not changed are copied byte by
byte, in the order of the source, so that index, tied embeddings and metadata stay valid.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.adapter.merge_output import (
    check_output,
    copy_other_files,
    other_files,
    require_replaceable,
    require_space,
    write_marker,
)
from pipeline.adapter.merge_plan import MergeOptions, MergePlan, WeightedAdapter, plan_merge
from pipeline.cluster.progress import Work, show_progress
from pipeline.errors import RankZeroError, UserError
from pipeline.files import atomic_folder, dump_json, read_json, write_text

if TYPE_CHECKING:
    from pipeline.adapter.merge_stream import MergeStream

logger = logging.getLogger(__name__)

_FINISHED_SHARDS = "finished_shards.json"  # file in the temporary folder of a merge
_MAX_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """Result of a merge, for the user and for the record of the merge.

    `most_changed`: name of the weight with the largest relative change, and `largest_change` this
    change: |W' - W| / |W| in Frobenius norms. `resumed_shards`: number of shards that an
    interrupted merge had written.
    """

    shards: int
    resumed_shards: int
    tensors_merged: int
    num_bytes: int
    largest_change: float
    most_changed: str
    seconds: float


def merge_adapters(
    base: Path, adapters: Sequence[WeightedAdapter], out: Path, options: MergeOptions
) -> MergeReport:
    """Write the sum of a base and adapters as a model folder `out`.

    The merged weights are equal to those of peft's `merge_and_unload` for a base in the dtype of
    the result. Raises UserError if base and adapters are not compatible, before anything is
    written. Raises RankZeroError if a merged weight is not finite or the disk is full. After an
    error, an earlier folder `out` is unchanged.
    """
    start = time.perf_counter()
    require_replaceable(out, [base, *(adapter.folder for adapter in adapters)])
    with show_progress("planning the merge"):
        plan = plan_merge(base, adapters, options)
    with _resumable_folder(plan, out) as temporary:
        finished = _finished_shards(plan, temporary)
        num_resumed = len(finished)
        _merge_shards(plan, temporary, finished)
        copy_other_files(plan, temporary)
        changes: dict[str, float] = {}  # name of a tensor -> its relative change
        for changes_of_shard in finished.values():
            changes |= changes_of_shard
        most_changed = max(changes, key=changes.__getitem__)
        report = MergeReport(
            shards=len(plan.shards),
            resumed_shards=num_resumed,
            tensors_merged=len(changes),
            num_bytes=sum(shard.num_bytes for shard in plan.shards),
            largest_change=changes[most_changed],
            most_changed=most_changed,
            seconds=time.perf_counter() - start,
        )
        (temporary / _FINISHED_SHARDS).unlink()
        write_marker(plan, temporary, report)
    return report


@contextmanager
def _resumable_folder(plan: MergePlan, out: Path) -> Iterator[Path]:
    """The temporary folder that replaces `out` at the end of the merge.

    After an interruption its finished shards are kept. If a merged value is not finite, the folder
    is emptied, because a resumed merge would give the same value.
    """

    def check(folder: Path) -> None:
        check_output(plan, folder)

    try:
        with atomic_folder(out, check, is_resumable=True) as temporary:
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield temporary
            except UserError:
                with suppress(OSError):  # raised if the folder is not empty
                    temporary.rmdir()
                raise
            except BlockingIOError:
                raise UserError(
                    f"{out}: another merge is writing this folder; wait until it has ended"
                ) from None
            except RankZeroError:
                _empty(temporary)
                raise
            finally:
                os.close(descriptor)
    except OSError as error:
        raise RankZeroError(
            f"{out}: the merged model cannot be written: {error}. Finished shards are kept; free "
            "some space, or make the folder writable, and run the same command again, which writes "
            "the other shards"
        ) from error


def _finished_shards(plan: MergePlan, folder: Path) -> dict[str, dict[str, float]]:
    """Name of a shard that an interrupted merge wrote -> the change of each adapted tensor.

    Files of a merge with other inputs or options are removed.
    """
    recorded: dict[str, dict[str, float]] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):  # no such file, or damaged
        record = read_json(folder / _FINISHED_SHARDS)
        if record["identity"] == plan.identity:
            recorded = dict(record["shards"])
    sizes = {shard.source.path.name: shard.num_bytes for shard in plan.shards}
    finished = {}
    for name, changes in recorded.items():
        path = folder / name
        if path.is_file() and path.stat().st_size == sizes[name]:
            finished[name] = changes
    _empty(folder, kept={*finished, _FINISHED_SHARDS})
    if finished:
        logger.info("resuming a merge: %d of %d shards are written", len(finished), len(sizes))
    return finished


def _empty(folder: Path, kept: Collection[str] = ()) -> None:
    """Remove all files and folders in a folder, except files with the names in `kept`."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in kept:
            path.unlink()


def _merge_shards(plan: MergePlan, folder: Path, finished: dict[str, dict[str, float]]) -> None:
    """Write the shards that are not in `finished`, and add each with its changes.

    `finished` is also written to a file after each shard, for a resumed merge.
    """
    shards = [shard for shard in plan.shards if shard.source.path.name not in finished]
    num_bytes = sum(shard.num_bytes for shard in shards)
    others = other_files(plan.base.folder)
    require_space(folder, num_bytes + sum(path.stat().st_size for path in others))
    if not shards:
        return
    with (
        show_progress("merging", num_bytes, in_bytes=True) as work,
        _open_stream(plan, work) as stream,
    ):
        for shard in shards:
            name = shard.source.path.name
            finished[name] = stream.merge_shard(shard, folder / name)
            record = {"identity": plan.identity, "shards": finished}
            write_text(folder / _FINISHED_SHARDS, dump_json(record), is_durable=True)


@contextmanager
def _open_stream(plan: MergePlan, work: Work) -> "Iterator[MergeStream]":
    """A MergeStream with a pool of threads, each of which runs torch with one thread."""
    import torch

    from pipeline.adapter.merge_layer import Arithmetic
    from pipeline.adapter.merge_stream import MergeStream

    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    device = torch.device(plan.options.device)
    largest_bytes = max(task.num_bytes for shard in plan.shards for task in shard.tensors.values())
    original_num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for this thread; the initializer does it for those of the pool
    try:
        with ThreadPoolExecutor(
            num_threads, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            arithmetic = Arithmetic(pool, device, plan.options.is_undone)
            yield MergeStream(arithmetic, largest_bytes, work, plan.quantisation)
    finally:
        torch.set_num_threads(original_num_threads)
