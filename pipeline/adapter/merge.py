"""Merging of adapters into a base, shard by shard. An interrupted merge continues.

Tensors that are not changed are copied byte by byte, in the order of the source, so that index,
tied embeddings and metadata stay valid.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
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

_FINISHED = "finished_shards.json"  # in the folder of an interrupted merge
_MAX_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """Result of a merge.

    `largest_change`: largest |W' - W| / |W| in Frobenius norms, of the weight `most_changed`.
    `resumed_shards`: number of shards that an interrupted merge had written.
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
    """Write the sum of a base and adapters as a model folder.

    The numbers are those of peft's `merge_and_unload` for a base in the dtype of the result.
    Raises UserError if base and adapters are not compatible, before anything is written. Raises
    RankZeroError if a merged weight is not finite or the disk is full. An earlier folder `out` then
    stays unchanged.
    """
    start = time.perf_counter()
    require_replaceable(out, [base, *(each.folder for each in adapters)])
    with show_progress("planning the merge"):
        plan = plan_merge(base, adapters, options)
    with _resumable_folder(plan, out) as fresh:
        finished = _finished_shards(plan, fresh)
        resumed = len(finished)
        _merge_shards(plan, fresh, finished)
        copy_other_files(plan, fresh)
        changes = {name: value for each in finished.values() for name, value in each.items()}
        most_changed = max(changes, key=changes.__getitem__)
        report = MergeReport(
            shards=len(plan.shards),
            resumed_shards=resumed,
            tensors_merged=len(changes),
            num_bytes=sum(shard.num_bytes for shard in plan.shards),
            largest_change=changes[most_changed],
            most_changed=most_changed,
            seconds=time.perf_counter() - start,
        )
        (fresh / _FINISHED).unlink()
        write_marker(plan, fresh, report)
    return report


@contextmanager
def _resumable_folder(plan: MergePlan, out: Path) -> Iterator[Path]:
    """The temporary folder that replaces `out` at the end of the merge.

    After an interruption its finished shards are kept. If a merged value is not finite, the folder
    is emptied, because a continued merge would have the same value.
    """
    try:
        with atomic_folder(out, lambda f: check_output(plan, f), is_resumable=True) as fresh:
            folder = os.open(fresh, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield fresh
            except UserError:
                with suppress(OSError):
                    fresh.rmdir()  # if it is empty
                raise
            except BlockingIOError:
                raise UserError(f"{out}: another merge is writing it; wait for its end") from None
            except RankZeroError:
                _empty(fresh)
                raise
            finally:
                os.close(folder)
    except OSError as error:
        raise RankZeroError(
            f"{out}: the merged model cannot be written: {error}. Finished shards are kept; make "
            "room, and the same command continues with the others"
        ) from error


def _finished_shards(plan: MergePlan, folder: Path) -> dict[str, dict[str, float]]:
    """Name of a shard that an interrupted merge wrote -> the change of each adapted tensor.

    Files of a merge with other inputs or options are removed.
    """
    try:
        record = read_json(folder / _FINISHED)
        finished: dict[str, dict[str, float]] = dict(record["shards"])
        is_same = record["identity"] == plan.identity
    except (OSError, ValueError, KeyError, TypeError):
        finished, is_same = {}, False
    sizes = {shard.source.path.name: shard.num_bytes for shard in plan.shards}
    finished = {
        name: changes
        for name, changes in finished.items()
        if is_same and (folder / name).is_file() and (folder / name).stat().st_size == sizes[name]
    }
    _empty(folder, kept={*finished, _FINISHED})
    if finished:
        logger.info("continuing a merge: %d of %d shards are done", len(finished), len(sizes))
    return finished


def _empty(folder: Path, kept: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in kept:
            path.unlink()


def _merge_shards(plan: MergePlan, folder: Path, finished: dict[str, dict[str, float]]) -> None:
    """Write the shards that are not finished, and record each."""
    shards = [shard for shard in plan.shards if shard.source.path.name not in finished]
    num_bytes = sum(shard.num_bytes for shard in shards)
    others = other_files(plan.base.folder)
    require_space(folder, num_bytes + sum(path.stat().st_size for path in others))
    if not shards:
        return
    with (
        show_progress("merging", num_bytes, in_bytes=True) as work,
        _stream(plan, work) as stream,
    ):
        for shard in shards:
            name = shard.source.path.name
            finished[name] = stream.merge_shard(shard, folder / name)
            record = {"identity": plan.identity, "shards": finished}
            write_text(folder / _FINISHED, dump_json(record), durable=True)


@contextmanager
def _stream(plan: MergePlan, work: Work) -> "Iterator[MergeStream]":
    import torch

    from pipeline.adapter.merge_layer import Arithmetic
    from pipeline.adapter.merge_stream import MergeStream

    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    device = torch.device(plan.options.device)
    largest = max(task.num_bytes for shard in plan.shards for task in shard.tensors.values())
    earlier = torch.get_num_threads()
    torch.set_num_threads(1)  # in this thread too, not only in those of the pool
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            arithmetic = Arithmetic(pool, device, plan.options.is_undone)
            yield MergeStream(arithmetic, largest, work, plan.quantisation)
    finally:
        torch.set_num_threads(earlier)
