"""The estimated size of the data: rows of small files are counted, large files are extrapolated.

An estimate has a token for every 3.5 bytes of text (BYTES_PER_TOKEN), and 5 tokens for the chat
template of each message. A text of 35 bytes thus has 10 tokens, and 15 as a message.
"""

import bz2
import gzip
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.settings import RunSettings
from pipeline.plan import estimate as data_size
from pipeline.plan.estimate import BYTES_PER_TOKEN, SAMPLE_BYTES, estimate

pytestmark = pytest.mark.unit


MESSAGE_TOKENS = 5


def settings_of(*files, **values):
    data = [file if isinstance(file, dict) else str(file) for file in files]
    keys = {"model": "m", "train_data": data, "output_dir": "o"}
    return RunSettings.model_validate(keys | values)


def chat(*contents):
    return {"messages": [{"role": "assistant", "content": content} for content in contents]}


text = st.text(min_size=1, max_size=60).filter(lambda t: t.isprintable() and not t.isspace())
row = st.lists(text, min_size=1, max_size=4).map(lambda texts: chat(*texts)) | st.builds(
    lambda prompt, completion: {"prompt": prompt, "completion": completion}, text, text
)


@given(
    files=st.lists(st.lists(row, min_size=1, max_size=30), min_size=1, max_size=4),
    # A line end, or a line end and a line that is not a valid row and is not counted.
    end=st.sampled_from(["\n", "\r\n", "\n\n", "\nnot json\n", "\n[1]\n"]),
    is_ascii=st.booleans(),
)
def test_rows_of_files_smaller_than_the_sample_are_counted(files, end, is_ascii):
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / str(i) for i in range(len(files))]
        for path, rows in zip(paths, files, strict=True):
            lines = [json.dumps(row, ensure_ascii=is_ascii) for row in rows]
            path.write_bytes("".join(line + end for line in lines).encode())
        size = estimate(settings_of(*paths))
    num_rows = sum(len(rows) for rows in files)
    assert size.documents == num_rows
    assert num_rows <= size.tokens <= size.longest * num_rows
    assert not size.is_exact


@pytest.mark.parametrize("copies", [3, 40])
def test_a_large_file_is_extrapolated_from_its_beginning(tmp_path, copies):
    lines = "".join(json.dumps(chat("x" * (50 + i % 100))) + "\n" for i in range(10_000))
    file = tmp_path / "large.jsonl"
    file.write_text(lines * copies)
    assert file.stat().st_size > SAMPLE_BYTES
    size = estimate(settings_of(file))
    assert size.documents == pytest.approx(10_000 * copies, rel=0.01)
    mean_bytes = 99.5  # of 50 to 149
    assert size.mean_tokens == pytest.approx(
        mean_bytes / BYTES_PER_TOKEN + MESSAGE_TOKENS, rel=0.03
    )
    assert size.longest is None  # not every row was read


def test_a_small_file_is_read_whole_and_a_large_file_is_extrapolated_to_its_size(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_text(10 * (json.dumps(chat("x" * 3500)) + "\n"))
    large.write_text(100_000 * (json.dumps(chat("x" * 35)) + "\n"))
    size = estimate(settings_of(large, small, max_length=500))
    assert size.documents == pytest.approx(100_010, rel=0.001)
    tokens_of_small_file = 10 * 500  # truncated to max_length
    assert size.tokens == pytest.approx(100_000 * 15 + tokens_of_small_file, rel=0.001)


def test_the_parsed_lines_of_all_files_together_have_at_most_sample_bytes(tmp_path, monkeypatch):
    files = [tmp_path / str(i) for i in range(3)]
    for i, file in enumerate(files):
        file.write_text((i + 1) * 20_000 * (json.dumps(chat("x" * 35)) + "\n"))
    line_bytes = []

    def record_and_parse(line, parse=data_size.parse_line):
        line_bytes.append(len(line.content))
        return parse(line)

    monkeypatch.setattr(data_size, "parse_line", record_and_parse)
    assert estimate(settings_of(*files)).documents == pytest.approx(120_000, rel=0.001)
    # The sample of a file ends with a whole line, which may go beyond the limit.
    assert SAMPLE_BYTES / 2 < sum(line_bytes) <= SAMPLE_BYTES + len(files) * max(line_bytes)


def test_one_line_longer_than_the_sample_is_one_row(tmp_path):
    file = tmp_path / "long"
    file.write_text(json.dumps(chat("x" * SAMPLE_BYTES)))
    assert estimate(settings_of(file)).documents == 1


ROWS = [chat("x" * (1 + i % 70)) for i in range(1000)]


def write(path, rows):
    """Write rows in the format of the file's name; JSON lines without a name for the format."""
    text = "\n".join(map(json.dumps, rows)).encode()
    if ".json" in path.suffixes:
        text = json.dumps(rows, indent=1).encode()
    compress = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".zst": partial(pyarrow.compress, codec="zstd", asbytes=True),
    }
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        open_writer = pyarrow.ipc.new_stream if "stream" in path.name else pyarrow.ipc.new_file
        with open_writer(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)  # rows of a record batch: several batches
    else:
        path.write_bytes(compress.get(path.suffix, bytes)(text))


