"""Worker processes build the same batches as the rank itself; a killed worker is reported."""

import pickle
import time
from math import ceil
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.config.settings import RunSettings
from pipeline.data.dataset.reader import open_split
from pipeline.data.order.batches import IGNORED, SequencePart, batches_of, build_batch
from pipeline.data.order.order import BatchLayout, RankWork
from pipeline.data.prepare.prepare import prepare_data
from pipeline.plan.cost.per_token import SequenceFlops
from tests import ROOT
from tests.commands import run
from tests.messages import assert_mentions
from tests.tiny import Documents, make_rows, make_tokenizer

pytestmark = pytest.mark.tensor

STEPS = 12


@pytest.fixture
def split():
    return Documents(40)


def work_on(split) -> RankWork:
    """Work of the second of two ranks from step 3 on."""
    flops = SequenceFlops(per_token=1.0, per_square=1.0, per_logit=1.0)
    layout = BatchLayout(
        data_parallel_size=2, accumulation_steps=2, micro_batch_size=2, flops=flops
    )
    return RankWork(split, layout, seed=0, rank=1, steps=range(3, 3 + STEPS))


def workers() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children()
        if process.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(process.cmdline())
    ]


def test_workers_build_the_same_batches_as_the_rank(split):
    """batches_of yields each batch with `first`, the position of the micro-batch in its step."""
    work = work_on(split)
    of_rank = list(batches_of(split, work))
    of_workers = list(batches_of(split, work, num_workers=2))
    assert len(of_rank) == len(of_workers) == 2 * STEPS
    for (batch, first), (worker_batch, worker_first) in zip(of_rank, of_workers, strict=True):
        assert worker_first == first
        assert torch.equal(worker_batch.input_ids, batch.input_ids)
        assert torch.equal(worker_batch.labels, batch.labels)
        assert torch.equal(worker_batch.predicting, batch.predicting)
        assert worker_batch.documents == batch.documents
    assert [first for _, first in of_rank] == [work[i].first for i in range(2 * STEPS)]


def test_predicting_has_the_offset_of_the_token_before_each_supervised_token(split):
    batch = build_batch(split, range(5))
    supervised = (batch.labels != IGNORED).flatten().nonzero()[:, 0]
    assert torch.equal(batch.predicting, supervised - 1)
    assert len(build_batch(split, []).predicting) == 0


@pytest.mark.parametrize("group_size", [2, 3, 5])
def test_parts_of_a_sequence_have_together_the_predicting_tokens_of_the_sequence(split, group_size):
    """Token ids are compared, because offsets are relative to the part of each rank."""
    whole = build_batch(split, range(5))
    length = whole.input_ids.shape[1]
    part_length = ceil(length / group_size)
    padding = group_size * part_length - length
    padded = torch.nn.functional.pad(whole.input_ids, (0, padding))
    predicting_ids = []
    for rank_in_group in range(group_size):
        sequence_part = SequencePart(group_size, rank_in_group)
        batch = build_batch(split, range(5), sequence_part)
        assert torch.equal(batch.input_ids, whole.input_ids)
        start = rank_in_group * part_length
        ids_of_part = padded[:, start : start + part_length].flatten()
        predicting_ids += ids_of_part[batch.predicting].tolist()
        assert len(build_batch(split, [], sequence_part).predicting) == 0
    expected = whole.input_ids.flatten()[whole.predicting].tolist()
    assert sorted(predicting_ids) == sorted(expected)


