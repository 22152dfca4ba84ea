"""Example -> token ids and which of them are supervised, by the model's own chat template.

A conversation is rendered once as a whole and tokenised once. An assistant turn owns its content
through its end-of-turn token: where the template marks it ({% generation %}) by the mark, else by
rendering what comes before it and what ends with it, both of which must be true beginnings of
the whole. Where that gives no answer the row or the template is refused.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.data.formats import Completion, Conversation, Example, Message, RowError
from pipeline.data.rendering import ChatTemplate
from pipeline.errors import UserError

if TYPE_CHECKING:  # importing transformers takes seconds, and checking rows needs none of it
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last-assistant", "all"]
_NO_END = (
    "model: the chat template ends assistant turns without a special token, so the model would "
    "never learn to stop; use a template that ends them with one, such as ChatML's <|im_end|>"
)
_NO_END_MARKED = (
    "model: the chat template's {% generation %} block leaves out the special token that ends the "
    "turn, so the model would never learn to stop; move {% endgeneration %} behind it"
)
_REWRITES = (
    "the chat template rewrites earlier turns, so which tokens a turn owns is not certain; use "
    "single-turn rows, train_on: all, or a template that marks turns with {% generation %}"
)
_OTHER_BEGINNING = "the chat template's generation prompt is not how it begins assistant turns"


@dataclass(frozen=True)
class Document:
    """T tokens, and for each whether it counts in the loss; the first never does."""

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class _Turn:
    """Characters of an assistant turn: from where the model writes to where the turn ends."""

    start: int
    end: int
    content: str


@dataclass(frozen=True)
class _Tokens:
    """A tokenised rendering: ids, and where each begins and ends in the text."""

    ids: list[int]
    starts: list[int]
    ends: list[int]
    special: frozenset[int]

    def ending_special(self, turn: _Turn, text: str) -> int | None:
        """Index of the turn's end-of-turn token: its last special one after the content."""
        said = turn.content.strip()
        at = text.find(said, turn.start, turn.end)
        after = turn.start if at < 0 else at + len(said)
        first, last = bisect_left(self.starts, after), bisect_left(self.starts, turn.end)
        return next((i for i in reversed(range(first, last)) if self.ids[i] in self.special), None)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder; fetches nothing. Raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"model: {folder}: no such folder")
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # noqa: BLE001 - a damaged tokenizer.json raises Exception itself
        said = str(error).strip().partition("\n")[0]
        raise UserError(f"model: {folder}: the tokenizer cannot be loaded: {said}") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if not tokenizer.is_fast or not len(tokenizer):
        raise UserError(
            f"model: {folder}: no fast tokenizer, which alone knows the text of each token; "
            "save it with a tokenizer.json"
        )
    return tokenizer


def encode(example: Example, tokenizer: "PreTrainedTokenizerBase", train_on: TrainOn) -> Document:
    """Tokens of an example, whole. Raises RowError for the row, UserError for the template."""
    if isinstance(example, Conversation):
        ids, supervised = _encode_chat(example.messages, tokenizer, train_on)
    else:
        assert isinstance(example, Completion)
        ids, supervised = _encode_text(example, tokenizer, train_on)
    if not ids:
        raise RowError("no token")
    supervised[0] = False  # nothing predicts it
    return Document(ids, supervised)


