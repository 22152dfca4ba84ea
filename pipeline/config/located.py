"""Parse YAML and JSON files into values and the line number of each key.

PyYAML parses both formats into a tree of nodes with line numbers. In this tree duplicate keys and
excessive sizes are detected. Scalars follow YAML 1.2: `3e-4` is a number; `no` and `12:00:00` are
strings.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.errors import UserError

KeyPath = tuple[str, ...]  # of a nested key, such as ("train_data", "0", "path")

_MAX_BYTES = 2**20
_MAX_DEPTH = 16
_MAX_NODES = 20_000  # YAML nodes of a file after all aliases are expanded
_MAX_DIGITS = 18  # integers of 18 digits are below 2**63
_TAG = "tag:yaml.org,2002:"  # prefix of YAML's type names, such as tag:yaml.org,2002:int


@dataclass(frozen=True)
class Located:
    """Parsed text: its values, and the line number of each key path."""

    name: str
    values: dict[str, Any]
    lines: Mapping[KeyPath, int]

    def location(self, *key: str) -> str:
        """`name:line` of a key; only `name` if a YAML merge (`<<`) added the key."""
        return f"{self.name}:{self.lines[key]}" if key in self.lines else self.name


def read_located(path: Path, kind: Literal["YAML", "JSON"], *, label: str = "") -> Located:
    """Read a file that holds one mapping. Raises a UserError that names file and line.

    `label`: text before the path in messages.
    """
    name, content = f"{label}{path}", b""
    try:
        with path.open("rb") as stream:  # a device or a pipe may never end: limit the read
            content = stream.read(_MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or NUL in the path
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            source, target = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
            raise UserError(
                f"{name}: UTF-16 text, expected UTF-8; convert it: "
                f"iconv -f UTF-16 -t UTF-8 {source} > {target}"
            ) from None
        raise UserError(f"{name}: not a text file in UTF-8: {error}") from None
    if len(content) > _MAX_BYTES:
        raise UserError(f"{name}: larger than 1 MiB; a file with settings is smaller")
    node, values = _parse(text, name, kind)
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        example = "`key: value`, such as `lora_r: 16`" if kind == "YAML" else "a block in braces"
        raise UserError(f"{name}: expected {example}")
    return Located(name, values, _line_numbers(node, name))


def parse_value(text: str, name: str) -> Any:
    """Parse text as one YAML value. Raises a UserError whose message begins with `name`."""
    return _parse(text, name, "YAML")[1]


def _parse(text: str, name: str, kind: Literal["YAML", "JSON"]) -> tuple[yaml.Node | None, Any]:
    """The root node of the tree, whose nodes have line numbers, and the parsed value."""
    try:
        # JSON allows tabs as indentation, but YAML does not. JSON strings contain no raw tabs.
        loader = _Loader(text if kind == "YAML" else text.replace("\t", " "))
        node = loader.get_single_node()
        if kind == "JSON":
            return node, json.loads(text)
        return node, None if node is None else loader.construct_document(node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character {chr(error.character)!r}"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, problem = mark.line + 1 if mark else 1, str(error.problem or error.context)
        if r"'\t'" in problem:
            problem = "a tab, where YAML allows only spaces; replace it with spaces"
        if problem.startswith("but "):  # the second half of a sentence
            problem = f"{error.context}, {problem}"
    except json.JSONDecodeError as error:
        line, problem = error.lineno, error.msg
    raise UserError(f"{name}:{line}: not valid {kind}: {problem}")


def _line_numbers(node: yaml.Node, name: str) -> dict[KeyPath, int]:
    """Line number of each key. Raises UserError for a duplicate key or one that is not text."""
    lines: dict[KeyPath, int] = {}
    for path, key in _keys(node, ()):
        line = key.start_mark.line + 1
        if key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
            raise UserError(f"{name}:{line}: {key.value}: a key must be a name")
        if path in lines:
            first = f"the first is in line {lines[path]}"
            raise UserError(f"{name}:{line}: {'.'.join(path)}: given twice; {first}")
        lines[path] = line
    return lines


def _keys(node: yaml.Node, path: KeyPath) -> Iterator[tuple[KeyPath, yaml.Node]]:
    """The path and the node of every key below a node; list indices are strings in the path."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            key_path = (*path, str(key.value))
            yield key_path, key
            yield from _keys(value, key_path)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _keys(item, (*path, str(index)))


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, and with limits on depth and number of nodes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes: dict[int, int] = {}  # id of a composed node -> number of nodes in its subtree

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node as PyYAML does, but refuse tags, recursion and excessive size."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise _yaml_error(f"the tag {event.tag} is not supported", event)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _yaml_error(f"nested more than {_MAX_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._nodes:
                raise _yaml_error(f"*{event.anchor} contains itself", event)
        elif isinstance(node, yaml.ScalarNode):
            self._nodes[id(node)] = 1
            _check_scalar(node, event)
        elif node is not None:
            children = [child for item in node.value for child in _child_nodes(item)]
            self._nodes[id(node)] = 1 + sum(self._nodes[id(child)] for child in children)
            if self._nodes[id(node)] > _MAX_NODES:
                raise _yaml_error(f"more than {_MAX_NODES:,} values", event)
        return node


def _child_nodes(item: Any) -> tuple[yaml.Node, ...]:
    """The key and value node of a mapping's item, or the one node of a list's item."""
    return item if isinstance(item, tuple) else (item,)


def _check_scalar(node: yaml.ScalarNode, event: yaml.Event) -> None:
    """Raise YAMLError for an integer with too many digits, and for NUL or surrogate characters."""
    if node.tag == f"{_TAG}int" and len(node.value.lstrip("+-")) > _MAX_DIGITS:
        raise _yaml_error(f"a whole number of {len(node.value)} digits", event)
    if "\0" in node.value or (
        not node.value.isascii() and re.search("[\ud800-\udfff]", node.value)
    ):
        raise _yaml_error("text with a NUL or a surrogate character", event)


def _yaml_error(problem: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    mark: Any = event.start_mark
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


# PyYAML's table for the types of plain scalars: first character -> [(type, pattern), ...]. Its
# patterns are those of YAML 1.1 and are replaced by those of YAML 1.2.
_REPLACED_TYPES = (":float", ":int", ":bool", ":timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(_REPLACED_TYPES)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _type, _pattern, _first_characters in (  # the first match applies: `int` precedes `float`
    ("int", r"^[-+]?(0|[1-9][0-9]*)$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?|\.inf|\.nan)$",
        "-+.0123456789",
    ),
    ("bool", "^(true|false|True|False)$", "tTfF"),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_type}", re.compile(_pattern), list(_first_characters))