def test_every_tensor_of_a_batch_is_pinned(split, monkeypatch):
    """A copy from other memory to a GPU would make the host wait."""
    pinned_tensors = []

    def fake_pin_memory(tensor):
        pinned_tensors.append(tensor.clone())
        return pinned_tensors[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", fake_pin_memory)
    batch = build_batch(split, range(3))
    pinned_batch = batch.pin_memory()
    for name, value in vars(pinned_batch).items():
        if isinstance(value, torch.Tensor):
            assert any(value is tensor for tensor in pinned_tensors), name
            assert torch.equal(value, vars(batch)[name]), name
    assert pinned_batch.documents == batch.documents
    assert pinned_batch.tokens == batch.tokens


class RecordingDocuments(Documents):
    """Documents that create a file in a folder when one of them is read."""

    def __init__(self, count: int, folder: Path) -> None:
        super().__init__(count)
        self._folder = folder

    def sequence(self, number):
        (self._folder / str(number)).touch()
        return super().sequence(number)


def test_a_worker_builds_at_most_prefetch_factor_batches_ahead(tmp_path):
    split = RecordingDocuments(40, tmp_path)
    work = work_on(split)
    batches = batches_of(split, work, num_workers=1, prefetch_factor=3)
    next(batches)
    first_four = [work[i] for i in range(1 + 3)]
    expected = {str(i) for micro_batch in first_four for i in micro_batch.sequences}

    def documents_read():
        return {path.name for path in tmp_path.iterdir()}

    deadline = time.monotonic() + 60
    while (read_so_far := documents_read()) != expected:
        assert read_so_far < expected
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)  # time in which a worker without the limit would read more
    assert documents_read() == expected
    assert len(list(batches)) == 2 * STEPS - 1


def run_as_a_rank(code: str, tmp_path) -> str:
    """Run a script with a split and its work in a forked process."""
    (tmp_path / "rank.py").write_text(IMPORTS + code)
    exit_code, output = run(tmp_path / "rank.py", PYTHONPATH=str(ROOT))
    assert exit_code == 0, output
    return output


# First lines of the scripts below, which run in a process of their own.
IMPORTS = """
import os, signal, time
from pipeline.data.order.batches import worker_deaths_reported
from pipeline.errors import SingleRankError
from tests.data.order.test_batches import STEPS, batches_of, work_on, workers
from tests.tiny import Documents
split = Documents(40)
"""
# Kills one of two workers, and prints the error.
KILLED = """
if __name__ == "__main__":
    batches = batches_of(split, work_on(split), num_workers=2, prefetch_factor=1)
    next(batches)
    os.kill(workers()[0].pid, signal.SIGKILL)
    try:
        with worker_deaths_reported():
            list(batches)
    except SingleRankError as error:
        for worker in workers():
            worker.kill()
        time.sleep(0.5)  # the death must be reported once only
        print(error, flush=True)
        os._exit(0)  # as a rank ends after an error
"""


def test_a_killed_worker_is_reported_with_a_remedy(tmp_path):
    output = run_as_a_rank(KILLED, tmp_path)
    assert_mentions(output, "memory", "dataloader_num_workers: 0")


SIGNALLED = """
if __name__ == "__main__":
    batches = batches_of(split, work_on(split), num_workers=1)
    (worker,) = workers()
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        worker.send_signal(name)  # the worker is still importing
    next(batches)
    worker.send_signal(signal.SIGTERM)
    assert len(list(batches)) == 2 * STEPS - 1
"""


def test_signals_that_a_launcher_sends_to_all_processes_do_not_end_a_worker(tmp_path):
    run_as_a_rank(SIGNALLED, tmp_path)


def test_a_worker_maps_the_files_of_a_split_instead_of_a_copy(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "model")
    make_rows(tmp_path / "train.jsonl", 2000)
    values = {"model": "model", "train_data": "train.jsonl", "output_dir": "run"}
    settings = RunSettings(**{key: str(tmp_path / value) for key, value in values.items()})
    split = open_split(prepare_data(settings, tmp_path / "data").train)
    # A worker gets the pickled split. Only paths are pickled, less than a byte for each row.
    assert len(pickle.dumps((split, work_on(split)))) < 2000


class UnreadableDocuments(Documents):
    """Documents that cannot be read."""

    def sequence(self, i):
        raise RuntimeError(f"no sequence {i}")


UNREADABLE = """
from tests.data.order.test_batches import UnreadableDocuments
if __name__ == "__main__":
    split = UnreadableDocuments(40)
    try:
        with worker_deaths_reported():
            list(batches_of(split, work_on(split), num_workers=1))
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(0)
"""


def test_an_exception_of_a_worker_keeps_its_message(tmp_path):
    assert "no sequence" in run_as_a_rank(UNREADABLE, tmp_path)