def supervised_runs(
    ids: Sequence[int], supervised: Sequence[bool], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[str, bool]]:
    """A document as text, cut where supervision begins and ends."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or supervised[i] != supervised[start]:
            run = [int(token) for token in ids[start:i]]
            text = tokenizer.decode(run, clean_up_tokenization_spaces=False)
            yield str(text), bool(supervised[start])
            start = i


def _encode_chat(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", train_on: TrainOn
) -> tuple[list[int], list[bool]]:
    template = ChatTemplate(tokenizer)
    text, marked = template.render_marked(messages)
    tokens = _tokenise(tokenizer, text)
    if train_on == "all":
        if not _ends_last_turn(messages, text, template, tokenizer):
            raise UserError(_NO_END)
        return tokens.ids, [True] * len(tokens.ids)
    if template.marks_turns:
        said = [m.content for m in messages if m.role == "assistant"]
        turns = _marked_turns(marked, said, train_on)
    else:
        turns = _derived_turns(messages, text, template, train_on)
    supervised = [False] * len(tokens.ids)
    for turn in turns:
        end = tokens.ending_special(turn, text)
        if end is None:
            raise UserError(_NO_END_MARKED if template.marks_turns else _NO_END)
        start = bisect_left(tokens.starts, turn.start)
        supervised[start : end + 1] = [True] * (end + 1 - start)
    return tokens.ids, supervised


def _marked_turns(
    marked: Sequence[tuple[int, int]], said: Sequence[str], train_on: TrainOn
) -> list[_Turn]:
    if not marked:
        raise UserError("model: the chat template's {% generation %} marks no assistant turn")
    is_one_each = len(marked) == len(said)
    contents = said if is_one_each else [""] * len(marked)
    turns = [_Turn(a, b, content) for (a, b), content in zip(marked, contents, strict=True)]
    if train_on != "last-assistant":
        return turns
    if not is_one_each:
        raise UserError(
            f"train_on: last-assistant: the chat template marks {len(marked)} pieces of "
            f"{len(said)} assistant turns, so which is the last one is not certain"
        )
    return turns[-1:]


def _derived_turns(
    messages: Sequence[Message], text: str, template: ChatTemplate, train_on: TrainOn
) -> list[_Turn]:
    places = [i for i, message in enumerate(messages) if message.role == "assistant"]
    turns = []
    for i in places if train_on == "assistant" else places[-1:]:
        if i == 0:
            raise RowError("the first message is the assistant's; something must come before it")
        before = template.render(messages[:i], asks=True)
        is_last = i + 1 == len(messages)
        through = text if is_last else template.render(messages[: i + 1])
        if not text.startswith(through):
            raise RowError(_REWRITES)
        if not through.startswith(before):
            is_rewritten = not through.startswith(template.render(messages[:i]))
            raise RowError(_REWRITES if is_rewritten else _OTHER_BEGINNING)
        turn = _Turn(len(before), len(through), messages[i].content)
        header = text[turn.start : turn.end].partition(turn.content.strip())[0]
        if header.strip() and before == template.render(messages[:i]):
            turn = _without_header(turn, header)
        turns.append(turn)
    return turns


def _without_header(turn: _Turn, header: str) -> _Turn:
    """The turn of a template without generation prompt, whose segment begins with its role."""
    if len(header) == turn.end - turn.start:
        raise RowError("the chat template changes the text of an assistant turn")
    return _Turn(turn.start + len(header), turn.end, turn.content)


def _ends_last_turn(
    messages: Sequence[Message],
    text: str,
    template: ChatTemplate,
    tokenizer: "PreTrainedTokenizerBase",
) -> bool:
    """Whether the last assistant turn ends with a special token, where it alone matters."""
    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    if last + 1 < len(messages):
        text = template.render(messages[: last + 1])
    tokens = _tokenise(tokenizer, text)
    content = messages[last].content.strip()
    after = text.rfind(content) + len(content)
    # `>`: a content such as "end" is found inside the end-of-turn token itself.
    pairs = zip(tokens.ids, tokens.ends, strict=True)
    return any(end > after for token, end in pairs if token in tokens.special)


def _tokenise(tokenizer: "PreTrainedTokenizerBase", text: str) -> _Tokens:
    # The template wrote a BOS if there is to be one: special tokens here would double it.
    said = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets: list[tuple[int, int]] = said["offset_mapping"]
    return _Tokens(
        ids=list(said["input_ids"]),
        starts=[start for start, _ in offsets],
        ends=[end for _, end in offsets],
        special=_special_ids(tokenizer, len(tokenizer)),
    )


@lru_cache(maxsize=4)
def _special_ids(tokenizer: "PreTrainedTokenizerBase", size: int) -> frozenset[int]:
    """Llama 3's <|eot_id|> is special in tokenizer.json only; `size` notices added tokens."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}


def _encode_text(
    example: Completion, tokenizer: "PreTrainedTokenizerBase", train_on: TrainOn
) -> tuple[list[int], list[bool]]:
    if tokenizer.eos_token_id is None:
        raise UserError(
            "model: the tokenizer has no end-of-sequence token, so the model would never learn to "
            "stop; set eos_token in tokenizer_config.json"
        )

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    prompt, whole = plain(example.prompt), plain(example.prompt + example.completion)
    # Where a token would straddle the border the two are tokenised apart, as in generation.
    is_clean = whole[: len(prompt)] == prompt
    completion = whole[len(prompt) :] if is_clean else plain(example.completion)
    bos = tokenizer.bos_token_id
    if bos is not None and prompt[:1] != [bos] and tokenizer("")["input_ids"][:1] == [bos]:
        prompt = [bos, *prompt]
    if completion[-1:] != [tokenizer.eos_token_id]:
        completion = [*completion, tokenizer.eos_token_id]
    supervised = [train_on == "all"] * len(prompt) + [True] * len(completion)
    return prompt + completion, supervised
