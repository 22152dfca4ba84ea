"""Paths of a run file are resolved to data files.

Caches, run folders and files of other splits are left out, and a note names each of them.
"""

import gzip
import json
import subprocess

import pytest

from pipeline.errors import UserError
from pipeline.rows.files import find_files
from pipeline.rows.sources import BadRow
from tests.messages import assert_mentions, refused
from tests.rows.read import read_file, resolved

pytestmark = pytest.mark.unit

ROW = '{"prompt": "a", "completion": "b"}\n'


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROW)


def files_and_notes(path, key="train_data"):
    """The files of a folder as relative paths, and the notes about files that are left out."""
    (source,) = resolved(path, key=key)
    return [str(file.relative_to(path)) for file in source.files], source.notes


@pytest.mark.parametrize("held_out", ["test", "validation", "dev", "valid", "eval", "heldout"])
@pytest.mark.parametrize(
    "name",
    ["{}.jsonl", "{}/0.jsonl", "{}-00000-of-00002.jsonl", "data_{}.jsonl", "{}.en.jsonl.gz"],
)
def test_files_of_other_splits_in_a_training_folder_are_left_out_with_a_note(
    tmp_path, held_out, name
):
    train, other = name.format("train"), name.format(held_out)
    write(tmp_path, train, other, "more.jsonl")
    files, (note,) = files_and_notes(tmp_path)
    assert files == sorted([train, "more.jsonl"])
    assert_mentions(note, tmp_path, other.rpartition("/")[2])
    # A file that the run file itself names is read.
    assert resolved(tmp_path / other)[0].files == (tmp_path / other,)


def test_a_split_name_inside_a_word_does_not_leave_a_file_out(tmp_path):
    write(tmp_path, "latest.jsonl", "my-test-cases.jsonl", "contest/0.jsonl", "devices.jsonl")
    files, notes = files_and_notes(tmp_path)
    assert len(files) == 4
    assert not notes


def test_eval_data_is_the_validation_split_else_test_else_all_files(tmp_path):
    write(tmp_path, "train.jsonl", "test.jsonl")
    assert files_and_notes(tmp_path, "eval_data")[0] == ["test.jsonl"]
    write(tmp_path, "dev.jsonl")
    assert files_and_notes(tmp_path, "eval_data")[0] == ["dev.jsonl"]
    write(tmp_path / "plain", "a.jsonl")
    assert files_and_notes(tmp_path / "plain", "eval_data")[0] == ["a.jsonl"]


def test_a_training_folder_with_only_other_splits_is_refused(tmp_path):
    write(tmp_path / "data", "test.jsonl", "dev.jsonl")
    with refused("train_data", tmp_path / "data", "test.jsonl", "name the file itself"):
        resolved(tmp_path / "data")


def save(folder, *names, **state):
    """Write a folder as `Dataset.save_to_disk` does, with a state.json that names its files."""
    write(folder, *names)
    files = [{"filename": name} for name in names if not name.startswith("cache")]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, **state}))


def test_only_files_in_the_state_of_a_saved_data_set_are_read(tmp_path):
    save(tmp_path, "data-0.arrow", "cache-1.arrow")
    write(tmp_path, "stray.jsonl")
    files, (note,) = files_and_notes(tmp_path)
    assert files == ["data-0.arrow"]
    assert_mentions(note, "cache-1.arrow", "stray.jsonl")


def test_only_the_train_split_of_a_saved_data_set_is_trained_on(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split, "data-0.arrow")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert files_and_notes(tmp_path)[0] == ["train/data-0.arrow"]


def test_an_incomplete_saved_data_set_is_refused(tmp_path):
    save(tmp_path, "data-0.arrow", "data-1.arrow")
    (tmp_path / "data-1.arrow").unlink()
    with refused("train_data", tmp_path, "data-1.arrow", "state.json"):
        resolved(tmp_path)


def test_a_data_set_that_an_old_version_of_datasets_saved_with_indices_is_refused(tmp_path):
    """An old `save_to_disk` wrote all rows, and a file with the indices of the selected rows."""
    save(tmp_path, "data-0.arrow", _indices_data_files=[{"filename": "indices.arrow"}])
    with refused("train_data", tmp_path, "flatten_indices"):
        resolved(tmp_path)


