"""Highest id of a tokenizer's added tokens, read from its files without loading it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.files import read_json

_HEAD_CHARACTERS = 2**20  # read of tokenizer.json, whose added tokens precede the vocabulary


def count_tokens(folder: Path) -> int | None:
    """Highest id among the added tokens of a model folder, plus one; None if none is listed.

    Only added tokens can exceed a model's embeddings. The image token is not counted: tokenizers of
    text models keep its id although the model has no embedding for it (Gemma 3).
    """
    config = _read(folder / "tokenizer_config.json")
    named = config.get("extra_special_tokens")
    images = [source.get("image_token") for source in (config, named) if isinstance(source, dict)]
    ids = [number for number, content in _added(folder, config) if content not in images]
    return max(ids) + 1 if ids else None


def _added(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Id and text of each added token, from every file that a transformers version uses."""
    for number, token in dict(config.get("added_tokens_decoder") or {}).items():
        yield int(number), str(token.get("content"))
    for content, number in _read(folder / "added_tokens.json").items():
        yield int(number), content
    for token in _head_of_tokenizer_json(folder / "tokenizer.json"):
        yield int(token["id"]), str(token["content"])


def _head_of_tokenizer_json(path: Path) -> list[dict[str, Any]]:
    """The list `added_tokens`, without reading the vocabulary after it."""
    try:
        with path.open(encoding="utf-8") as file:
            head = file.read(_HEAD_CHARACTERS)
    except (OSError, UnicodeDecodeError):
        return []
    _, separator, rest = head.partition('"added_tokens":')
    if not separator:
        return []
    try:
        tokens: list[dict[str, Any]] = json.JSONDecoder().raw_decode(rest.lstrip())[0]
    except ValueError:
        return []
    return tokens


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if it cannot be read.

    A damaged tokenizer is reported when it is loaded.
    """
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}
