"""YAML and JSON files: the line number of each key, and one short message for any invalid text.

The path of a key is a tuple of the keys and list positions that lead to it.
"""

from pathlib import Path

import pytest

from pipeline.config.located import parse_value, read_located
from pipeline.errors import UserError
from tests.messages import refused

pytestmark = pytest.mark.unit


@pytest.fixture
def read(tmp_path):
    """Function that writes this text to a file and reads it as YAML or JSON."""

    def write_and_read(text, syntax="YAML"):
        path = tmp_path / "FILE"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_located(path, syntax)

    return write_and_read


YAML = """
# a comment
lr: 3e-4
train_data:
  - path: a
    weight: 2
  - {path: b,
     weight: 3}
"""
JSON = '{\n\t"bf16": {"enabled":true},\n\t"zero": [\n {"a":\n1}, {\n"a": 5e8}]\n}'


def test_lines_of_yaml_keys_at_every_depth(read):
    assert read(YAML).lines == {
        ("lr",): 3,
        ("train_data",): 4,
        ("train_data", "0", "path"): 5,
        ("train_data", "0", "weight"): 6,
        ("train_data", "1", "path"): 7,
        ("train_data", "1", "weight"): 8,
    }


def test_lines_of_json_keys_at_every_depth(read):
    located = read(JSON, "JSON")
    assert located.values == {"bf16": {"enabled": True}, "zero": [{"a": 1}, {"a": 5e8}]}
    assert located.lines == {
        ("bf16",): 2,
        ("bf16", "enabled"): 2,
        ("zero",): 3,
        ("zero", "0", "a"): 4,
        ("zero", "1", "a"): 6,
    }
    assert located.location("bf16", "enabled").endswith("FILE:2")


@pytest.mark.parametrize(
    "text",
    ['{"a": "\\u00e9\\/\\n"}', '{"a":-0.5E-3,"b":[],"c":{}}', '\ufeff{"a": null}', '{"": 1}', "{}"],
)
def test_json_values_equal_those_of_the_json_module(read, text):
    import json

    assert read(text, "JSON").values == json.loads(text.removeprefix("\ufeff"))


@pytest.mark.parametrize("text", ['{"a": 1,}', "{a: 1}", "{'a': 1}", "a: 1", '{"a": yes}', "// {}"])
def test_yaml_that_is_not_json_is_refused_as_json(read, text):
    with refused("FILE:1", "JSON"):
        read(text, "JSON")


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        ("YAML", "b: 1\nb: 2\n"),
        ("YAML", "a: [{b: 1,\nb: 2}]"),
        ("JSON", '{"b": 1,\n"b": 2}'),
        ("JSON", '{"a": {"b": 1,\n"b": 2}}'),
    ],
)
def test_a_key_given_twice_is_refused_at_every_depth(read, syntax, text):
    with refused("FILE:2", "b", "twice", "line 1"):
        read(text, syntax)


def nested_aliases(count: int, levels: int) -> str:
    """YAML of a few lines whose last list has `count` ** `levels` values after expansion.

    The list of each level has `count` aliases of the list of the level before.
    """
    lines = ["l0: &l0 [" + ",".join("x" * count) + "]"]
    for level in range(1, levels):
        items = ",".join([f"*l{level - 1}"] * count)
        lines.append(f"l{level}: &l{level} [{items}]")
    return "\n".join(lines)


INVALID = {
    "deeply nested lists without end": "a: " + "[" * 5000,
    "deeply nested lists": "a: " + "[" * 5000 + "]" * 5000,
    "deeply nested mappings": "\n".join(" " * i + "a:" for i in range(500)),
    "a long number": "a: " + "7" * 20_000,
    "a negative number beyond 64 bits": "a: -" + "7" * 20,
    "aliases of aliases": nested_aliases(9, 9),
    "an alias of itself": "a: &x [*x]",
    "an alias of itself in a mapping": "a: &x {b: *x}",
    "a NUL": b"a: b\0c",
    "a NUL by its escape": 'a: "b\\0c"',
    "a surrogate": 'a: "\\ud800"',
    "a tag": "a: !!python/object/apply:os.system [ls]",
    "a tag that fails to convert": "a: !!int abc",
    "a tag of time": "a: !!timestamp abc",
    "a key that is a list": "? [a]\n: 1",
    "a key that is null": "~: 1",
    "a key that is a number": "1: 1",
    "two documents": "a: 1\n---\na: 2",
    "UTF-16": "a: 1".encode("utf-16"),
    "Latin 1": b"a: caf\xe9",
    "a binary file": bytes(range(256)) * 10,
    "many values": "a: [" + "1," * 50_000 + "]",
    "a large file": b"#" * (2**20 + 1),
}


@pytest.mark.parametrize("text", INVALID.values(), ids=INVALID)
def test_invalid_yaml_gives_one_short_message(read, text):
    with pytest.raises(UserError) as error:
        read(text)
    message = str(error.value)
    assert "FILE" in message
    assert len(message) < 400
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("text", ["[" * 3000, "7" * 5000, "!!int x", '"\\0"', "{a: 1, a: "])
def test_an_invalid_value_on_the_command_line_gives_one_short_message(text):
    with pytest.raises(UserError) as error:
        parse_value(text, "command line")
    assert len(str(error.value)) < 200
    assert str(error.value).startswith("command line")


@pytest.mark.parametrize("text", ['{"a": ' + "[" * 100_000, '{"a": ' + "7" * 5000 + "}"])
def test_invalid_json_gives_one_short_message(read, text):
    with refused("FILE:1", "JSON"):
        read(text, "JSON")


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self/mem", "/", "no/such", "a\0b"])
def test_a_path_that_is_not_a_text_file_gives_one_short_message(path):
    with pytest.raises(UserError) as error:
        read_located(Path(path), "JSON")
    assert len(str(error.value)) < 200


def test_a_few_aliases_are_expanded(read):
    assert read("a: &x [1, 2]\nb: *x\nc: *x").values["c"] == [1, 2]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_run_file_in_utf_16_is_refused_with_the_command_that_converts_it(tmp_path, encoding):
    path = tmp_path / "RUN.yaml"
    path.write_bytes("\ufefflr: 1e-4\n".encode(encoding))
    with refused("RUN.yaml", "UTF-16", "iconv -f UTF-16 -t UTF-8"):
        read_located(path, "YAML")


def test_a_second_document_is_refused_in_a_whole_sentence(tmp_path):
    path = tmp_path / "RUN.yaml"
    path.write_text("a: 1\n---\nb: 2\n")
    with refused("RUN.yaml:2", "expected a single document", "found another"):
        read_located(path, "YAML")
