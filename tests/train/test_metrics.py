"""metrics.jsonl on a disk that does not take everything, and the time that input takes."""

import errno
import os
import shutil
from io import FileIO

import pytest

from pipeline.train import metrics
from pipeline.train.metrics import InputWait, MetricsFile, read_metrics

pytestmark = pytest.mark.tensor


class SmallDisk(FileIO):
    """A file on a disk with so many bytes left; it takes a part of what does not fit."""

    left = 0

    def write(self, data) -> int:
        taken = min(len(data), SmallDisk.left)
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        SmallDisk.left -= taken
        return super().write(data[:taken])


@pytest.fixture
def file(tmp_path):
    """A metrics file on a small disk."""
    written = MetricsFile(tmp_path / "metrics.jsonl", 0)
    written._file.close()
    written._file = SmallDisk(tmp_path / "metrics.jsonl", "ab")
    return written


def test_lines_that_found_no_room_come_later_in_their_order(file, tmp_path):
    path, padding = tmp_path / "metrics.jsonl", "x" * 200
    SmallDisk.left = 2500  # ten lines and a part of the next
    for step in range(1, 301):
        file.write({"step": step, "padding": padding})
    content = path.read_bytes()
    assert content.endswith(b"\n")  # what was cut off is taken back
    assert [line["step"] for line in read_metrics(path)] == list(range(1, len(content) // 226 + 1))
    SmallDisk.left = 10**6
    file.write({"step": 301, "padding": padding})
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 302))
    assert path.read_bytes().count(b"\n") == 301


def test_each_line_is_there_at_once(file, tmp_path):
    SmallDisk.left = 10**6
    for step in (1, 2):
        file.write({"step": step})
        assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": step}


def test_waiting_is_the_sources_time_and_nothing_else(monkeypatch):
    now = 0.0

    def spend(seconds):
        nonlocal now
        now += seconds

    def source():
        for seconds in (1.0, 2.0, 4.0):
            spend(seconds)
            yield seconds
        spend(8.0)  # to find that there is no more

    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    wait, laps = InputWait(), []
    for _ in wait.over(source()):
        spend(100.0)
        laps.append(wait.lap())
    assert laps == [1.0, 2.0, 4.0]
    assert wait.lap() == 8.0
    assert wait.lap() == 0.0


def test_a_deleted_file_comes_back_whole(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    file = MetricsFile(folder / "metrics.jsonl", 0)
    file.write({"step": 1})
    shutil.rmtree(folder)
    file.write({"step": 2})  # there is no folder
    folder.mkdir()  # as the next save makes it
    file.flush()
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    file.write({"step": 3})
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]
