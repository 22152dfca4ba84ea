"""Checks and conversions of values in a row.

A list of objects may also be given as JSON text or as a struct of lists. Some tables store a column
of objects as such a struct: `{role: [user, assistant], content: [Hi, Hello]}`.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from pipeline.rows.examples import RowError

_PYTHON = re.compile(r"[\s\[({]*'")  # JSON has no text in single quotes
_JSON_TYPES = {dict: "an object", list: "a list", str: "text", bool: "true or false"}


def json_type(value: object) -> str:
    """The JSON type of a value, in words for messages, such as "a list"."""
    if value is None:
        return "null"
    if isinstance(value, int | float):
        return _JSON_TYPES.get(type(value), "a number")
    return _JSON_TYPES.get(type(value), f"of type {type(value).__name__}")


def has_value(value: Any) -> bool:
    """Whether a value has content.

    False for null, for blank text, and for a list or object whose items all have no content.
    """
    if isinstance(value, str):
        return value != "" and not value.isspace()
    if isinstance(value, dict | list):
        return any(map(has_value, value.values() if isinstance(value, dict) else value))
    return value is not None


def require_text(value: Any, name: str) -> str:
    """Return the value if it is text that UTF-8 can encode.

    For other values, raises a RowError whose message starts with `name`.
    """
    if not isinstance(value, str):
        raise RowError(f"{name} is {json_type(value)}; expected text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # "\ud800" is valid in JSON text, but not a character
            raise RowError(f"{name} has a lone surrogate, which is not a character") from None
    return value


def parse_list(value: Any, name: str, *, strips_nulls: bool = False) -> list[Any]:
    """The items of a list, of JSON text of a list, or of a struct of lists.

    A struct of lists becomes a list of objects. An item that is JSON text of an object is parsed.
    `strips_nulls`: remove keys whose value is null from the items, except in JSON text; in a table
    every object has every key. For other values, raises a RowError whose message starts with
    `name`.
    """
    items = parse_json(value, name) if isinstance(value, str) else value
    if items is None and value is not None:  # the value is the text "null"
        return []
    if isinstance(items, dict) and (length := _length_of_lists(items)) is not None:
        items = [_object_at(items, i) for i in range(length)]
    if not isinstance(items, list):
        raise RowError(f"{name} is {json_type(items)}; expected a list")
    result = []
    for item in items:
        if isinstance(item, str) and item.lstrip().startswith("{"):
            result.append(parse_json(item, name))
        elif strips_nulls and not isinstance(value, str):
            result.append(drop_nulls(item))
        else:
            result.append(item)
    return result


def parse_json(text: str, name: str) -> Any:
    """Parse JSON text. If it is not valid, raises a RowError whose message starts with `name`."""
    try:
        return DECODER.decode(text)
    except DuplicateKeyError:
        raise RowError(f"{name} is JSON text in which a key occurs twice") from None
    except (ValueError, RecursionError):
        remedy = ", but Python's notation; write it with json.dumps" if _is_python(text) else ""
        raise RowError(f"{name} is text that is not valid JSON{remedy}") from None


def _is_python(text: str) -> bool:
    """Whether a text may be a list or dict as Python or numpy prints it: [{'role': 'user'}]."""
    return _PYTHON.match(text) is not None


def drop_nulls(value: Any) -> Any:
    """The value without keys whose value is null, at any depth.

    In a table, and in a file exported from a table, every row has every key.
    """
    if isinstance(value, dict):
        return {
            key: item if isinstance(item, str) else drop_nulls(item)
            for key, item in value.items()
            if item is not None
        }
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def require_json(value: Any, name: str) -> None:
    """Raise a RowError that starts with `name` if JSON in UTF-8 cannot represent the value."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):  # such as a date, 1e999 or a lone surrogate
        raise RowError(f"{name} contains a value that JSON cannot represent") from None


class DuplicateKeyError(ValueError):
    """Raised for a JSON object in which a key occurs twice. `json` by itself keeps the last one."""


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values. Raises DuplicateKeyError if a key occurs twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise DuplicateKeyError
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object_without_duplicates)


def _length_of_lists(struct: Mapping[str, Any]) -> int | None:
    """The length of every list in a struct of lists; None if the object is not one.

    The struct may contain structs of lists of the same length.
    """
    lengths: set[int | None] = set()
    for item in struct.values():
        if isinstance(item, list):
            lengths.add(len(item))
        elif item is not None:
            lengths.add(_length_of_lists(item) if isinstance(item, dict) else None)
    return lengths.pop() if len(lengths) == 1 else None


def _object_at(struct: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The object with the `i`-th value of each list in a struct of lists."""
    values: dict[str, Any] = {}
    for key, value in struct.items():
        if isinstance(value, list):
            values[key] = value[i]
        else:
            values[key] = None if value is None else _object_at(value, i)
    return values
