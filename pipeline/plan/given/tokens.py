"""Highest id of a tokenizer's added tokens, read from its files without loading the tokenizer.

Added tokens are those that are not part of the tokenizer's trained vocabulary, such as the markers
of a chat template.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.files import read_json_or_empty

# Characters read from the start of tokenizer.json: its added tokens precede its vocabulary.
_HEAD_CHARACTERS = 2**20


def required_vocab_size(folder: Path) -> int | None:
    """Number of embeddings that a tokenizer's added tokens need: their highest id plus one.

    None if the model folder lists no added token. Only ids of added tokens can exceed the model's
    embeddings. The image token is not counted: tokenizers of text models keep its id although the
    model has no embedding for it (Gemma 3).
    """
    config = read_json_or_empty(folder / "tokenizer_config.json")
    special_tokens = config.get("extra_special_tokens")
    image_tokens = [config.get("image_token")]
    if isinstance(special_tokens, dict):
        image_tokens.append(special_tokens.get("image_token"))
    added = _added_tokens(folder, config)
    ids = [token_id for token_id, text in added if text not in image_tokens]
    return max(ids) + 1 if ids else None


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Id and text of each added token, from all files in which transformers has stored them."""
    for token_id, token in dict(config.get("added_tokens_decoder") or {}).items():
        yield int(token_id), str(token.get("content"))
    for text, token_id in read_json_or_empty(folder / "added_tokens.json").items():
        yield int(token_id), text
    for token in _from_tokenizer_json(folder / "tokenizer.json"):
        yield int(token["id"]), str(token["content"])


def _from_tokenizer_json(path: Path) -> list[dict[str, Any]]:
    """The list `added_tokens` of tokenizer.json, read without the vocabulary that follows it."""
    try:
        with path.open(encoding="utf-8") as file:
            beginning = file.read(_HEAD_CHARACTERS)
    except (OSError, UnicodeDecodeError):
        return []
    _, key, value = beginning.partition('"added_tokens":')
    if not key:
        return []
    try:
        tokens: list[dict[str, Any]] = json.JSONDecoder().raw_decode(value.lstrip())[0]
    except ValueError:
        return []
    return tokens
