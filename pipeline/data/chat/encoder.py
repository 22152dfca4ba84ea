"""Encoder: tokenises an example and computes its loss mask.

The chat template renders a conversation as a whole, and the text is tokenised once. The supervised
span of an assistant turn is the text that the model has to generate, including its end-of-turn
token.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config.settings import RunSettings
from pipeline.data.chat.template import (
    Span,
    apply_chat_template_setting,
    chatml,
    load_template,
    read_template,
    require_generation_prompt,
)
from pipeline.data.chat.text_tokens import TextTokenizer, TextTokens
from pipeline.data.chat.tokenizer import (
    end_tokens,
    num_embeddings,
    run_tokenizer,
    special_ids,
    special_pattern,
)
from pipeline.data.chat.turns import Rendered, TurnFinder
from pipeline.errors import UserError
from pipeline.rows.examples import Completion, Conversation, Example, RowError, Text, Tokens
from pipeline.rows.reasoning import closing_tag

if TYPE_CHECKING:  # importing transformers takes seconds, and checking rows needs none of it
    from transformers import PreTrainedTokenizerBase

_NO_END_OF_SEQUENCE = (
    "model: the tokenizer has no end-of-sequence token, so the model would never learn to "
    "stop; set eos_token in tokenizer_config.json"
)
# Prefixes of names in Encoded.token_counts, which documents them.
END_WITHOUT_STOP, INNER_END_WITHOUT_STOP = "end_without_stop ", "inner_end_without_stop "
_NO_SUPERVISED_TOKEN = "no supervised token"
_ALL_EXCLUDED = f"{_NO_SUPERVISED_TOKEN}: every turn that train_on selects has `weight: 0`"
_REASONING_WITHOUT_TEMPLATE = (
    "`completion` has reasoning, which train_on_reasoning: false excludes only in conversations; "
    "give `prompt` and `completion` as lists of messages"
)
_ANSWER_OMITTED = (
    "the chat template omits the whole answer, so the model would learn to answer nothing"
)


@dataclass(frozen=True)
class Document:
    """Token ids and loss mask of T tokens. The first token is never supervised."""

    ids: npt.NDArray[np.int32]  # (T,)
    supervised: npt.NDArray[np.bool_]  # (T,)


@dataclass(frozen=True)
class Encoded:
    """The documents of an example: one, or with split_turns one for each trained turn.

    `token_counts`: counts for the audit, by name:

    - omitted_reasoning: tokens of reasoning that the template omits by design
    - special_tokens_in_text: special tokens in the row's own texts
    - END_WITHOUT_STOP + token: trained turns that end with this token, which stops no generation
    - INNER_END_WITHOUT_STOP + token: the same, for a token that ends only turns before the last one

    Generation stops at the tokens that the tokenizer (eos_token) and generation_config.json name.
    """

    documents: list[Document]
    token_counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Draft:
    """A document before tokenisation: its text, and spans [start, stop) of characters in it.

    `is_chat`: the text was written by a chat template. `spans`: supervised characters, or
    unsupervised ones if `spans_are_unsupervised`. A text without chat template has one span, which
    ends with the text. `reasoning`: characters that are excluded from the supervised ones.
    `ordinary_text`: special tokens in the row's texts, to be tokenised as ordinary text.
    """

    text: str
    spans: Sequence[Span]
    is_chat: bool = False
    spans_are_unsupervised: bool = False
    reasoning: Sequence[Span] = ()
    ordinary_text: Sequence[Span] = ()

    @property
    def is_fully_supervised(self) -> bool:
        """Whether the whole text is supervised, so that token offsets are not needed."""
        return not self.is_chat and self.spans[0][0] == 0


@dataclass(frozen=True)
class _Drafts:
    """The documents of an example before tokenisation, and the counts for the audit."""

    drafts: list[_Draft]
    token_counts: Counter[str]


def chat_template_of(settings: RunSettings) -> str | None:
    """The chat template that the run file sets; None if the model's own is used."""
    if settings.chat_template == "model":
        return None
    if settings.chat_template != "chatml":
        return read_template(settings.chat_template)
    return chatml(run_tokenizer(settings))


