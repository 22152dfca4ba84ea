"""The tokenizer of a model folder: its files, loading, special tokens, ends of generation."""

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.plan.given.new_tokens import TOKENIZER, token_rows
from pipeline.plan.given.shape import read_shape, require_model_folder

if TYPE_CHECKING:  # importing transformers takes seconds, and checking rows needs none of it
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder, without network.

    Raises UserError if the folder has no fast tokenizer, or a damaged one.
    """
    require_model_folder(folder)
    require_tokenizer(folder)
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # noqa: BLE001 - a damaged tokenizer.json raises Exception itself
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model: {folder}: the tokenizer cannot be loaded: {reason}") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if not tokenizer.is_fast or not len(tokenizer):
        raise UserError(
            f"model: {folder}: no fast tokenizer, which is needed for the text offsets of tokens; "
            "save the tokenizer with a tokenizer.json"
        )
    return tokenizer


def run_tokenizer(settings: RunSettings) -> "PreTrainedTokenizerBase":
    """The tokenizer of a run: that of its base, with the tokens of the setting `new_tokens`.

    The new tokens are not special, so decoding keeps them, and a row's text may contain them.
    Raises UserError if the tokenizer cannot be loaded, or gives the new tokens unexpected ids.
    """
    tokenizer = load_tokenizer(settings.model_folder, settings.trust_remote_code)
    if not settings.new_tokens:
        return tokenizer
    from transformers import AddedToken

    shape = read_shape(str(settings.model_folder), trust_remote_code=settings.trust_remote_code)
    rows = token_rows(shape, settings)
    assert rows is not None
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in rows.ids])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in rows.ids}
    if ids != rows.ids:
        raise UserError(
            f"new_tokens: with transformers the tokenizer of {settings.model_folder} gives the ids "
            f"{ids}, and with its {TOKENIZER} alone {rows.ids}; save it again with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return tokenizer


def num_embeddings(settings: RunSettings) -> int | None:
    """Number of token ids for which the model of a run has an embedding, `new_tokens` included.

    None in a folder without config.json, which has a tokenizer alone.
    """
    if not (settings.model_folder / "config.json").is_file():
        return None
    trust = settings.trust_remote_code
    shape = read_shape(str(settings.model_folder), trust_remote_code=trust)
    rows = token_rows(shape, settings)
    added_ids = () if rows is None else rows.ids.values()
    return max([shape.vocab_size, *(number + 1 for number in added_ids)])


def require_tokenizer(folder: Path) -> None:
    """Raise UserError if a model folder has no tokenizer file."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"model: {folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); fetch its files "
            "from the model on the hub: hf download ORG/NAME --include '*token*' 'vocab*' "
            f"'merges*' 'chat_template*' --local-dir {shlex.quote(str(folder))}"
        )


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Ids of all special tokens, by text.

    Some tokens, such as Llama 3's <|eot_id|>, are marked as special only in tokenizer.json.
    """
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    ids = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return added | dict(ids)


def special_pattern(special: Iterable[str]) -> re.Pattern[str]:
    """Pattern that matches these special tokens, and the longer of two that begin alike."""
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def end_tokens(eos: int | None, folder: Path, special: Mapping[str, int]) -> list[str]:
    """Special tokens that stop generation: the EOS, and those that generation_config.json names.

    `eos`: id of the EOS token. `special`: ids of all special tokens, by text. Raises UserError if
    generation_config.json exists and cannot be read.
    """
    path = folder / "generation_config.json"
    try:
        named = read_json(path).get("eos_token_id") if path.exists() else None  # one id or a list
    except (OSError, ValueError) as error:
        raise UserError(
            f"model: {path}: cannot be read, but may name tokens that end a turn: {error}; fetch "
            "the file from the model on the hub again, or remove it"
        ) from None
    ids = {eos, *(named if isinstance(named, list) else [named])}
    return [text for text, number in special.items() if number in ids]
