"""Encoder: tokenises an example and computes its loss mask.

The chat template renders a conversation as a whole, and the text is tokenised once. The supervised
span of an assistant turn is the text that the model has to generate, including its end-of-turn
token.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from operator import itemgetter
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
)
from pipeline.data.chat.tokenizer import (
    end_tokens,
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
# Prefixes of names in Encoded.token_counts.
END_WITHOUT_STOP, INNER_END_WITHOUT_STOP = "end_without_stop ", "inner_end_without_stop "
_NO_SUPERVISED_TOKEN = "no supervised token"
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
    """

    documents: list[Document]
    token_counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Draft:
    """A document before tokenisation.

    `spans`: supervised characters, or unsupervised ones if `spans_are_unsupervised`. A text without
    chat template has one span, which ends with the text. `reasoning`: unsupervised reasoning.
    `ordinary_text`: spans of special tokens in the row's texts, to be tokenised as ordinary text.
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
class _Tokens:
    """Token ids and the character offsets of each token."""

    ids: list[int]
    offsets: list[Span]

    def first_token_after(self, start: int) -> int:
        """Index of the first token that ends after this character offset."""
        return bisect_right(self.offsets, start, key=itemgetter(1))

    def num_before(self, stop: int) -> int:
        """Number of tokens that start before this character offset."""
        return bisect_left(self.offsets, stop, key=itemgetter(0))


def chat_template_of(settings: RunSettings) -> str | None:
    """The chat template that the run file sets; None if the model's own is used."""
    if settings.chat_template == "model":
        return None
    if settings.chat_template != "chatml":
        return read_template(settings.chat_template)
    return chatml(run_tokenizer(settings))


