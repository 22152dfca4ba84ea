"""New tokens of a run (`new_tokens`): their ids, and the trained rows of embeddings and head."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.given.shape import ModelShape

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """The rows of embeddings and head that are trained for new tokens.

    `ids`: new token -> its id, which is the index of its row. `vocab_size`: number of rows of the
    embeddings, which may be more than the model's files have. `modules`: names of the modules with
    trained rows: the embeddings, and the head unless it shares the weight of the embeddings.
    """

    ids: dict[str, int]
    vocab_size: int
    modules: tuple[str, ...]

    @property
    def indices(self) -> list[int]:
        """Indices of the trained rows in each module."""
        return list(self.ids.values())


def token_rows(shape: ModelShape, settings: RunSettings) -> TokenRows | None:
    """The trained rows of `new_tokens`; None if the setting is empty.

    Raises UserError if a token cannot be added to the tokenizer, or its row not to the model.
    """
    if not settings.new_tokens:
        return None
    if not shape.embeddings_name or not (shape.is_tied or shape.head_name):
        raise UserError(
            "new_tokens: this model has no embeddings or no head of the width of its blocks, so no "
            "row can be trained for a token; leave new_tokens out"
        )
    num_rows = shape.vocab_size - shape.added_rows
    tokens = tuple(settings.new_tokens)
    if shape.source is None:
        ids = _ids_in_tokenizer(shape.folder, tokens, num_rows)
    else:  # a model without a folder: all its rows are assumed to be in use
        ids = {token: num_rows + index for index, token in enumerate(tokens)}
    return TokenRows(
        ids=ids,
        vocab_size=max(num_rows, *(index + 1 for index in ids.values())),
        modules=(shape.embeddings_name, *(() if shape.is_tied else (shape.head_name,))),
    )


def with_added_rows(shape: ModelShape, settings: RunSettings) -> ModelShape:
    """The shape with the rows that the run's new tokens add to embeddings and head."""
    rows = token_rows(shape, settings)
    if rows is None:
        return shape
    added = rows.vocab_size - (shape.vocab_size - shape.added_rows)
    return replace(shape, vocab_size=rows.vocab_size, added_rows=added)


def rows_text(rows: TokenRows, shape: ModelShape, settings: RunSettings) -> str:
    """Text about the new tokens: their ids, the number of added rows, and the initial values."""
    ids = ", ".join(f"{token!r} {index}" for token, index in rows.ids.items())
    origin = "the model has unused rows for them"
    if shape.added_rows:
        origin = f"{shape.added_rows} rows are added"
    return (
        f"{ids}; {origin}, so the embeddings have {rows.vocab_size} rows; a new row starts at the "
        f"mean of the model's rows plus noise of a tenth of their standard deviation, with seed "
        f"{settings.seed}"
    )


@lru_cache(maxsize=8)
def _ids_in_tokenizer(folder: str, tokens: tuple[str, ...], num_rows: int) -> dict[str, int]:
    """The ids that the tokenizer of a folder gives to tokens that are added to it.

    `num_rows`: number of embeddings in the model's files. A token that the tokenizer has already is
    new only if the model has no embedding for it.
    """
    from tokenizers import AddedToken, Tokenizer

    path = Path(folder) / TOKENIZER
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - tokenizers raises Exception itself
        raise UserError(
            f"new_tokens: {path} cannot be read: {error}; save the tokenizer there with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from None
    for token in tokens:
        known = tokenizer.token_to_id(token)
        if known is not None and known < num_rows:
            raise UserError(
                f"new_tokens: {token!r} is token {known} of the tokenizer and has an embedding; "
                "remove it; to train all embeddings, set modules_to_save: [embed_tokens, lm_head]"
            )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    ids = {token: int(tokenizer.token_to_id(token) or 0) for token in tokens}
    # The tokenizer may also have other tokens without an embedding. They need rows too.
    vocabulary = tokenizer.get_vocab().items()
    without_row = {index: token for token, index in vocabulary if index >= num_rows}
    if unnamed := [token for _, token in sorted(without_row.items()) if token not in ids]:
        raise UserError(
            f"new_tokens: {path} has tokens for which the model has no embedding: "
            f"{', '.join(map(repr, unnamed))}; add them to new_tokens"
        )
    return ids
