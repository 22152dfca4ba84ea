import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.settings import DataSource
from pipeline.data import sources
from pipeline.data.sources import BadRow, Row, data_files, read_rows
from pipeline.errors import UserError

GOOD = b'{"prompt": "a", "completion": "b"}'


def read(tmp_path, content: bytes):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    return list(read_rows([path]))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": ', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid UTF-8"),
        (b"[1, 2]", "found a list"),
        (b"null", "found null"),
        (b"7", "found a number"),
        (b"true", "found true or false"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"n": ' + b"1" * 5000 + b"}", "number too long"),
    ],
)
def test_a_bad_line_is_one_bad_row(tmp_path, line, reason):
    before, bad, after = read(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD)
    assert isinstance(bad, BadRow)
    assert reason in bad.reason
    assert (bad.file.name, bad.line) == ("rows.jsonl", 2)
    assert isinstance(before, Row)
    assert isinstance(after, Row)
    assert after.line == 3


def test_reasons_do_not_depend_on_the_place_so_that_they_count(tmp_path):
    rows = read(tmp_path, b'{"a": "x\n{"a": 1, "bcd": "xyz\n')
    assert len({row.reason for row in rows}) == 1


def test_a_row_without_end_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 64)
    long = json.dumps({"prompt": "x" * 1000}).encode()
    rows = read(tmp_path, GOOD + b"\n" + long + b"\n" + GOOD + b"\n" + long)
    assert [type(row) for row in rows] == [Row, BadRow, Row, BadRow]
    assert [row.line for row in rows] == [1, 2, 3, 4]
    assert "longer than" in rows[1].reason


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
    rows = read(tmp_path, b"\n  \r\n" + GOOD + b"\r\n\n" + GOOD)
    assert [row.line for row in rows] == [3, 5]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (row,) = read(tmp_path, b"\xef\xbb\xbf" + GOOD)
    assert row.value == {"prompt": "a", "completion": "b"}


@given(st.lists(st.one_of(st.binary(max_size=30), st.just(GOOD)), max_size=8))
def test_any_bytes_give_one_row_or_bad_row_a_line(tmp_path_factory, chunks):
    lines = b"\n".join(chunks).split(b"\n")
    rows = read(tmp_path_factory.mktemp("any"), b"\n".join(lines))
    expected = [
        number
        for number, line in enumerate(lines, start=1)
        if (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
    ]
    assert [row.line for row in rows] == expected
    good = [number for number, line in enumerate(lines, start=1) if line == GOOD]
    assert set(good) <= {row.line for row in rows if isinstance(row, Row)}


def test_files_are_read_in_the_order_of_the_setting(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).write_bytes(GOOD)
    files = data_files([DataSource(path=str(tmp_path / name)) for name in "ba"], "train_data")
    assert [row.file.name for row in read_rows(files)] == ["b", "a"]


def test_a_missing_file_names_the_key_the_path_and_what_is_near(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    wrong = tmp_path / "trian.jsonl"
    with pytest.raises(UserError) as raised:
        data_files([DataSource(path=str(wrong))], "train_data")
    message = str(raised.value)
    assert message.startswith(f"train_data: {wrong}: no such file")
    assert message.endswith("there is train.jsonl")
    with pytest.raises(UserError, match="no folder"):
        data_files([DataSource(path=str(tmp_path / "nowhere" / "x.jsonl"))], "eval_data")


def test_a_folder_and_an_empty_file_and_no_file_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(UserError, match=r"eval_data: .* is a folder; .*rows\.jsonl"):
        data_files([DataSource(path=str(tmp_path))], "eval_data")
    with pytest.raises(UserError, match=r"train_data: .*rows\.jsonl is empty"):
        data_files([DataSource(path=str(tmp_path / "rows.jsonl"))], "train_data")
    with pytest.raises(UserError, match="train_data: names no file"):
        data_files([], "train_data")


def test_rows_are_checked_without_torch():
    code = (
        "import sys, pipeline.data.prepare, pipeline.data.formats\n"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
