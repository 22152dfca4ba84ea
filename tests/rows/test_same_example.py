"""A conversation gives the same example from every file format and layout."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rows.read import examples_of, read_file

pytestmark = pytest.mark.unit

text = st.text(alphabet='ab "{\n\\é😀', min_size=1, max_size=8).filter(str.strip)
arguments = st.fixed_dictionaries(
    {}, optional={"city": text, "days": st.integers(0, 9), "in": st.just({"unit": "C"})}
)


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(text)})
        answer = {"role": "assistant", "content": draw(text)}
        if draw(st.booleans()):
            answer["reasoning_content"] = draw(text)
        if draw(st.booleans()):
            call = {"name": draw(st.sampled_from("fg")), "arguments": draw(arguments)}
            answer["tool_calls"] = [{"id": f"c{turn}", "type": "function", "function": call}]
            messages += [answer, {"role": "tool", "content": "r", "tool_call_id": f"c{turn}"}]
            answer = {"role": "assistant", "content": draw(text)}
        messages.append(answer)
    properties = {name: {"type": "string"} for name in draw(st.sets(st.sampled_from("xyz")))}
    schema = {"type": "object", "properties": properties}
    return {"messages": messages, "tools": [{"name": "f", "parameters": schema}]}


# A row with every key: in a table, the other rows get nulls for the keys that they lack.
ROW_WITH_ALL_KEYS = {
    "messages": [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "r",
            "tool_calls": [
                {
                    "id": "c",
                    "type": "function",
                    "function": {
                        "name": "f",
                        "arguments": {"city": "c", "days": 1, "in": {"unit": "C"}},
                    },
                }
            ],
        },
        {"role": "tool", "content": "r", "tool_call_id": "c", "name": "f"},
    ],
    "tools": [
        {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {name: {"type": "string", "default": "d"} for name in "xyz"},
            },
        }
    ],
    "images": ["x.png"],
}


def as_json_text(rows):
    """The rows with JSON text in each column."""
    return [{key: json.dumps(value) for key, value in row.items()} for row in rows]


def as_structs_of_lists(rows):
    """The rows with {key: [value, ...]} instead of [{key: value}, ...] in each column."""

    def struct_of_lists(items):
        keys = dict.fromkeys(key for item in items for key in item)
        return {key: [item.get(key) for item in items] for key in keys}

    return [{column: struct_of_lists(items) for column, items in row.items()} for row in rows]


def with_json_type(rows):
    """A table with messages and tools as lists of JSON text of the extension type `arrow.json`."""
    columns = {}
    for name in ("messages", "tools"):
        texts, offsets = [], [0]
        for row in rows:
            texts += map(json.dumps, row[name])
            offsets.append(len(texts))
        values = json_values(texts)
        columns[name] = pyarrow.ListArray.from_arrays(pyarrow.array(offsets, "int32"), values)
    return pyarrow.table(columns)


def json_values(texts):
    """An Arrow array of the extension type `arrow.json`."""
    storage = pyarrow.array(texts, pyarrow.string())
    return pyarrow.ExtensionArray.from_storage(pyarrow.json_(pyarrow.string()), storage)


def with_nulls(rows):
    """The rows with nulls for missing keys, as `Dataset.to_json` exports them."""
    *rows_with_nulls, _row_with_all_keys = pyarrow.Table.from_pylist(
        [*rows, ROW_WITH_ALL_KEYS]
    ).to_pylist()
    return rows_with_nulls


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_saved(folder, table):
    """Write a folder as `Dataset.save_to_disk` does, with a cache file that must not be read."""
    folder.mkdir()
    for name in ("data-00000-of-00001.arrow", "cache-1.arrow"):
        with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))


def write_arrow(path, table):
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


def write_all_formats(folder, rows):
    """Write the same rows in every file format and layout."""
    table = pyarrow.Table.from_pylist([*rows, ROW_WITH_ALL_KEYS]).slice(0, len(rows))
    write_lines(folder / "plain.jsonl", rows)
    write_lines(folder / "exported.jsonl", with_nulls(rows))
    (folder / "list.json").write_text(json.dumps(rows, indent=1))
    (folder / "exported.json").write_text(json.dumps(with_nulls(rows)))
    pyarrow.parquet.write_table(table, folder / "table.parquet")
    write_arrow(folder / "table.arrow", table)
    write_saved(folder / "saved", table)
    write_lines(folder / "text.jsonl", as_json_text(rows))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(as_json_text(rows)), folder / "text.parquet"
    )
    write_lines(folder / "structs.jsonl", as_structs_of_lists(rows))
    pyarrow.parquet.write_table(with_json_type(rows), folder / "json_type.parquet")
    write_arrow(folder / "json_type.arrow", with_json_type(rows))


@given(st.lists(conversations(), min_size=1, max_size=3))
def test_every_format_of_the_same_rows_gives_the_same_examples(rows):
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_all_formats(folder, rows)
        expected = examples_of(folder / "plain.jsonl")
        assert len(expected) == len(rows)
        for path in sorted(folder.iterdir()):
            assert examples_of(path) == expected, path.name


def test_files_written_by_datasets_give_the_same_examples_as_the_rows_that_it_loaded(tmp_path):
    """The key `default` has three types of values, which `datasets` stores as its Json type."""
    parameters = {
        "text": {"default": "home"}, "number": {"default": 2}, "object": {"default": {"a": 1}}
    }  # fmt: skip
    rows = [
        {
            "messages": [
                {"role": "user", "content": name},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"name": "f", "arguments": {"value": parameter["default"]}}],
                },
            ],
            "tools": [{"name": "f", "parameters": {"properties": {"value": parameter}}}],
        }
        for name, parameter in parameters.items()
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    code = (
        "from datasets import load_dataset\n"
        "rows = load_dataset('json', data_files='rows.jsonl', split='train', cache_dir='cache')\n"
        "rows.to_parquet('rows.parquet')\n"
        "rows.save_to_disk('saved')\n"
        "rows.to_json('exported.jsonl')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    expected = examples_of(tmp_path / "rows.jsonl")
    for name in ("rows.parquet", "saved", "exported.jsonl"):
        assert examples_of(tmp_path / name) == expected, name
    schema = pyarrow.parquet.read_schema(tmp_path / "rows.parquet")
    assert "arrow.json" in str(schema.field("tools").type)


def test_values_of_the_json_type_are_decoded_in_structs_and_maps(tmp_path):
    values = json_values(['{"a": [1]}', "7", None, '"x"'])
    offsets = pyarrow.array([0, 1, 2, 3, 4], "int32")
    keys = pyarrow.array(["k"] * 4)
    table = pyarrow.table(
        {
            "plain": values,
            "struct": pyarrow.StructArray.from_arrays([values], ["inner"]),
            "map": pyarrow.MapArray.from_arrays(offsets, keys, values),
        }
    )
    write_arrow(tmp_path / "t.arrow", table)
    rows_read = [row.value for row in read_file(tmp_path / "t.arrow")]
    for row, expected in zip(rows_read, [{"a": [1]}, 7, None, "x"], strict=True):
        assert row == {"plain": expected, "struct": {"inner": expected}, "map": {"k": expected}}
