"""A JSON file that has a table in one object is refused with a command that converts it to rows.

LAYOUTS are the forms in which pandas, `datasets` and the dataset viewer of the hub export a table.
"""

import json
import re
import subprocess

import pandas
import pytest

from pipeline.rows.sources import Row
from tests.messages import refused
from tests.rows.read import read_file

pytestmark = pytest.mark.unit

ROWS = [
    {"id": i, "messages": [{"role": "user", "content": f"q {i}"},
                           {"role": "assistant", "content": f'a "{i}" {{'}]}
    for i in range(3)
]  # fmt: skip
TEXTS = [{"prompt": f"q {i}", "completion": f"a é {i}"} for i in range(3)]


def pandas_export(orient):
    return lambda rows: json.loads(pandas.DataFrame(rows).to_json(orient=orient))


LAYOUTS = {
    "split": pandas_export("split"),
    "index": pandas_export("index"),
    "columns": pandas_export("columns"),
    "table": pandas_export("table"),
    "list": lambda rows: {key: [row[key] for row in rows] for key in rows[0]},
    "data": lambda rows: {"data": rows},
    "version": lambda rows: {"version": "1.0", "meta": {"n": [1]}, "data": rows},
    "rows": lambda rows: {"rows": rows},
    "viewer": lambda rows: {"features": [], "rows": [{"row_idx": 0, "row": row} for row in rows]},
    "splits": lambda rows: {"train": rows, "test": rows[:1]},
    "ids": lambda rows: {f"id-{i}": row for i, row in enumerate(rows)},
}


@pytest.mark.parametrize("name", ["export.json", "export.jsonl", "export with space.json"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_table_in_one_object_is_refused_with_a_command_that_writes_its_rows(
    tmp_path, layout, indent, name
):
    # A "list" of conversations is a valid row: its messages are a list.
    rows = ROWS if layout != "list" else TEXTS
    path = tmp_path / name
    path.write_text(json.dumps(LAYOUTS[layout](rows), indent=indent))
    with refused(name, "convert it", "python -c") as caught:
        read_file(path)
    (command,) = re.findall(r"python -c .*", str(caught.value))
    subprocess.run(command, shell=True, check=True)
    converted = read_file(tmp_path / f"{name}.rows.jsonl")
    for row, expected in zip(converted, rows, strict=True):
        assert expected.items() <= row.value.items()  # some layouts add a column for the index


@pytest.mark.parametrize("padding_characters", [10, 200_000])
@pytest.mark.parametrize(
    "row",
    [
        {"data": [{"x": 1}]},
        {"train": [{"x": 1}], "note": "n"},
        {"0": {"x": 1}},
        {"messages": [{"role": "user", "content": "q"}], "data": [{"x": 1}]},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "a"}]},
        {"text": "a { b [ c"},
    ],
)
def test_several_objects_are_rows_even_if_they_resemble_tables(tmp_path, row, padding_characters):
    """A table has one object. The second object may be beyond the first block of the file."""
    padding_column = "messages" if "0" in row else "padding"
    row = {**row, padding_column: {"x": "y" * padding_characters}}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(2)))
    assert [type(result) for result in read_file(path)] == [Row, Row]
    assert [result.value for result in read_file(path)] == [row, row]


@pytest.mark.parametrize("row", [ROWS[0], TEXTS[0], {"text": "t"}, {"a": 1}, {"q": {"x": 1}}, {}])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_of_one_row_is_not_taken_for_a_table(tmp_path, row, indent):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(row, indent=indent))
    assert [result.value for result in read_file(path)] == [row]
