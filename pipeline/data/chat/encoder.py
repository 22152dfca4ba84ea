"""Example -> token ids and which of them are supervised.

A conversation is rendered once as a whole, by the model's own chat template, and tokenised once.
An assistant turn owns its content through its end-of-turn token (turns.py says where that is).
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config.settings import RunSettings
from pipeline.data.chat.template import Span, apply_chat_template_setting, chatml
from pipeline.data.chat.turns import TurnFinder, special_ids
from pipeline.errors import UserError
from pipeline.plan.given.shape import require_model_folder
from pipeline.rows.formats import Completion, Conversation, Example, RowError, Text, Tokens

if TYPE_CHECKING:  # importing transformers takes seconds, and checking rows needs none of it
    from transformers import PreTrainedTokenizerBase

_NO_END_OF_SEQUENCE = (
    "model: the tokenizer has no end-of-sequence token, so the model would never learn to "
    "stop; set eos_token in tokenizer_config.json"
)
_NOTHING = "no supervised token"


@dataclass(frozen=True)
class Document:
    """T tokens, and for each whether it counts in the loss; the first never does."""

    ids: npt.NDArray[np.int32]  # (T,)
    supervised: npt.NDArray[np.bool_]  # (T,)


@dataclass(frozen=True)
class _Draft:
    """A document before it is tokenised, and which of its characters count in the loss.

    A conversation's spans are turns: from their first character to their end-of-turn token, which
    they own too. Other texts have one span, to their end.
    """

    text: str
    spans: Sequence[Span]
    is_chat: bool = False
    is_inverse: bool = False  # all but the spans counts

    @property
    def is_all_text(self) -> bool:
        """Whether all of it counts, so that nothing asks where its characters lie."""
        return not self.is_chat and self.spans[0][0] == 0


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder; fetches nothing. Raises UserError where there is none."""
    require_model_folder(folder)
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


def chat_template_of(settings: RunSettings) -> str | None:
    """The chat template that the run file brings to the model; None for the model's own."""
    if settings.chat_template == "model":
        return None
    return chatml(load_tokenizer(settings.model_folder, settings.trust_remote_code))


