"""metrics.jsonl on a full disk or with damaged lines, and the measured wait for input."""

import errno
import math
import os
import shutil
from io import FileIO

import pytest

from pipeline.train import metrics
from pipeline.train.metrics import InputWait, MetricsFile, read_metrics

pytestmark = pytest.mark.tensor


class SmallDisk(FileIO):
    """A file on a disk with `free_bytes`; a write that does not fit is written in part."""

    free_bytes = 0

    def write(self, data) -> int:
        written = min(len(data), SmallDisk.free_bytes)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        SmallDisk.free_bytes -= written
        return super().write(data[:written])


@pytest.fixture
def file(tmp_path):
    """A metrics file on a small disk."""
    metrics_file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics_file._file.close()
    metrics_file._file = SmallDisk(tmp_path / "metrics.jsonl", "ab")
    return metrics_file


def test_lines_that_do_not_fit_on_a_full_disk_are_written_later_in_order(file, tmp_path):
    path, padding = tmp_path / "metrics.jsonl", "x" * 200
    SmallDisk.free_bytes = 2500  # ten lines and a part of the next
    for step in range(1, 301):
        file.write({"step": step, "padding": padding})
    content = path.read_bytes()
    assert content.endswith(b"\n")  # no partial line remains
    num_lines = len(content) // 226  # bytes of a line
    assert [line["step"] for line in read_metrics(path)] == list(range(1, num_lines + 1))
    SmallDisk.free_bytes = 10**6
    file.write({"step": 301, "padding": padding})
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 302))
    assert path.read_bytes().count(b"\n") == 301


def test_a_line_can_be_read_as_soon_as_it_is_written(file, tmp_path):
    SmallDisk.free_bytes = 10**6
    for step in (1, 2):
        file.write({"step": step})
        assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": step}


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0).write({"step": 1, "loss": math.nan, "scores": [math.inf, 2.5]})
    assert path.read_text() == '{"step": 1, "loss": null, "scores": [null, 2.5]}\n'
    MetricsFile(path, resumed_step=1)  # a resume writes the lines up to its step again
    assert read_metrics(path) == [{"step": 1, "loss": None, "scores": [None, 2.5]}]


def test_input_wait_counts_the_time_of_the_source_and_not_of_the_loop_body(monkeypatch):
    now = 0.0  # seconds of a clock that only `spend` advances

    def spend(seconds):
        nonlocal now
        now += seconds

    def source():
        for seconds in (1.0, 2.0, 4.0):
            spend(seconds)
            yield seconds
        spend(8.0)  # after the last element, before the source ends

    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    wait, laps = InputWait(), []
    for _ in wait.over(source()):
        spend(100.0)  # of the loop body
        laps.append(wait.lap())
    assert laps == [1.0, 2.0, 4.0]
    assert wait.lap() == 8.0
    assert wait.lap() == 0.0


def test_a_deleted_file_is_written_again_completely(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    file = MetricsFile(folder / "metrics.jsonl", 0)
    file.write({"step": 1})
    shutil.rmtree(folder)
    file.write({"step": 2})  # there is no folder
    folder.mkdir()  # the next save creates it
    file.flush()
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    file.write({"step": 3})
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe{}\n", b"3\n", b"[1]\n", b"null\n", b'{"loss": 1}\n', b'{"step": "x"}\n',
               b'{"step": 1.5}\n', b'{"step": 9', b"\x00\n"],
)  # fmt: skip
def test_damaged_lines_are_dropped_and_the_others_kept(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n{"step": 3}\n')
    MetricsFile(path, resumed_step=2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    path.read_text(encoding="utf-8")