def test_files_with_other_suffixes_in_a_folder_are_named(tmp_path):
    write(tmp_path, "a.jsonl", "b.jsonl.bak", "c.txt", "README.md", "LICENSE", ".d.jsonl")
    files, (note,) = files_and_notes(tmp_path)
    assert files == ["a.jsonl"]
    assert_mentions(note, "b.jsonl.bak, c.txt", "skipped")
    assert "README" not in note


def test_a_link_to_a_missing_file_is_refused_with_its_target(tmp_path):
    write(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with refused("train_data", tmp_path / "b.jsonl", tmp_path / "gone.jsonl", "does not exist"):
        resolved(tmp_path)


def test_caches_are_left_out_of_folders_and_globs(tmp_path):
    write(tmp_path, "rows.arrow", "cache-1.arrow")
    assert files_and_notes(tmp_path)[0] == ["rows.arrow"]
    (source,) = resolved(tmp_path / "*.arrow")
    assert source.files == (tmp_path / "rows.arrow",)
    assert_mentions(source.notes[0], "cache-1.arrow")


# State of a run -> files in its folder by which the folder is known as that of a run.
RUN_FOLDERS = {
    "running": [".owner", "metrics.jsonl"],
    "done": ["run.yaml", "status.json", "metrics.jsonl"],
    "prepared": ["data/index.json", "data/audit.json", "data/rejects.jsonl"],
    "killed while preparing": ["data/train-0123456789abcdef/rejects.jsonl"],
}


@pytest.mark.parametrize("state", RUN_FOLDERS)
def test_files_in_run_folders_are_not_data(tmp_path, state):
    write(tmp_path, "rows.jsonl")
    write(tmp_path / "runs/x", *RUN_FOLDERS[state])
    files, (note,) = files_and_notes(tmp_path)
    assert files == ["rows.jsonl"]
    assert_mentions(note, "x")
    (source,) = resolved(tmp_path / "**/*.jsonl")
    assert source.files == (tmp_path / "rows.jsonl",)
    with refused("train_data", tmp_path / "runs/x", "run folder"):
        resolved(tmp_path / "runs/x")
    with refused("train_data", "run folders"):
        resolved(tmp_path / "runs/x/**/*.jsonl")


def test_a_user_s_rows_in_the_folder_of_prepared_data_are_read_without_its_other_files(tmp_path):
    """A user may keep rows in OUTPUT_DIR/data, where prepare writes its files."""
    files_of_prepare = ["index.json", "audit.json", "fingerprints.json", "rejects.jsonl"]
    write(
        tmp_path / "data", "rows.jsonl", *files_of_prepare, "train-0123456789abcdef/rejects.jsonl"
    )
    files, (note,) = files_and_notes(tmp_path / "data")
    assert files == ["rows.jsonl"]
    assert_mentions(note, "audit.json")
    (source,) = resolved(tmp_path / "data/**/*.json*")
    assert source.files == (tmp_path / "data/rows.jsonl",)
    with refused("train_data", tmp_path, "run folder"):
        resolved(tmp_path)


def test_a_file_with_rejected_rows_is_not_read_as_data(tmp_path):
    """If prepare refuses the data, rejects.jsonl is the only file that it writes."""
    write(tmp_path, "rows.jsonl", "runs/x/data/rejects.jsonl")
    files, (note,) = files_and_notes(tmp_path)
    assert files == ["rows.jsonl"]
    assert_mentions(note, "rejects.jsonl")
    (source,) = resolved(tmp_path / "**/*.jsonl")
    assert source.files == (tmp_path / "rows.jsonl",)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a b.jsonl", "rows.json", "rows"])
def test_other_encodings_are_refused_with_the_command_that_converts_them(tmp_path, encoding, name):
    (tmp_path / name).write_bytes(ROW.encode(encoding))
    with pytest.raises(UserError) as caught:
        read_file(tmp_path / name)
    iconv_name = {"utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE"}.get(encoding, encoding)
    assert_mentions(caught.value, tmp_path / name, iconv_name)
    command = str(caught.value).partition("convert it: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert [row.value for row in read_file(tmp_path / name)] == [json.loads(ROW)]


BOM = "\ufeff"
# Name of a file -> text of two rows with byte order marks, as of concatenated files.
WITH_BOMS = {
    "rows.jsonl": f"{BOM}{BOM}{ROW}{BOM}{ROW}",
    "rows.json": f"{BOM}{BOM}{ROW}{BOM}{ROW}",
    "rows": f"{BOM}{BOM}{ROW}{BOM}{ROW}",
    "list.json": f"{BOM}{BOM}[{ROW},{BOM}{ROW}]",
    "rows.csv": f"{BOM}{BOM}prompt,completion\n{BOM}a,b\n{BOM}a,b\n",
}


@pytest.mark.parametrize("name", WITH_BOMS)
def test_byte_order_marks_at_the_start_of_lines_are_ignored(tmp_path, name):
    (tmp_path / name).write_text(WITH_BOMS[name], encoding="utf-8")
    assert [row.value for row in read_file(tmp_path / name)] == [json.loads(ROW)] * 2


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_header_of_a_csv_file_sets_its_delimiter(tmp_path, delimiter):
    """The fields have the other delimiters, quotes and a line break."""
    header, rows = ["prompt", "completion"], [['a;b,c\td"\n', "1,5;"], ["q", "a"]]

    def quoted(field):
        return '"' + field.replace('"', '""') + '"'

    lines = [delimiter.join(map(quoted, row)) + "\r\n" for row in rows]
    text = delimiter.join(header) + "\n\n" + "".join(lines)
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8")
    rows_read = [row.value for row in read_file(tmp_path / "rows.csv")]
    assert rows_read == [dict(zip(header, row, strict=True)) for row in rows]


def test_a_repeated_header_in_a_csv_file_is_a_bad_row(tmp_path):
    text = "prompt,completion\na,b\n"
    (tmp_path / "rows.csv").write_text(text + BOM + text, encoding="utf-8")
    rows = read_file(tmp_path / "rows.csv")
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False]
    assert_mentions(rows[1].reason, "header")


@pytest.mark.parametrize("delimiter", [";", ",", "|"])
def test_the_sep_line_of_excel_sets_the_delimiter_and_is_not_the_header(tmp_path, delimiter):
    lines = [f"sep={delimiter}", delimiter.join(("prompt", "completion")), f"q{delimiter}a", "bad"]
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(f"{line}\r\n" for line in lines).encode())
    row, bad = read_file(path)
    assert (row.value, row.line) == ({"prompt": "q", "completion": "a"}, 3)
    assert bad.line == 4


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_text_in_windows_1252_is_refused_with_the_command_that_converts_it(tmp_path, name):
    text = {"rows.csv": "prompt,completion\ncafé,a\n", "rows.jsonl": '{"prompt": "café"}\n'}[name]
    path = tmp_path / name
    path.write_bytes(text.encode("cp1252"))
    (bad,) = read_file(path)
    assert_mentions(bad.reason, "UTF-8", "iconv", "WINDOWS-1252")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "kind", "remedy"),
    [
        (LFS_POINTER, "Git LFS", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "HTML", "download"),
        (b"\n  <HTML><body>", "HTML", "download"),
        (b'<?xml version="1.0"?><Error>', "XML", "download"),
        (b"PK\x03\x04" + bytes(40), "ZIP", "unpack"),
        (b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(range(99)), "7-Zip", "unpack"),
        (b"Rar!\x1a\x07\x01\x00" + bytes(40), "RAR", "unpack"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(40), ".xls", "CSV"),
        (gzip.compress(gzip.compress(b'{"text": "t"}')), "twice", "decompress"),
    ],
)
@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet", "t.csv"])
def test_a_file_that_holds_no_rows_is_refused_with_what_it_is(
    tmp_path, name, content, kind, remedy
):
    (tmp_path / name).write_bytes(content)
    with refused(tmp_path / name, kind, remedy):
        read_file(tmp_path / name)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.tar", "t"])