class Encoder:
    """Encodes examples as documents, according to the run file's settings.

    Attribute `end_ids`: ids of the end-of-sequence and end-of-turn tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: RunSettings) -> None:
        apply_chat_template_setting(tokenizer, settings.chat_template)
        self._tokenizer, self._settings = tokenizer, settings
        self._num_embeddings = num_embeddings(settings) or len(tokenizer)
        backend: Any = tokenizer.backend_tokenizer
        self._special = special_ids(tokenizer)
        self._special_pattern = special_pattern(self._special)
        self._text_tokenizer = TextTokenizer(backend, self._special.values())
        self._bos: int | None = tokenizer.bos_token_id
        if backend.encode("").ids[:1] != [self._bos]:
            self._bos = None  # it exists, but the tokenizer does not prepend it to texts
        # Cached: the tokenizer computes it at each access, which takes 10 us.
        self._eos: int | None = tokenizer.eos_token_id
        # Whether the template is the tokenizer's separate template for tools -> its turn finder.
        self._finders: dict[bool, TurnFinder] = {}
        self._stops = end_tokens(self._eos, settings.model_folder, self._special)
        ends, inner_ends = {*self._stops}, set[str]()
        for has_tools in (False, True):
            with suppress(UserError):  # no usable chat template; only conversations need one
                finder = self._finder_for(has_tools)
                ends |= finder.ends
                inner_ends |= finder.inner_ends
        self.end_ids = frozenset(self._special[end] for end in ends)
        # Tokens that end trained turns and do not stop generation -> prefix of their counts.
        self._ends_without_stop = {
            end: INNER_END_WITHOUT_STOP if end in inner_ends else END_WITHOUT_STOP
            for end in sorted(ends - {*self._stops})
        }

    def encode(self, example: Example) -> list[Document]:
        """The documents of an example.

        Raises RowError for the row, UserError for the tokenizer or its chat template.
        """
        encoded = self.encode_many([example])[0]
        if isinstance(encoded, RowError):
            raise encoded
        return encoded.documents

    def encode_many(self, examples: Sequence[Example]) -> list[Encoded | RowError]:
        """Encode each example. The result of a rejected example is a RowError with the reason.

        Raises UserError for the tokenizer or its chat template.
        """
        drafted = [self._drafts_or_error(example) for example in examples]
        usable = [row for row in drafted if isinstance(row, _Drafts)]
        tokens = self._tokenise([draft for row in usable for draft in row.drafts])
        results: list[Encoded | RowError] = []
        for example, row in zip(examples, drafted, strict=True):
            if isinstance(row, RowError):
                results.append(row)
                continue
            tokens_of_row = [next(tokens) for _ in row.drafts]
            try:
                if isinstance(example, Tokens):
                    documents = [self._pretokenised_document(example)]
                else:
                    documents = [*map(self._document, row.drafts, tokens_of_row)]
            except RowError as error:
                results.append(error)
            else:
                results.append(Encoded(documents, row.token_counts))
        return results

    def _tokenise(self, drafts: Sequence[_Draft]) -> Iterator[TextTokens]:
        """Yield the tokens of each draft, without offsets if no draft in the batch needs them."""
        batch = [draft for draft in drafts if not draft.ordinary_text]
        with_offsets = not all(draft.is_fully_supervised for draft in batch)
        tokens_of_batch = iter(
            self._text_tokenizer.encode([d.text for d in batch], with_offsets=with_offsets)
        )
        for draft in drafts:
            if draft.ordinary_text:
                prompt_end = None if draft.is_chat else draft.spans[0][0]
                yield self._text_tokenizer.encode_as_text(
                    draft.text, draft.ordinary_text, prompt_end
                )
            else:
                yield next(tokens_of_batch)

    def num_end_tokens(self, supervised: npt.NDArray[np.int32]) -> int:
        """Number of end-of-sequence and end-of-turn tokens in an array of token ids."""
        return sum(int(np.count_nonzero(supervised == end)) for end in self.end_ids)

    def last_answer(self, example: Example) -> tuple[str, str]:
        """The prompt of an example's last answer, and that answer.

        Raises RowError if the example has no prompt and answer.
        """
        if isinstance(example, Completion):
            bos = self._tokenizer.decode([self._bos]) if self._bos is not None else ""
            prompt = example.prompt.removeprefix(str(bos))
            return f"{bos}{prompt}", example.completion
        if not isinstance(example, Conversation):
            raise RowError("no question with an answer")
        roles = [message.role for message in example.messages]
        last = max(i for i, role in enumerate(roles) if role == "assistant")
        until_answer = replace(example, messages=example.messages[: last + 1])
        rendered = self._finder_for(bool(until_answer.tools)).render(until_answer, {last})
        if last not in rendered.turn_spans:
            raise RowError(_ANSWER_OMITTED)
        start, stop = rendered.turn_spans[last][0][0], rendered.turn_spans[last][-1][1]
        (tokens,) = self._text_tokenizer.encode([rendered.text])
        first = self._text_tokenizer.first_token(tokens, start)
        answer = tokens.ids[first : tokens.num_before(stop)]
        prompt = rendered.text[: tokens.offsets[first][0]]
        return prompt, str(self._tokenizer.decode(answer, skip_special_tokens=True))

    def _finder_for(self, has_tools: bool) -> TurnFinder:
        """The turn finder of the chat template; some models have a separate template for tools."""
        is_separate = has_tools and isinstance(self._tokenizer.chat_template, dict)
        if is_separate not in self._finders:
            template = load_template(
                self._tokenizer, self._settings.chat_template_kwargs, has_tools=is_separate
            )
            if self._settings.chat_template not in ("model", "chatml"):
                require_generation_prompt(template)
            self._finders[is_separate] = TurnFinder(template, self._special, self._stops)
        return self._finders[is_separate]

    def _drafts_or_error(self, example: Example) -> _Drafts | RowError:
        token_counts = Counter[str]()
        try:
            drafts = self._drafts(example, token_counts)
        except RowError as error:
            return error
        for draft in drafts:
            if not _is_text(draft.text):
                return RowError("half a surrogate pair, which is not a character")
        return _Drafts(drafts, token_counts)

    def _drafts(self, example: Example, token_counts: Counter[str]) -> list[_Draft]:
        """The drafts of an example, whose counts are added to `token_counts`."""
        if isinstance(example, Tokens):
            return []
        if isinstance(example, Conversation):
            return self._chat_drafts(example, token_counts)
        if self._eos is None:
            raise UserError(_NO_END_OF_SEQUENCE)
        if isinstance(example, Text):
            text, prompt_end, prompt_name, answer_name = example.text, 0, "`text`", "`text`"
        else:
            text, prompt_end = example.prompt + example.completion, len(example.prompt)
            prompt_name, answer_name = "`prompt`", "`completion`"
            if not self._settings.train_on_reasoning and closing_tag(example.completion):
                raise RowError(_REASONING_WITHOUT_TEMPLATE)
        special = [
            (span, prompt_name if span[0] < prompt_end else answer_name)
            for span in self._special_spans(text)
        ]
        ordinary_text = self._ordinary_spans(text, special, token_counts)
        start = 0 if self._settings.train_on == "all" else prompt_end
        return [_Draft(text, [(start, len(text))], ordinary_text=ordinary_text)]

    def _special_spans(self, text: str) -> list[Span]:
        """Special tokens in a text without template, except the BOS and EOS that enclose it."""
        spans = []
        for match in self._special_pattern.finditer(text):
            token_id = self._special[match[0]]
            is_bos = match.start() == 0 and token_id == self._bos
            is_eos = match.end() == len(text) and token_id == self._eos
            if not is_bos and not is_eos:
                spans.append(match.span())
        return spans

    def _ordinary_spans(
        self, text: str, special: Sequence[tuple[Span, str]], token_counts: Counter[str]
    ) -> list[Span]:
        """Apply the setting `special_tokens_in_text` to the special tokens in a row's texts.

        `special`: the span of each token, and the name of the text that contains it. With `as-text`
        their spans are returned, to be tokenised as ordinary text; with `reject` a RowError is
        raised. All tokens are counted.
        """
        if not special:
            return []
        (start, stop), name = special[0]
        if self._settings.special_tokens_in_text == "reject":
            raise RowError(
                f"{name} holds the special token {text[start:stop]}, and special_tokens_in_text is "
                "reject"
            )
        token_counts["special_tokens_in_text"] = len(special)
        is_text = self._settings.special_tokens_in_text == "as-text"
        return [span for span, _ in special] if is_text else []

    def _chat_drafts(self, conversation: Conversation, token_counts: Counter[str]) -> list[_Draft]:
        finder = self._finder_for(bool(conversation.tools))
        trained = self._trained_turns(conversation)
        if not trained and self._settings.train_on != "all":
            raise RowError(_ALL_EXCLUDED)
        omitted: list[str] = []
        if self._settings.split_turns:
            drafts = []
            for i in trained:
                until_turn = replace(conversation, messages=conversation.messages[: i + 1])
                rendered = finder.render(until_turn, {i})
                drafts.append(self._chat_draft(until_turn, rendered, [i], token_counts))
                omitted += rendered.omitted.get(i, ())
        else:
            rendered = finder.render(conversation, set(trained))
            drafts = [self._chat_draft(conversation, rendered, trained, token_counts)]
            omitted += (text for texts in rendered.omitted.values() for text in texts)
        if omitted:
            tokens = self._text_tokenizer.encode(omitted, with_offsets=False)
            token_counts["omitted_reasoning"] = sum(
                len(tokens_of_text.ids) for tokens_of_text in tokens
            )
        return drafts

    def _trained_turns(self, conversation: Conversation) -> list[int]:
        """Indexes of the assistant messages to train on."""
        turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        if self._settings.train_on == "last-assistant":
            turns = turns[-1:]
        return [i for i in turns if conversation.messages[i].is_trained]

    def _chat_draft(
        self,
        conversation: Conversation,
        rendered: Rendered,
        trained: Sequence[int],
        token_counts: Counter[str],
    ) -> _Draft:
        settings = self._settings
        if any(i not in rendered.turn_spans for i in trained):
            raise RowError(_ANSWER_OMITTED)
        self._count_ends_without_stop(rendered, trained, token_counts)
        # With split_turns, each document replaces this count; the last one contains all texts.
        ordinary_text = self._ordinary_spans(rendered.text, rendered.special, token_counts)
        spans_are_unsupervised = settings.train_on == "all"
        messages = trained  # indexes of the messages whose spans the draft gets
        if spans_are_unsupervised:
            messages = [i for i, m in enumerate(conversation.messages) if not m.is_trained]
        reasoning: list[Span] = []
        if not settings.train_on_reasoning:
            reasoning = [span for i in trained for span in rendered.reasoning[i]]
        return _Draft(
            rendered.text,
            [span for i in messages for span in rendered.turn_spans.get(i, ())],
            is_chat=True,
            spans_are_unsupervised=spans_are_unsupervised,
            reasoning=reasoning,
            ordinary_text=ordinary_text,
        )

    def _count_ends_without_stop(
        self, rendered: Rendered, trained: Sequence[int], token_counts: Counter[str]
    ) -> None:
        """Count the trained turns that end with a token at which generation does not stop."""
        turn_ends = [rendered.turn_spans[i][-1][1] for i in trained]
        for token, prefix in self._ends_without_stop.items():
            if count := sum(rendered.text.endswith(token, 0, end) for end in turn_ends):
                token_counts[f"{prefix}{token} ({self._special[token]})"] += count

    def _document(self, draft: _Draft, tokens: TextTokens) -> Document:
        """The document of a draft. Raises RowError if no token is supervised."""
        encode = self._chat_document if draft.is_chat else self._text_document
        document = encode(draft, tokens)
        if len(document.ids) and (largest := int(document.ids.max())) >= self._num_embeddings:
            raise RowError(
                f"the row has the token {self._tokenizer.decode([largest])!r} ({largest}), but the "
                f"model has embeddings for {self._num_embeddings} tokens only; use the tokenizer "
                "of this model, or name the token in new_tokens"
            )
        document.supervised[:1] = False  # no token precedes the first one and predicts it
        if not document.supervised.any():
            raise RowError(_NO_SUPERVISED_TOKEN)
        return document

    def _chat_document(self, draft: _Draft, tokens: TextTokens) -> Document:
        # No BOS is added: the template writes it if the model uses one.
        supervised = np.full(len(tokens.ids), draft.spans_are_unsupervised)
        for start, stop in draft.spans:
            first = self._text_tokenizer.first_token(tokens, start)
            supervised[first : tokens.num_before(stop)] = not draft.spans_are_unsupervised
        for start, stop in draft.reasoning:
            # A token that extends past the end of the reasoning belongs to the answer.
            first = self._text_tokenizer.first_token(tokens, start)
            supervised[first : tokens.first_token_after(stop)] = False
        return Document(np.array(tokens.ids, dtype=np.int32), supervised)

    def _text_document(self, draft: _Draft, tokens: TextTokens) -> Document:
        """The document of a text without chat template, with BOS and EOS.

        A token that spans the end of the prompt is split, because the prompt is tokenised alone in
        generation.
        """
        ((start, end),) = draft.spans
        ids, first = tokens.ids, 0  # `first`: index of the first supervised token
        if not draft.is_fully_supervised:
            first = self._text_tokenizer.first_token(tokens, start)
            if start < end and tokens.offsets[first][0] < start:
                before, after = self._text_tokenizer.split(draft.text, start, ids)
                ids, first = before + after, len(before)
        assert self._eos is not None  # checked when the draft was created
        if self._bos is not None and ids[:1] != [self._bos]:
            ids, first = [self._bos, *ids], first + 1
        if ids[-1:] != [self._eos]:
            ids = [*ids, self._eos]
        supervised = np.ones(len(ids), dtype=np.bool_)
        supervised[:first] = False
        return Document(np.array(ids, dtype=np.int32), supervised)

    def _pretokenised_document(self, tokens: Tokens) -> Document:
        """The document of a row of token ids. Raises RowError if an id is out of range."""
        ids = np.array(tokens.ids, dtype=np.int64)
        size = min(len(self._tokenizer), self._num_embeddings)
        if ids.size and (ids.min() < 0 or ids.max() >= size):
            raise RowError(f"`input_ids` has an id outside of the model's {size} tokens")
        supervised = np.array(tokens.supervised, dtype=np.bool_)
        supervised[:1] = False
        if not supervised.any():
            raise RowError(_NO_SUPERVISED_TOKEN)
        return Document(ids.astype(np.int32), supervised)


def _is_text(text: str) -> bool:
    """Whether all characters of a string can be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800" is valid JSON but not a character
        return False
    return True
