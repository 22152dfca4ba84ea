"""The estimate of the data's size: exact rows of small files, scale for large ones, no errors."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.settings import RunSettings
from pipeline.plan.data_size import BYTES_PER_TOKEN, SAMPLE_BYTES, estimate


def settings_of(*files, max_length=1024):
    data = [str(file) for file in files]
    return RunSettings(model="m", train_data=data, output_dir="o", max_length=max_length)


def chat(*contents):
    return {"messages": [{"role": "user", "content": content} for content in contents]}


text = st.text(min_size=1, max_size=60).filter(lambda t: t.isprintable())
row = st.lists(text, min_size=1, max_size=4).map(lambda texts: chat(*texts)) | st.builds(
    lambda prompt, completion: {"prompt": prompt, "completion": completion}, text, text
)


@given(
    files=st.lists(st.lists(row, max_size=30), min_size=1, max_size=4),
    end=st.sampled_from(["\n", "\r\n", "\n\n", "\nnot json\n", "\n[1]\n"]),
    is_ascii=st.booleans(),
)
def test_rows_of_files_below_the_sample_are_counted(files, end, is_ascii):
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / str(i) for i in range(len(files))]
        for path, rows in zip(paths, files, strict=True):
            lines = [json.dumps(r, ensure_ascii=is_ascii) for r in rows]
            path.write_bytes("".join(line + end for line in lines).encode())
        found = estimate(settings_of(*paths))
    count = sum(len(rows) for rows in files)
    assert (0 if found is None else found.documents) == count
    if found is not None:
        assert count <= found.tokens <= found.longest * count
        assert not found.is_exact


@pytest.mark.parametrize("copies", [3, 40])
def test_a_large_file_is_scaled_up_from_its_beginning(tmp_path, copies):
    lines = "".join(json.dumps(chat("x" * (50 + i % 100))) + "\n" for i in range(10_000))
    file = tmp_path / "large.jsonl"
    file.write_text(lines * copies)
    assert file.stat().st_size > SAMPLE_BYTES
    found = estimate(settings_of(file))
    assert found.documents == pytest.approx(10_000 * copies, rel=0.01)
    assert found.mean_tokens == pytest.approx(99.5 / BYTES_PER_TOKEN + 5, rel=0.03)
    assert found.longest is None  # not every row has been seen


def test_files_share_the_sample_and_count_by_their_size(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_text(10 * (json.dumps(chat("x" * 3500)) + "\n"))
    large.write_text(100_000 * (json.dumps(chat("x" * 35)) + "\n"))
    found = estimate(settings_of(large, small, max_length=500))
    assert found.documents == pytest.approx(100_010, rel=0.001)
    assert found.tokens == pytest.approx(100_000 * 15 + 10 * 500, rel=0.001)  # long rows are cut


def test_no_more_than_the_sample_is_read(tmp_path, monkeypatch):
    files = [tmp_path / str(i) for i in range(3)]
    for i, file in enumerate(files):
        file.write_text((i + 1) * 20_000 * (json.dumps(chat("x" * 35)) + "\n"))
    read, whole = [], Path.open

    def opened(path, mode):
        stream = whole(path, mode)
        monkeypatch.setattr(opened, "streams", [*opened.streams, stream])
        return stream

    opened.streams = []
    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(
        "json.loads", lambda line, loads=json.loads: read.append(line) or loads(line)
    )
    assert estimate(settings_of(*files)).documents == pytest.approx(120_000, rel=0.001)
    assert SAMPLE_BYTES / 2 < sum(map(len, read)) <= SAMPLE_BYTES
    assert all(stream.closed for stream in opened.streams)


def test_one_line_longer_than_the_sample_is_one_row(tmp_path):
    file = tmp_path / "long"
    file.write_text(json.dumps(chat("x" * SAMPLE_BYTES)))
    assert estimate(settings_of(file)).documents == 1


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "no rows", "pipe", "name"])
def test_what_cannot_be_estimated_is_none(tmp_path, kind):
    file = tmp_path / "f"
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "name":
        file = "a\0b"
    elif kind != "missing":
        file.write_bytes(b"" if kind == "empty" else b'\xff\xfe\n{"a": 1}\n[]\n{"prompt": "p"}\n')
    assert estimate(settings_of(file)) is None