class Encoder:
    """Makes documents of examples, as the run file's settings say.

    `ends`: the tokens with which texts and turns end.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: RunSettings) -> None:
        apply_chat_template_setting(tokenizer, settings.chat_template)
        self._tokenizer, self._settings = tokenizer, settings
        self._backend: Any = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special = frozenset(special_ids(tokenizer).values())
        self._bos: int | None = tokenizer.bos_token_id
        if self._backend.encode("").ids[:1] != [self._bos]:
            self._bos = None  # it is there, but texts do not begin with it
        # Kept, because the tokenizer looks for it anew each time it is asked: 10 us.
        self._eos: int | None = tokenizer.eos_token_id
        ends = set[int]()
        with suppress(UserError):  # of the template, which only conversations need
            ends.add(self._turns.end.id)
        self.ends = frozenset(ends if self._eos is None else {self._eos, *ends})

    def encode(self, example: Example) -> list[Document]:
        """Documents of an example: one, or with split_turns one of each trained turn.

        Raises RowError for the row, UserError for the tokenizer or its chat template.
        """
        found = self.encode_many([example])[0]
        if isinstance(found, RowError):
            raise found
        return found

    def encode_many(self, examples: Sequence[Example]) -> list[list[Document] | RowError]:
        """Documents of each example, or why there are none. UserError as in `encode`."""
        drafts = [self._drafts_or_error(example) for example in examples]
        all_drafts = [draft for made in drafts if isinstance(made, list) for draft in made]
        # Knowing where characters lie costs a tenth of the time (2026-11-25).
        is_fast = all(draft.is_all_text for draft in all_drafts)
        encode = self._backend.encode_batch_fast if is_fast else self._backend.encode_batch
        encodings = iter(encode([draft.text for draft in all_drafts], add_special_tokens=False))
        found: list[list[Document] | RowError] = []
        for example, made in zip(examples, drafts, strict=True):
            if isinstance(made, RowError):
                found.append(made)
                continue
            mine = [(draft, next(encodings)) for draft in made]
            try:
                if isinstance(example, Tokens):
                    found.append([self._checked(example)])
                else:
                    found.append([self._document(draft, encoding) for draft, encoding in mine])
            except RowError as error:
                found.append(error)
        return found

    def num_ends(self, supervised: npt.NDArray[np.int32]) -> int:
        """How many of some supervised tokens end a text or a turn."""
        return sum(int(np.count_nonzero(supervised == end)) for end in self.ends)

    def last_answer(self, example: Example) -> tuple[str, str]:
        """All that comes before the last answer, as the model is shown it, and the answer.

        Raises RowError where there is no question.
        """
        if isinstance(example, Completion):
            bos = self._tokenizer.decode([self._bos]) if self._bos is not None else ""
            prompt = example.prompt.removeprefix(str(bos))
            return f"{bos}{prompt}", example.completion
        if not isinstance(example, Conversation):
            raise RowError("no question with an answer")
        last = max(i for i, message in enumerate(example.messages) if message.role == "assistant")
        rendered = self._turns.render(replace(example, messages=example.messages[: last + 1]))
        start, end = rendered.owned[last]
        encoding = self._backend.encode(rendered.text, add_special_tokens=False)
        first, stop = self._token_at(encoding, start, end), encoding.char_to_token(end)
        answer = self._tokenizer.decode(encoding.ids[first:stop], skip_special_tokens=True)
        return rendered.text[: encoding.token_to_chars(first)[0]], str(answer)

    @cached_property
    def _turns(self) -> TurnFinder:
        return TurnFinder(self._tokenizer)

    def _drafts_or_error(self, example: Example) -> list[_Draft] | RowError:
        try:
            drafts = self._drafts(example)
        except RowError as error:
            return error
        for draft in drafts:
            if not _is_text(draft.text):
                return RowError("half a surrogate pair, which is no character")
        return drafts

    def _drafts(self, example: Example) -> list[_Draft]:
        if isinstance(example, Tokens):
            return []
        if isinstance(example, Conversation):
            return [self._chat_draft(part) for part in self._parts(example)]
        if self._eos is None:
            raise UserError(_NO_END_OF_SEQUENCE)
        if isinstance(example, Text):
            return [_Draft(example.text, [(0, len(example.text))])]
        text = example.prompt + example.completion
        start = 0 if self._settings.train_on == "all" else len(example.prompt)
        return [_Draft(text, [(start, len(text))])]

    def _parts(self, conversation: Conversation) -> list[Conversation]:
        if not self._settings.split_turns:
            return [conversation]
        parts = []
        for i in self._trained(conversation):
            before = tuple(replace(m, is_trained=False) for m in conversation.messages[:i])
            messages = (*before, conversation.messages[i])
            parts.append(replace(conversation, messages=messages))
        if not parts:
            raise RowError(_NOTHING)
        return parts

    def _trained(self, conversation: Conversation) -> list[int]:
        turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        if self._settings.train_on == "last-assistant":
            turns = turns[-1:]
        return [i for i in turns if conversation.messages[i].is_trained]

    def _chat_draft(self, conversation: Conversation) -> _Draft:
        rendered = self._turns.render(conversation)
        is_inverse = self._settings.train_on == "all"
        chosen = self._trained(conversation)
        for i in chosen:
            answer = rendered.text[slice(*rendered.owned[i])]
            if conversation.messages[i].content.strip() and not answer.strip():
                raise RowError(
                    "the chat template leaves nothing of an answer, so the model would learn to "
                    "say nothing"
                )
        if is_inverse:
            chosen = [i for i, m in enumerate(conversation.messages) if not m.is_trained]
        if any(i not in rendered.owned for i in chosen):
            raise RowError("where the chat template writes a message of weight 0 is not certain")
        spans = [rendered.owned[i] for i in chosen]
        return _Draft(rendered.text, spans, is_chat=True, is_inverse=is_inverse)

    def _document(self, draft: _Draft, encoding: Any) -> Document:
        document = self._chat(draft, encoding) if draft.is_chat else self._plain(draft, encoding)
        document.supervised[:1] = False  # nothing predicts it
        if not document.supervised.any():
            raise RowError(_NOTHING)
        return document

    def _chat(self, draft: _Draft, encoding: Any) -> Document:
        # The template wrote a BOS if there is to be one: one of ours would double it.
        ids = np.array(encoding.ids, dtype=np.int32)
        supervised = np.full(len(ids), draft.is_inverse)
        for start, end in draft.spans:
            first, last = self._token_at(encoding, start, end), encoding.char_to_token(end)
            after = len(ids) if last is None else last + 1
            supervised[first:after] = not draft.is_inverse
        return Document(ids, supervised)

    def _plain(self, draft: _Draft, encoding: Any) -> Document:
        """A text with the tokens that begin and end texts; a border cuts, as in generation."""
        ((start, end),) = draft.spans
        ids, is_all_text = encoding.ids, draft.is_all_text
        first = 0 if is_all_text else self._token_at(encoding, start, end)
        if not is_all_text and start < end and encoding.token_to_chars(first)[0] < start:
            before, after = self._cut(draft.text, start, ids)
            ids, first = before + after, len(before)
        if self._bos is not None and ids[:1] != [self._bos]:
            ids, first = [self._bos, *ids], first + (start > 0)
        if ids[-1:] != [self._eos]:
            ids = [*ids, self._eos]
        supervised = np.ones(len(ids), dtype=np.bool_)
        supervised[:first] = False
        return Document(np.array(ids, dtype=np.int32), supervised)

    def _cut(self, text: str, start: int, whole: list[int]) -> tuple[list[int], list[int]]:
        """Tokens of a text up to a place and from there, where no token of `whole` begins there.

        SentencePiece begins every text with a space: behind a line break it has none to add.
        """
        before, after = (
            self._backend.encode(part, add_special_tokens=False).ids
            for part in (text[:start], text[start:])
        )
        wanted = self._backend.decode(whole, skip_special_tokens=False)
        if self._backend.decode(before + after, skip_special_tokens=False) == wanted:
            return before, after
        led = self._backend.encode(f"\n{text[start:]}", add_special_tokens=False)
        after = [token for token, (at, _) in zip(led.ids, led.offsets, strict=True) if at]
        if self._backend.decode(before + after, skip_special_tokens=False) == wanted:
            return before, after
        raise RowError("the tokenizer cannot cut the text between `prompt` and `completion`")

    def _token_at(self, encoding: Any, start: int, end: int) -> int:
        """The first token of a span: it may begin before it, with white space, but no special."""
        for at in range(start, end + 1):
            token: int | None = encoding.char_to_token(at)
            if token is not None:
                begins_before = encoding.token_to_chars(token)[0] < start
                return token + (begins_before and encoding.ids[token] in self._special)
        return len(encoding.ids)

    def _checked(self, tokens: Tokens) -> Document:
        ids, size = np.array(tokens.ids, dtype=np.int64), len(self._tokenizer)
        if ids.size and (ids.min() < 0 or ids.max() >= size):
            raise RowError(f"`input_ids` has an id outside of the model's {size} tokens")
        supervised = np.array(tokens.supervised, dtype=np.bool_)
        supervised[:1] = False
        if not supervised.any():
            raise RowError(_NOTHING)
        return Document(ids.astype(np.int32), supervised)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800" is valid JSON and no character
        return False
    return True
