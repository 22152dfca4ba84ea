"""Tables in one JSON object are refused with a command, whose output is the rows."""

import json
import re
import subprocess

import pandas
import pytest

from pipeline.rows.sources import Row
from tests.messages import refused
from tests.rows.reading import read_file

pytestmark = pytest.mark.unit

ROWS = [
    {"id": i, "messages": [{"role": "user", "content": f"q {i}"},
                           {"role": "assistant", "content": f'a "{i}" {{'}]}
    for i in range(3)
]  # fmt: skip
TEXTS = [{"prompt": f"q {i}", "completion": f"a é {i}"} for i in range(3)]


def exported(orient):
    return lambda rows: json.loads(pandas.DataFrame(rows).to_json(orient=orient))


LAYOUTS = {
    "split": exported("split"),
    "index": exported("index"),
    "columns": exported("columns"),
    "table": exported("table"),
    "list": lambda rows: {key: [row[key] for row in rows] for key in rows[0]},
    "data": lambda rows: {"data": rows},
    "version": lambda rows: {"version": "1.0", "meta": {"n": [1]}, "data": rows},
    "rows": lambda rows: {"rows": rows},
    "viewer": lambda rows: {"features": [], "rows": [{"row_idx": 0, "row": r} for r in rows]},
    "splits": lambda rows: {"train": rows, "test": rows[:1]},
    "ids": lambda rows: {f"id-{i}": row for i, row in enumerate(rows)},
}


@pytest.mark.parametrize("name", ["export.json", "export.jsonl", "export with space.json"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_table_in_one_object_is_refused_with_the_command_for_its_rows(
    tmp_path, layout, indent, name
):
    rows = ROWS if layout != "list" else TEXTS
    path = tmp_path / name
    path.write_text(json.dumps(LAYOUTS[layout](rows), indent=indent))
    with refused(name, "convert it", "python -c") as caught:
        read_file(path)
    (command,) = re.findall(r"python -c .*", str(caught.value))
    subprocess.run(command, shell=True, check=True)
    found = read_file(tmp_path / f"{name}.rows.jsonl")
    assert [{key: f.value[key] for key in row} for f, row in zip(found, rows, strict=True)] == rows


@pytest.mark.parametrize("size", [10, 200_000])
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
def test_objects_that_others_follow_are_rows(tmp_path, row, size):
    row = {**row, "messages" if "0" in row else "padding": {"x": "y" * size}}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(2)))
    assert [type(found) for found in read_file(path)] == [Row, Row]
    assert [found.value for found in read_file(path)] == [row, row]


@pytest.mark.parametrize("row", [ROWS[0], TEXTS[0], {"text": "t"}, {"a": 1}, {"q": {"x": 1}}, {}])
@pytest.mark.parametrize("indent", [None, 2])
def test_one_row_is_a_row(tmp_path, row, indent):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(row, indent=indent))
    assert [found.value for found in read_file(path)] == [row]