class Encoder:
    """Encodes examples as documents, according to the run file's settings.

    `ends`: ids of the end-of-sequence and end-of-turn tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: RunSettings) -> None:
        apply_chat_template_setting(tokenizer, settings.chat_template)
        self._tokenizer, self._settings = tokenizer, settings
        self._backend: Any = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special = special_ids(tokenizer)
        self._special_ids = frozenset(self._special.values())
        self._special_pattern = special_pattern(self._special)
        self._bos: int | None = tokenizer.bos_token_id
        if self._backend.encode("").ids[:1] != [self._bos]:
            self._bos = None  # it exists, but the tokenizer does not prepend it to texts
        # Cached: the tokenizer computes it at each access, which takes 10 us.
        self._eos: int | None = tokenizer.eos_token_id
        self._finders: dict[bool, TurnFinder] = {}
        self._stops = end_tokens(self._eos, settings.model_folder, self._special)
        ends = dict.fromkeys(self._stops, "")
        for has_tools in (False, True):
            with suppress(UserError):  # the template is wrong; only conversations need it
                finder = self._finder_for(has_tools)
                ends = dict.fromkeys(finder.ends, END_WITHOUT_STOP) | ends
                ends |= dict.fromkeys(finder.inner_ends - {*self._stops}, INNER_END_WITHOUT_STOP)
        self.ends = frozenset(self._special[end] for end in ends)
        # Tokens that end trained turns and do not stop generation -> prefix of their counts.
        self._ends_without_stop = {end: prefix for end, prefix in ends.items() if prefix}

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
        rows = [self._drafts_or_error(example) for example in examples]
        drafts = [draft for row in rows if not isinstance(row, RowError) for draft in row[0]]
        whole = [draft for draft in drafts if not draft.ordinary_text]
        # Offsets take 10 % of the tokenisation time (2026-11-25).
        is_fast = all(draft.is_fully_supervised for draft in whole)
        encode = self._backend.encode_batch_fast if is_fast else self._backend.encode_batch
        encodings = encode([draft.text for draft in whole], add_special_tokens=False)
        tokens = (_Tokens(e.ids, [] if is_fast else e.offsets) for e in encodings)
        results: list[Encoded | RowError] = []
        for example, row in zip(examples, rows, strict=True):
            if isinstance(row, RowError):
                results.append(row)
                continue
            pairs = [
                (d, self._tokenise_as_text(d) if d.ordinary_text else next(tokens)) for d in row[0]
            ]
            try:
                if isinstance(example, Tokens):
                    documents = [self._pretokenised_document(example)]
                else:
                    documents = [
                        self._document(draft, tokens_of_draft) for draft, tokens_of_draft in pairs
                    ]
            except RowError as error:
                results.append(error)
            else:
                results.append(Encoded(documents, row[1]))
        return results

    def num_ends(self, supervised: npt.NDArray[np.int32]) -> int:
        """Number of end-of-sequence and end-of-turn tokens in an array of token ids."""
        return sum(int(np.count_nonzero(supervised == end)) for end in self.ends)

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
        last = max(i for i, message in enumerate(example.messages) if message.role == "assistant")
        until_answer = replace(example, messages=example.messages[: last + 1])
        rendered = self._finder_for(bool(until_answer.tools)).render(until_answer, {last})
        if last not in rendered.turn_spans:
            raise RowError(_ANSWER_OMITTED)
        start, stop = rendered.turn_spans[last][0][0], rendered.turn_spans[last][-1][1]
        encoding = self._backend.encode(rendered.text, add_special_tokens=False)
        tokens = _Tokens(encoding.ids, encoding.offsets)
        first = self._first_token(tokens, start)
        answer = tokens.ids[first : tokens.num_before(stop)]
        prompt = rendered.text[: tokens.offsets[first][0]]
        return prompt, str(self._tokenizer.decode(answer, skip_special_tokens=True))

    def _finder_for(self, has_tools: bool) -> TurnFinder:
        """The turn finder of the chat template; some models have a separate template for tools."""
        has_own = has_tools and isinstance(self._tokenizer.chat_template, dict)
        if has_own not in self._finders:
            template = load_template(
                self._tokenizer, self._settings.chat_template_kwargs, has_tools=has_own
            )
            self._finders[has_own] = TurnFinder(template, self._special, self._stops)
        return self._finders[has_own]

    def _drafts_or_error(self, example: Example) -> tuple[list[_Draft], Counter[str]] | RowError:
        token_counts = Counter[str]()
        try:
            drafts = self._drafts(example, token_counts)
        except RowError as error:
            return error
        for draft in drafts:
            if not _is_text(draft.text):
                return RowError("half a surrogate pair, which is no character")
        return drafts, token_counts

    def _drafts(self, example: Example, token_counts: Counter[str]) -> list[_Draft]:
        if isinstance(example, Tokens):
            return []
        if isinstance(example, Conversation):
            return self._chat_drafts(example, token_counts)
        if self._eos is None:
            raise UserError(_NO_END_OF_SEQUENCE)
        if isinstance(example, Text):
            text, border, names = example.text, 0, ("`text`", "`text`")
        else:
            text, border = example.prompt + example.completion, len(example.prompt)
            names = ("`prompt`", "`completion`")
            if not self._settings.train_on_reasoning and closing_tag(example.completion):
                raise RowError(_REASONING_WITHOUT_TEMPLATE)
        special = self._special_in(text)
        named = [(span, names[span[0] >= border]) for span in special]
        ordinary_text = self._ordinary_spans(text, named, token_counts)
        start = 0 if self._settings.train_on == "all" else border
        return [_Draft(text, [(start, len(text))], ordinary_text=ordinary_text)]

    def _special_in(self, text: str) -> list[Span]:
        """Special tokens in a text without template, except the BOS and EOS that enclose it."""
        ids = self._special
        return [
            match.span()
            for match in self._special_pattern.finditer(text)
            if not (match.start() == 0 and ids[match[0]] == self._bos)
            and not (match.end() == len(text) and ids[match[0]] == self._eos)
        ]

    def _ordinary_spans(
        self, text: str, special: Sequence[tuple[Span, str]], token_counts: Counter[str]
    ) -> list[Span]:
        """Spans of the row's special tokens that are tokenised as ordinary text; counts them all.

        `special`: the span of each special token, and the name of the text that contains it.
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
        finder, trained = (
            self._finder_for(bool(conversation.tools)),
            self._trained_turns(conversation),
        )
        omitted: list[str] = []
        if self._settings.split_turns:
            drafts = []
            for i in trained:
                part = replace(conversation, messages=conversation.messages[: i + 1])
                rendered = finder.render(part, {i})
                drafts.append(self._chat_draft(part, rendered, [i], token_counts))
                omitted += rendered.omitted.get(i, ())
            if not drafts:
                raise RowError(_NO_SUPERVISED_TOKEN)
        else:
            rendered = finder.render(conversation, set(trained))
            drafts = [self._chat_draft(conversation, rendered, trained, token_counts)]
            omitted += (text for texts in rendered.omitted.values() for text in texts)
        if omitted:
            encodings = self._backend.encode_batch_fast(omitted, add_special_tokens=False)
            token_counts["omitted_reasoning"] = sum(map(len, encodings))
        return drafts

    def _trained_turns(self, conversation: Conversation) -> list[int]:
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
        # With split_turns the last document contains all texts, and its count is the one kept.
        ordinary_text = self._ordinary_spans(rendered.text, rendered.special, token_counts)
        spans_are_unsupervised = settings.train_on == "all"
        chosen = trained
        if spans_are_unsupervised:
            chosen = [i for i, m in enumerate(conversation.messages) if not m.is_trained]
        return _Draft(
            rendered.text,
            [span for i in chosen for span in rendered.turn_spans.get(i, ())],
            is_chat=True,
            spans_are_unsupervised=spans_are_unsupervised,
            reasoning=[span for i in trained for span in rendered.reasoning[i]]
            if not settings.train_on_reasoning
            else (),
            ordinary_text=ordinary_text,
        )

    def _count_ends_without_stop(
        self, rendered: Rendered, trained: Sequence[int], token_counts: Counter[str]
    ) -> None:
        ends = [rendered.turn_spans[i][-1][1] for i in trained]
        for token, prefix in self._ends_without_stop.items():
            if count := sum(rendered.text.endswith(token, 0, end) for end in ends):
                token_counts[f"{prefix}{token} ({self._special[token]})"] += count

    def _document(self, draft: _Draft, tokens: _Tokens) -> Document:
        document = (
            self._chat_document(draft, tokens)
            if draft.is_chat
            else self._text_document(draft, tokens)
        )
        document.supervised[:1] = False  # no token precedes the first one and predicts it
        if not document.supervised.any():
            raise RowError(_NO_SUPERVISED_TOKEN)
        return document

    def _chat_document(self, draft: _Draft, tokens: _Tokens) -> Document:
        # No BOS is added: the template writes it if the model uses one.
        supervised = np.full(len(tokens.ids), draft.spans_are_unsupervised)
        for start, stop in draft.spans:
            first = self._first_token(tokens, start)
            supervised[first : tokens.num_before(stop)] = not draft.spans_are_unsupervised
        for start, stop in draft.reasoning:
            # A token that extends past the end of the reasoning belongs to the answer.
            supervised[self._first_token(tokens, start) : tokens.first_token_after(stop)] = False
        return Document(np.array(tokens.ids, dtype=np.int32), supervised)

    def _text_document(self, draft: _Draft, tokens: _Tokens) -> Document:
        """The document of a text without chat template, with BOS and EOS.

        A token that spans the end of the prompt is split, because the prompt is tokenised alone in
        generation.
        """
        ((start, end),) = draft.spans
        ids, is_fully_supervised = tokens.ids, draft.is_fully_supervised
        first = 0 if is_fully_supervised else self._first_token(tokens, start)
        if not is_fully_supervised and start < end and tokens.offsets[first][0] < start:
            before, after = self._tokenise_split(draft.text, start, ids)
            ids, first = before + after, len(before)
        assert self._eos is not None  # checked when the draft was created
        if self._bos is not None and ids[:1] != [self._bos]:
            ids, first = [self._bos, *ids], first + (start > 0)
        if ids[-1:] != [self._eos]:
            ids = [*ids, self._eos]
        supervised = np.ones(len(ids), dtype=np.bool_)
        supervised[:first] = False
        return Document(np.array(ids, dtype=np.int32), supervised)

    def _tokenise_as_text(self, draft: _Draft) -> _Tokens:
        """Tokenise a draft whose special tokens in `ordinary_text` are ordinary text.

        All other special tokens divide the text into segments that are tokenised separately.
        """
        text, at, result = draft.text, 0, _Tokens([], [])
        border = None if draft.is_chat else draft.spans[0][0]  # no token may cross a prompt's end
        ordinary_starts = [start for start, _ in draft.ordinary_text]
        encoding = self._backend.encode(text, add_special_tokens=False)
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if border is not None and start >= border > at:
                self._add_as_text(text, (at, border), result)
                at = border
            is_ordinary = bisect_left(ordinary_starts, stop) > bisect_left(ordinary_starts, start)
            if token in self._special_ids and not is_ordinary:
                self._add_as_text(text, (at, start), result)
                result.ids.append(token)
                result.offsets.append((start, stop))
                at = stop
        self._add_as_text(text, (at, len(text)), result)
        return result

    def _add_as_text(self, text: str, span: Span, tokens: _Tokens) -> None:
        """Tokenise a segment as ordinary text and append its tokens to `tokens`."""
        start, stop = span
        self._backend.encode_special_tokens = True
        try:
            # After a line break, SentencePiece adds no space before the segment.
            encoding = self._backend.encode(f"\n{text[start:stop]}", add_special_tokens=False)
        finally:
            self._backend.encode_special_tokens = False
        for token, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            if last > 1:
                tokens.ids.append(token)
                tokens.offsets.append((start + max(first, 1) - 1, start + last - 1))

    def _tokenise_split(
        self, text: str, start: int, whole: list[int]
    ) -> tuple[list[int], list[int]]:
        """Tokenise the text before and after `start` separately.

        `whole`: ids of the whole text, to which the result must be equivalent. The part after
        `start` may need a line break before it, because SentencePiece adds a space at the start of
        a text, but not after a line break.
        """
        before, after = (
            self._backend.encode(part, add_special_tokens=False).ids
            for part in (text[:start], text[start:])
        )
        expected = self._backend.decode(whole, skip_special_tokens=False)
        if self._backend.decode(before + after, skip_special_tokens=False) == expected:
            return before, after
        encoding = self._backend.encode(f"\n{text[start:]}", add_special_tokens=False)
        after = [token for token, (at, _) in zip(encoding.ids, encoding.offsets, strict=True) if at]
        if self._backend.decode(before + after, skip_special_tokens=False) == expected:
            return before, after
        raise RowError("the tokenizer cannot split the text between `prompt` and `completion`")

    def _first_token(self, tokens: _Tokens, start: int) -> int:
        """Index of the first token of a span.

        The token may begin before the span, unless it is a special token.
        """
        first = tokens.first_token_after(start)
        if first < len(tokens.ids) and tokens.offsets[first][0] < start:
            return first + (tokens.ids[first] in self._special_ids)
        return first

    def _pretokenised_document(self, tokens: Tokens) -> Document:
        ids, size = np.array(tokens.ids, dtype=np.int64), len(self._tokenizer)
        if ids.size and (ids.min() < 0 or ids.max() >= size):
            raise RowError(f"`input_ids` has an id outside of the model's {size} tokens")
        supervised = np.array(tokens.supervised, dtype=np.bool_)
        supervised[:1] = False
        if not supervised.any():
            raise RowError(_NO_SUPERVISED_TOKEN)
        return Document(ids.astype(np.int32), supervised)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800" is valid JSON but not a character
        return False
    return True