NAMES = [
    "f.jsonl.gz",
    "f.json",
    "f.json.zst",
    "f.jsonl.bz2",
    "f.parquet",
    "stream.arrow",
    "f.arrow",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_file_format_gives_the_size_of_its_rows(tmp_path, name):
    write(tmp_path / name, ROWS)
    write(tmp_path / "plain", ROWS)
    assert estimate(settings_of(tmp_path / name)) == estimate(settings_of(tmp_path / "plain"))


# Without bz2: one of its blocks has up to 900 kB, much more than the sample here.
@pytest.mark.parametrize("name", [name for name in NAMES if "bz2" not in name])
def test_a_large_file_of_every_format_is_extrapolated(tmp_path, name, monkeypatch):
    monkeypatch.setattr(data_size, "SAMPLE_BYTES", 50_000)
    random = Random(0)
    rows = [chat("".join(random.choices("abcdefgh ", k=60))) for _ in range(10_000)]
    write(tmp_path / name, rows)
    size = estimate(settings_of(tmp_path / name))
    # The uncompressed size of a compressed file is extrapolated from some of its blocks.
    tolerance = {".gz": 0.2, ".zst": 0.2}.get(Path(name).suffix, 0.01)
    assert size.documents == pytest.approx(10_000, rel=tolerance)
    assert size.mean_tokens == pytest.approx(60 / BYTES_PER_TOKEN + MESSAGE_TOKENS, rel=0.03)


def test_a_csv_file_is_extrapolated_with_its_mapped_columns(tmp_path):
    lines = 50_000 * f'{"q" * 34},"a\n{"b" * 34}"\n'  # rows of two lines with 70 bytes of text
    (tmp_path / "f.csv").write_text(f"question,completion\n{lines}")
    size = estimate(settings_of(tmp_path / "f.csv", columns={"prompt": "question"}))
    assert size.documents == pytest.approx(50_000, rel=0.01)
    assert size.mean_tokens == pytest.approx(70 / BYTES_PER_TOKEN, rel=0.03)


MESSAGE = {"role": "assistant", "content": "x" * 35}
FORMATS = [  # a row and its estimated tokens
    ({"conversations": [{"from": "gpt", "value": "x" * 35}]}, 15),
    ({"instruction": "x" * 35, "input": "", "output": "y" * 35}, 30),
    ({"prompt": [MESSAGE], "completion": [MESSAGE]}, 30),
    ({"text": "x" * 35}, 10),
    ({"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, 3),
    ({"messages": [MESSAGE | {"content": [{"type": "text", "text": "x" * 35}]}]}, 15),
    # the tools are 110 bytes of JSON
    ({"messages": [MESSAGE], "tools": [{"name": "f", "parameters": {"x": "y" * 35}}]}, 46),
]


@pytest.mark.parametrize(("row", "tokens"), FORMATS)
def test_the_tokens_of_every_row_format_are_estimated(tmp_path, row, tokens):
    write(tmp_path / "f", [row])
    assert estimate(settings_of(tmp_path / "f")).tokens == tokens


def test_folders_globs_limits_weights_and_held_out_rows_change_the_estimate(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.jsonl", ROWS)  # 1000 rows each
    one_file = estimate(settings_of(tmp_path / "0.jsonl"))
    assert estimate(settings_of(tmp_path)).documents == 3000
    assert estimate(settings_of(f"{tmp_path}/[12].jsonl")).documents == 2000
    source = {"path": str(tmp_path), "limit": 500, "weight": 0.5}
    size = estimate(settings_of(source, tmp_path / "0.jsonl"))
    assert size.documents == 0.5 * 500 + 1000
    assert size.tokens == pytest.approx(1.25 * one_file.tokens, rel=0.001)
    assert estimate(settings_of(tmp_path, eval_data=0.1)).documents == 2700
    assert estimate(settings_of(tmp_path, eval_data=100)).documents == 2900
    assert estimate(settings_of(tmp_path, eval_data=3000)) is None  # no row is left to train on


def test_only_some_of_many_files_are_read(tmp_path):
    for i in range(200):
        write(tmp_path / f"{i}.jsonl", ROWS[:10])
    size = estimate(settings_of(tmp_path))
    assert size.documents == pytest.approx(2000, rel=0.01)
    assert size.longest is None


@pytest.mark.parametrize(
    ("over_length", "documents", "tokens"),
    [("truncate", 2, 300 + 10), ("drop", 1, 10), ("split", 4 + 1, 1000 + 10)],
)
def test_over_length_changes_documents_and_tokens(tmp_path, over_length, documents, tokens):
    texts = ["x" * 3500, "x" * 35]  # 1000 and 10 tokens
    write(tmp_path / "f", [{"text": text} for text in texts])
    size = estimate(settings_of(tmp_path / "f", max_length=300, over_length=over_length))
    assert (size.documents, size.tokens) == (documents, tokens)


def test_a_parquet_file_is_estimated_without_torch_and_datasets(tmp_path):
    write(tmp_path / "f.parquet", ROWS)
    code = (
        "import sys\n"
        "from pipeline.config.settings import RunSettings\n"
        "from pipeline.plan.estimate import estimate\n"
        f"settings = RunSettings(model='m', output_dir='o', train_data={str(tmp_path)!r})\n"
        "assert estimate(settings).documents == 1000\n"
        "print({'torch', 'datasets', 'pandas', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize("name", ["missing.jsonl", "org/name:train", "a\0b"])
def test_a_name_without_a_file_has_no_estimate(name):
    assert estimate(settings_of(name)) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"a": 1}\n[]\n{"prompt": "p"}\n',  # no row in a known format
        json.dumps(chat("q")).encode("utf-16"),
        gzip.compress(b"x" * 1000, mtime=0)[:-9],  # truncated
        gzip.compress(b"PAR1" * 1000, mtime=0),  # compressed parquet would be read completely
    ],
    ids=["empty", "unknown rows", "UTF-16", "truncated gzip", "compressed parquet"],
)
def test_a_file_without_readable_rows_has_no_estimate(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    assert estimate(settings_of(tmp_path / "f")) is None


def test_an_empty_folder_and_a_pipe_have_no_estimate(tmp_path):
    assert estimate(settings_of(tmp_path)) is None
    os.mkfifo(tmp_path / "pipe")
    assert estimate(settings_of(tmp_path / "pipe")) is None


SHORT_ROW = {"text": "x" * int(100 * BYTES_PER_TOKEN)}  # 100 tokens
LONG_ROW = {"text": "x" * int(1000 * BYTES_PER_TOKEN)}  # 1000 tokens


@pytest.mark.parametrize(
    ("over_length", "lost_tokens", "length_that_keeps_99_percent"),
    [
        # 1 % of the 38,000 tokens are 380; from 20 long documents, 19 tokens each may be cut.
        ("truncate", 20 * (1000 - 300), 981),
        ("drop", 20 * 1000, 1000),
        ("split", 0, 1000),
    ],
)
def test_tokens_lost_because_of_max_length_are_estimated_from_the_sample(
    tmp_path, over_length, lost_tokens, length_that_keeps_99_percent
):
    write(tmp_path / "f", [SHORT_ROW] * 90 + [LONG_ROW] * 10)
    source = {"path": str(tmp_path / "f"), "weight": 2}  # each document twice
    length_loss = estimate(settings_of(source, max_length=300, over_length=over_length)).length_loss
    assert (length_loss.documents, length_loss.longer) == (200, 20)
    assert length_loss.tokens == 180 * 100 + 20 * 1000
    assert length_loss.lost == lost_tokens
    assert length_loss.keeps_99 == length_that_keeps_99_percent
    assert length_loss.keeps_all == 1000


@pytest.mark.parametrize("over_length", ["truncate", "drop", "split"])
def test_tokens_lost_because_of_max_length_are_those_of_training_rows(tmp_path, over_length):
    """40 of the 100 rows are used, 8 of these are held out, and half of the rows are long."""
    write(tmp_path / "f", [SHORT_ROW, LONG_ROW] * 50)
    source = {"path": str(tmp_path / "f"), "limit": 40}
    size = estimate(settings_of(source, max_length=300, eval_data=8, over_length=over_length))
    assert (size.length_loss.documents, size.length_loss.longer) == (32, 16)