@pytest.mark.parametrize("content", [b"rows.jsonl" + bytes(500), b"\x93NUMPY\x01\x00v\x00 "])
def test_binary_data_of_an_unknown_format_is_refused_as_binary(tmp_path, name, content):
    """The text of such a file would be rejected with advice about its encoding or its name."""
    for compress in (bytes, gzip.compress):
        (tmp_path / name).write_bytes(compress(content))
        with refused(tmp_path / name, "binary", "unpack", ".parquet"):
            read_file(tmp_path / name)


def test_zero_bytes_in_a_json_file_damage_only_their_lines(tmp_path):
    """A power cut may leave a block of zero bytes in a file."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\0" * 100 + b'\n{"text": "a"}\n')
    damaged, row = read_file(path)
    assert isinstance(damaged, BadRow)
    assert row.value == {"text": "a"}


@pytest.mark.parametrize("name", ["t.zip", "t.xlsx", "t.txt", "t"])
def test_text_of_an_unknown_format_is_refused_with_advice_that_can_help(tmp_path, name):
    (tmp_path / name).write_text("a\tb\nc\td\n")
    with refused(tmp_path / name, "unknown format", "*.csv", "convert it to JSONL"):
        read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("t.jsonl", ['{"text": "a"}', '{"text": "b"}']),
        ("t.csv", ["text", "a", "b"]),
    ],
)
def test_lines_that_end_with_cr_alone_are_refused_with_the_command_that_converts_them(
    tmp_path, name, lines
):
    path = tmp_path / name
    path.write_bytes("".join(f"{line}\r" for line in lines).encode())
    with refused(path, "CR", "tr '\\r' '\\n'") as error:
        read_file(path)
    command = str(error.value).partition("convert it: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert [row.value for row in read_file(path)] == [{"text": "a"}, {"text": "b"}]


def test_a_row_that_ends_with_cr_and_has_no_other_line_is_read(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "a"}\r')
    assert [row.value for row in read_file(tmp_path / "t.jsonl")] == [{"text": "a"}]


@pytest.mark.parametrize("rest", [b"{}", b'{"text": "b"}\n' * 9])
def test_other_bytes_after_gzip_data_are_refused(tmp_path, rest):
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n') + rest)
    with refused(tmp_path / "t.jsonl.gz", "followed by other bytes", "gzip -dc"):
        read_file(tmp_path / "t.jsonl.gz")


def test_a_note_has_the_folders_of_left_out_files_with_the_same_name(tmp_path):
    for split in ("train", "test", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.jsonl").write_text('{"text": "x"}\n')
    (source,) = resolved(tmp_path)
    assert_mentions(" ".join(source.notes), "test/0.jsonl", "validation/0.jsonl")


@pytest.mark.parametrize(("key", "split"), [("train_data", "train"), ("eval_data", "test")])
def test_several_training_or_test_splits_are_refused_with_their_names(tmp_path, key, split):
    """`saved` is a folder of `DatasetDict.save_to_disk`, `hub` a folder of a hub data set."""
    saved, hub = tmp_path / "saved", tmp_path / "hub"
    for name in ("train_sft", "train_gen", "test_sft", "test_gen"):
        (saved / name).mkdir(parents=True)
        (saved / name / "data-00000-of-00001.arrow").write_bytes(b"x")
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (saved / name / "state.json").write_text(json.dumps(state))
        (hub / "data").mkdir(parents=True, exist_ok=True)
        for shard in range(2):
            (hub / "data" / f"{name}-0000{shard}-of-00002.parquet").write_bytes(b"x")
    (saved / "dataset_dict.json").write_text("{}")
    with refused(key, f"{split}_gen, {split}_sft", saved / f"{split}_gen"):
        find_files(str(saved), key)
    with refused(key, f"{split}_gen, {split}_sft", hub / "data" / f"{split}_gen-*"):
        find_files(str(hub), key)
    assert len(find_files(str(hub / "data" / f"{split}_sft-*"), key).files) == 2
    assert len(find_files(str(saved / f"{split}_sft"), key).files) == 1


def test_several_files_of_the_training_split_are_all_read(tmp_path):
    for name in ("train_math.jsonl", "train_code.jsonl", "a/train-00000-of-00001.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert len(find_files(str(tmp_path), "train_data").files) == 3
