"""Values of a row: their JSON type for messages, emptiness, and values given as JSON text."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.rows.examples import RowError

_JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false"}


def json_name(value: object) -> str:
    """The JSON type of a value, as messages name it."""
    if value is None:
        return "null"
    if isinstance(value, int | float):
        return _JSON_NAMES.get(type(value), "a number")
    return _JSON_NAMES.get(type(value), f"of type {type(value).__name__}")


def has_value(value: Any) -> bool:
    """False for null, blank text, and lists and objects that hold only such values."""
    if isinstance(value, str):
        return value != "" and not value.isspace()
    if isinstance(value, dict | list):
        return any(map(has_value, value.values() if isinstance(value, dict) else value))
    return value is not None


def text_of(value: Any, name: str) -> str:
    """The value if it is text that UTF-8 can encode. Raises RowError with `name` if it is not."""
    if not isinstance(value, str):
        raise RowError(f"{name} is {json_name(value)}; expected text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # "\ud800" is valid JSON and no character
            raise RowError(f"{name} holds half a surrogate pair, which is no character") from None
    return value


def list_of(value: Any, name: str, *, strips_nulls: bool = False) -> list[Any]:
    """The items of a list, of a list as JSON text, or of a struct of lists as in tables.

    Items that are JSON text of an object are parsed. `strips_nulls` removes keys that are null, but
    not within JSON text: there a null is no artefact of a table's schema. Raises RowError with
    `name` for any other value.
    """
    items = json_of(value, name) if isinstance(value, str) else value
    if items is None and value is not None:  # the text "null"
        return []
    if isinstance(items, dict) and (length := _common_length(items)) is not None:
        items = [_item(items, i) for i in range(length)]
    if not isinstance(items, list):
        raise RowError(f"{name} is {json_name(items)}; expected a list")
    result = []
    for item in items:
        if isinstance(item, str) and item.lstrip().startswith("{"):
            result.append(json_of(item, name))
        elif strips_nulls and not isinstance(value, str):
            result.append(without_nulls(item))
        else:
            result.append(item)
    return result


def json_of(text: str, name: str) -> Any:
    """The parsed value of JSON text. Raises RowError with `name` if it is not valid."""
    try:
        return DECODER.decode(text)
    except DuplicateKeyError:
        raise RowError(f"{name} is JSON text in which a key occurs twice") from None
    except (ValueError, RecursionError):
        raise RowError(f"{name} is text, and not valid JSON; expected JSON") from None


def without_nulls(value: Any) -> Any:
    """The value without keys that are null: tables and their exports fill a schema with them."""
    if isinstance(value, dict):
        return {
            key: item if isinstance(item, str) else without_nulls(item)
            for key, item in value.items()
            if item is not None
        }
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def require_json(value: Any, name: str) -> None:
    """Raise RowError unless a template can write the value as JSON in UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):  # a date, 1e999, half a surrogate pair
        raise RowError(f"{name} holds a value that JSON cannot hold") from None


class DuplicateKeyError(ValueError):
    """An object names a key twice; `json` alone would keep the last value and drop the others."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise DuplicateKeyError
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _common_length(struct: Mapping[str, Any]) -> int | None:
    """The length that all lists of a struct of lists have; None where it is not one."""
    lengths: set[int | None] = set()
    for item in struct.values():
        if isinstance(item, list):
            lengths.add(len(item))
        elif item is not None:
            lengths.add(_common_length(item) if isinstance(item, dict) else None)
    return lengths.pop() if len(lengths) == 1 else None


def _item(struct: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Item `i` of a struct of lists."""
    return {
        key: value[i] if isinstance(value, list) else None if value is None else _item(value, i)
        for key, value in struct.items()
    }
