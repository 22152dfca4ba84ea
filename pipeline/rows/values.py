"""Checks and conversions of the values in a row, including values given as JSON text."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.rows.examples import RowError

_JSON_TYPES = {dict: "an object", list: "a list", str: "text", bool: "true or false"}


def json_type(value: object) -> str:
    """Name of a value's JSON type, for messages."""
    if value is None:
        return "null"
    if isinstance(value, int | float):
        return _JSON_TYPES.get(type(value), "a number")
    return _JSON_TYPES.get(type(value), f"of type {type(value).__name__}")


def has_value(value: Any) -> bool:
    """False for null and blank text, and for lists and objects that contain nothing else."""
    if isinstance(value, str):
        return value != "" and not value.isspace()
    if isinstance(value, dict | list):
        return any(map(has_value, value.values() if isinstance(value, dict) else value))
    return value is not None


def require_text(value: Any, name: str) -> str:
    """Return the value if it is text that UTF-8 can encode.

    Raises RowError, whose message starts with `name`, for any other value.
    """
    if not isinstance(value, str):
        raise RowError(f"{name} is {json_type(value)}; expected text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # "\ud800" is valid JSON but not a character
            raise RowError(f"{name} has a lone surrogate, which is not a character") from None
    return value


def parse_list(value: Any, name: str, *, strips_nulls: bool = False) -> list[Any]:
    """The items of a list, which may be given as JSON text or as a table's struct of lists.

    A struct of lists, `{role: [user, ...], content: [Hi, ...]}`, becomes a list of objects. Items
    that are JSON text of an object are parsed. `strips_nulls` removes keys whose value is null,
    because a table's schema adds them to every row; those within JSON text are kept. Raises
    RowError, whose message starts with `name`, for any other value.
    """
    items = parse_json(value, name) if isinstance(value, str) else value
    if items is None and value is not None:  # the text "null"
        return []
    if isinstance(items, dict) and (length := _common_length(items)) is not None:
        items = [_struct_item(items, i) for i in range(length)]
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
    """Parse JSON text. Raises RowError, whose message starts with `name`, if it is not valid."""
    try:
        return DECODER.decode(text)
    except DuplicateKeyError:
        raise RowError(f"{name} is JSON text in which a key occurs twice") from None
    except (ValueError, RecursionError):
        raise RowError(f"{name} is text, and not valid JSON; expected JSON") from None


def drop_nulls(value: Any) -> Any:
    """Remove keys whose value is null: rows of tables, and of exports of tables, have every key."""
    if isinstance(value, dict):
        return {
            key: item if isinstance(item, str) else drop_nulls(item)
            for key, item in value.items()
            if item is not None
        }
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def require_json(value: Any, name: str) -> None:
    """Raise RowError unless the value can be serialised as JSON in UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):  # a date, 1e999, a lone surrogate
        raise RowError(f"{name} contains a value that JSON cannot represent") from None


class DuplicateKeyError(ValueError):
    """Raised for an object in which a key occurs twice; `json` alone would keep the last value."""


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise DuplicateKeyError
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_refuse_duplicate_keys)


def _common_length(struct: Mapping[str, Any]) -> int | None:
    """The common length of all lists in a struct of lists; None for any other object."""
    lengths: set[int | None] = set()
    for item in struct.values():
        if isinstance(item, list):
            lengths.add(len(item))
        elif item is not None:
            lengths.add(_common_length(item) if isinstance(item, dict) else None)
    return lengths.pop() if len(lengths) == 1 else None


def _struct_item(struct: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Item `i` of a struct of lists."""
    return {
        key: value[i]
        if isinstance(value, list)
        else None
        if value is None
        else _struct_item(value, i)
        for key, value in struct.items()
    }
