"""Conversation -> its one rendering, and which characters of it each message owns.

Where the template marks assistant turns ({% generation %}) its marks say it, else the pattern of
the conversation's shape: that is found once and kept, so that a row is rendered once.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.data.chat.patterns import (
    EndOfTurn,
    NoPattern,
    Pattern,
    make_pattern,
    refuse_lost_content,
    refuse_what_is_left_out,
    shape,
)
from pipeline.data.chat.template import ChatTemplate, Span, as_template_gets_it
from pipeline.errors import UserError
from pipeline.rows.formats import Conversation, Message, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_PATTERNS = 4096
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing to transformers
_NO_END = (
    "model: the chat template ends assistant turns without a special token, so the model would "
    "never learn to stop; use a template that ends them with one, such as ChatML's <|im_end|>"
)
_NO_END_MARKED = (
    "model: the chat template's {% generation %} block leaves out the special token that ends the "
    "turn, so the model would never learn to stop; move {% endgeneration %} behind it"
)
_NO_MARK = "model: the chat template's {% generation %} marks no assistant turn"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and what of it belongs to whom.

    `owned`: message -> its characters; those of an assistant end before the end-of-turn token.
    Of other messages only the content counts, where it is known.
    """

    text: str
    owned: Mapping[int, Span]


class TurnFinder:
    """The chat template of a tokenizer, with what is known of how it writes turns."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._template = ChatTemplate(tokenizer)
        self._ids = special_ids(tokenizer)
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._patterns: dict[tuple[Any, ...], Pattern | None] = {}
        self._are_written: dict[tuple[Any, ...], bool] = {}  # of a template with marks

    @cached_property
    def end(self) -> EndOfTurn:
        """The token that ends assistant turns. Raises UserError where there is none."""
        user, assistant = (
            {"role": role, "content": f"the {role} says this"} for role in ("user", "assistant")
        )
        text, marked = self._probe([user, assistant])
        said = list(re.finditer(assistant["content"], text, re.IGNORECASE))
        if not said:
            raise UserError("model: the chat template leaves out what the assistant says")
        found = self._special.search(text, said[-1].end())
        if found is None:
            raise UserError(_NO_END)
        if self._template.marks_turns:
            if not marked:
                raise UserError(_NO_MARK)
            if not any(start <= found.start() < end for start, end in marked):
                raise UserError(_NO_END_MARKED)
        return EndOfTurn(found[0], self._ids[found[0]])

    def render(self, conversation: Conversation) -> Rendered:
        """Raises RowError for the conversation, UserError for the template."""
        _refuse_unknown_parts(conversation, self._template)
        if self._template.marks_turns:
            return self._by_marks(conversation)
        end = self.end
        key = shape(conversation)
        if key not in self._patterns:
            if len(self._patterns) >= _MOST_PATTERNS:
                self._patterns.clear()
            self._patterns[key] = self._pattern(conversation, end)
        text = self._render(conversation)
        pattern = self._patterns[key]
        contents = [message.content for message in conversation.messages]
        spans = pattern.skeleton.fit(text, contents) if pattern is not None else None
        if pattern is None or spans is None:
            pattern = make_pattern(conversation, self._template, end, self._special, is_own=True)
            spans = pattern.skeleton.fit(text, contents)
        if spans is None:
            raise RowError(
                "the chat template changes the text around an assistant turn with its content, so "
                "which tokens the turn owns is not certain"
            )
        return Rendered(text, _owned(pattern, spans))

    def _pattern(self, conversation: Conversation, end: EndOfTurn) -> Pattern | None:
        try:
            return make_pattern(conversation, self._template, end, self._special, is_own=False)
        except NoPattern:
            raise
        except RowError:  # perhaps of the markers; this conversation's own pattern will say
            return None

    def _render(self, conversation: Conversation) -> str:
        messages = [as_template_gets_it(message) for message in conversation.messages]
        return self._template.render(messages, conversation.tools)

    def _by_marks(self, conversation: Conversation) -> Rendered:
        end = self.end
        messages = [as_template_gets_it(message) for message in conversation.messages]
        text, marked = self._template.render_marked(messages, conversation.tools)
        self._refuse_what_is_left_out(conversation, text)
        turns = [i for i, message in enumerate(conversation.messages) if _is_assistant(message)]
        if len(marked) != len(turns):
            raise RowError(
                f"the chat template marks {len(marked)} pieces of {len(turns)} assistant turns, so "
                "which tokens a turn owns is not certain"
            )
        owned = {}
        for i, (start, stop) in zip(turns, marked, strict=True):
            at = text.rfind(end.text, start, stop)
            if at < 0:
                raise RowError(
                    "the chat template's {% generation %} block leaves out the end of an assistant "
                    "turn"
                )
            owned[i] = start, at
        return Rendered(text, owned)

    def _refuse_what_is_left_out(self, conversation: Conversation, text: str) -> None:
        """Marks say what is an answer's, not that the rest is there: markers do, once a shape."""
        key = shape(conversation)
        if key not in self._are_written:
            if len(self._are_written) >= _MOST_PATTERNS:
                self._are_written.clear()
            try:
                refuse_what_is_left_out(conversation, self._template, self.end, self._special)
            except NoPattern:
                raise
            except RowError:  # of the markers
                self._are_written[key] = False
            else:
                self._are_written[key] = True
        if not self._are_written[key]:
            for message in conversation.messages:
                refuse_lost_content(message, text)

    def _probe(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Span]]:
        try:
            return self._template.render_marked(messages)
        except RowError as refused:
            system = {"role": "system", "content": "s"}
            try:
                return self._template.render_marked([system, *messages])
            except RowError:
                raise UserError(
                    f"model: a question and its answer cannot be written: {refused}"
                ) from None


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Special tokens by text. Llama 3's <|eot_id|> is special in tokenizer.json only."""
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    ids = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return added | dict(ids)


def _refuse_unknown_parts(conversation: Conversation, template: ChatTemplate) -> None:
    """Raise NoPattern for tools or parts of an answer of which the template does not even speak."""
    if conversation.tools and not template.has_tools():
        raise NoPattern("the chat template has no place for tools")
    for message in conversation.messages:
        if message.role != "assistant":
            continue
        for key, value in message.others.items():
            names = _REASONING if key in _REASONING else (key,)
            if value and key != "name" and not any(map(template.reads, names)):
                raise NoPattern(f"the chat template leaves out `{key}` of a message")


def _owned(pattern: Pattern, spans: Sequence[Span]) -> dict[int, Span]:
    owned: dict[int, Span] = {}
    for hole, span in zip(pattern.skeleton.holes, spans, strict=True):
        if hole.message is not None and hole.is_content:
            owned[hole.message] = span
    for message, (hole_index, distance) in pattern.turns.items():
        start, end = spans[hole_index]
        owned[message] = start, end + distance
    return owned


def _is_assistant(message: Message) -> bool:
    return message.role == "assistant"
