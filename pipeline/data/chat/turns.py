r"""Render a conversation and find the span of each message in the rendered text.

The span of an assistant turn is the text that the model has to generate. It starts after the
generation prompt and ends with the end-of-turn token. Terms, with ChatML's template as the example:

- opening: all text that the template writes between the preceding message and an assistant's text,
  `<|im_end|>\n<|im_start|>assistant\n`
- header: the part of the opening that marks the assistant, `<|im_start|>assistant\n`
- leaf: a string, key or scalar of the row. A rendering records which of its characters come from
  which leaf (leaves.py); all other characters come from the template.
"""

import re
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pipeline.data.chat.extents import (
    Extent,
    MessageExtents,
    generation_blocks,
    locate_messages,
    require_unambiguous,
)
from pipeline.data.chat.leaves import Kind, placeholder, reasoning_blocks
from pipeline.data.chat.omissions import OmissionCheck
from pipeline.data.chat.tags import closing_tags, require_no_doubled_tag
from pipeline.data.chat.template import ChatTemplate, Rendering, Span, common_prefix_length
from pipeline.data.chat.tokenizer import special_pattern
from pipeline.data.chat.traced import TracedSpan
from pipeline.errors import UserError
from pipeline.rows.examples import Conversation, Message, RowError
from pipeline.rows.reasoning import require_opened_reasoning

_NO_END = (
    "chat_template: the chat template ends assistant turns without a special token, so the model "
    "would never learn to stop; use a template that ends them with one, such as {{ eos_token }}"
)
_NO_END_MARKED = (
    "model: the chat template's {% generation %} block does not contain the special token that "
    "ends the turn, so the model would never learn to stop; move {% endgeneration %} after it"
)
_NO_MARK = "model: the chat template's {% generation %} blocks contain no assistant turn"
# Roles of a placeholder conversation that ends with the role of the key; `call` is a tool call.
_ROLES_UP_TO = {
    "system": ("system",),
    "user": ("user",),
    "assistant": ("user", "assistant"),
    "tool": ("user", "call", "tool"),
}
# An empty reasoning block. The opening tag is missing if the generation prompt has it.
_EMPTY_REASONING = re.compile(
    r"\s*(?:<([\w:]*think[\w:]*)>\s*</\1>|</[\w:]*think[\w:]*>|\[THINK\]\s*\[/THINK\])\s*"
)
_SPACE = re.compile(r"\s*")
_CLOSING = re.compile(r"\s*(?:</[\w:]+>|\[/[A-Z_]+\])\s*")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with the spans of its parts. Mapping keys are message indexes.

    `turn_spans`: spans of each message; those of an assistant include the end-of-turn token.
    `reasoning`: spans of the reasoning in assistant turns, including its tags.
    `special`: special tokens inside strings of the row, each with its span and the leaf's name.
    `omitted`: texts of the reasoning that the template omits by design.
    """

    text: str
    turn_spans: Mapping[int, Sequence[Span]]
    reasoning: Mapping[int, Sequence[Span]]
    special: Sequence[tuple[Span, str]]
    omitted: Mapping[int, Sequence[str]]


class TurnFinder:
    """Finds the turns in the output of a chat template.

    The constructor renders placeholder conversations to find out how the template opens and ends
    turns. Parameter `ends`: tokens that stop generation, from the tokenizer (eos_token) and
    generation_config.json. Attribute `ends`: these and the template's end-of-turn tokens.
    """

    def __init__(
        self,
        template: ChatTemplate,
        special: Mapping[str, int],
        ends: Sequence[str],
    ) -> None:
        self._template, self._omission_check = template, OmissionCheck(template)
        self._special = special_pattern(special)
        self._openings: dict[str | None, list[str]] = {}  # preceding role -> _find_openings(role)
        self._leading_roles = self._find_leading_roles()
        self._headers = self._find_headers()
        # Whether a turn has tool calls -> end-of-turn token to append if the text ends without one.
        self._appended_end: dict[bool, str] = {}
        self._known_ends = set(ends)
        # The token that ends all turns but the last, if the last turn ends with another token.
        self.inner_ends = frozenset[str]()
        self.ends = frozenset(self._find_ends() | self._known_ends)

    def render(self, conversation: Conversation, trained: Collection[int]) -> Rendered:
        """Render a conversation and find its turns.

        `trained`: indexes of the messages to train on. Raises RowError if the row cannot be trained
        on as it is.
        """
        rendering = self._template.render(conversation)
        omitted = self._omission_check.omitted_reasoning(conversation, rendering)
        require_no_doubled_tag(rendering)
        located = locate_messages(
            self._template.with_blank_spans(conversation, rendering), conversation
        )
        template_tokens, row_tokens = self._special_tokens(rendering)
        turn_spans: dict[int, list[Span]] = {}
        text, closing = rendering.text, closing_tags(rendering)
        marks_turns = self._template.marks_turns  # with {% generation %} blocks
        blocks = generation_blocks(rendering, conversation) if marks_turns else {}
        for i, extent in located.extents.items():
            message, is_trained = conversation.messages[i], i in trained
            if message.role != "assistant":
                turn_spans[i] = [(extent.start, extent.stop)]
                continue
            if message.content.strip() and not text[extent.start : extent.stop].strip():
                continue  # the message has only reasoning, which the template omitted
            if is_trained:
                require_unambiguous(i, located)
            if is_trained and i in closing:
                prompts = "".join(self._openings_after(extent.previous_role))
                before = prompts + text[extent.previous_stop : closing[i].start()]
                require_opened_reasoning(closing[i], before, f"messages[{i}].content")
            end = self._end_of_turn(template_tokens, extent)
            if end is None and is_trained:
                text, end = self._with_end(text, message, extent)
            if marks_turns:
                turn_spans[i] = _marked_spans(blocks.get(i, []), end, is_trained)
            else:
                start = self._start_of_turn(message, extent, text, is_trained)
                turn_spans[i] = [(start, end or extent.stop)]
        assistant_spans = {
            i: spans
            for i, spans in turn_spans.items()
            if conversation.messages[i].role == "assistant"
        }
        reasoning = self._reasoning_spans(conversation, rendering, assistant_spans)
        return Rendered(text, turn_spans, reasoning, row_tokens, omitted)

    # Probes of the template with placeholder conversations

    def _find_leading_roles(self) -> tuple[str, ...]:
        """Roles with which a conversation must begin: `system` if the template requires it."""
        first_error = None
        for leading_roles in ((), ("system",)):
            try:
                _, located = self._probe(*leading_roles, "user", "assistant")
            except RowError as error:
                first_error = first_error or error
                continue
            assistant = len(leading_roles) + 1  # its message index
            if assistant not in located.extents:
                raise UserError("model: the chat template does not write assistant messages")
            return leading_roles
        raise UserError(
            f"model: the chat template cannot write a question and its answer: {first_error}"
        )

    def _probe(
        self, *roles: str, add_generation_prompt: bool = False
    ) -> tuple[Rendering, MessageExtents]:
        """Render a placeholder conversation. Raises RowError if the template refuses the roles."""
        conversation = placeholder(*roles)
        rendering = self._template.render(conversation, add_generation_prompt=add_generation_prompt)
        return rendering, locate_messages(rendering, conversation)

    def _text_after(self, *roles: str, add_generation_prompt: bool = False) -> str | None:
        """Text after the last message of a placeholder conversation.

        None if the template refuses the roles or does not write the message.
        """
        try:
            rendering, located = self._probe(
                *self._leading_roles, *roles, add_generation_prompt=add_generation_prompt
            )
        except RowError:
            return None
        last = located.extents.get(len(self._leading_roles) + len(roles) - 1)
        return rendering.text[last.stop :] if last is not None else None

    def _text_before(self, *roles: str, index: int) -> str | None:
        """Text between message `index` of a placeholder conversation and the message before it.

        None if the template refuses the roles or does not write one of the two messages.
        """
        try:
            rendering, located = self._probe(*self._leading_roles, *roles)
        except RowError:
            return None
        index += len(self._leading_roles)
        extent = located.extents.get(index)
        if extent is None or (index > 0 and index - 1 not in located.extents):
            return None
        return rendering.text[extent.previous_stop : extent.start]

    def _openings_after(self, role: str | None) -> list[str]:
        """Possible openings of an assistant turn after a message of this role, longest first.

        `role`: None for a turn at the start of the text.
        """
        if role not in self._openings:
            openings = self._find_openings(role)
            self._openings[role] = sorted(set(openings), key=len, reverse=True)
        return self._openings[role]

    def _find_openings(self, role: str | None) -> list[str]:
        """Find the openings after a role, from the generation prompt and from the turns' gaps.

        A gap is the text between the preceding message and an assistant's text.
        """
        roles = _ROLES_UP_TO.get(role, ("user", "assistant")) if role is not None else ()
        if role == "system" and self._leading_roles:
            roles = ()  # the leading roles have the system message
        last_and_earlier_turn = [
            self._text_before(*roles, "assistant", index=len(roles)),
            self._text_before(*roles, "assistant", "user", "assistant", index=len(roles)),
        ]
        gaps = sorted({gap for gap in last_and_earlier_turn if gap is not None}, key=len)
        prompt = self._text_after(*roles, add_generation_prompt=True) if roles else None
        if prompt is None or not gaps:
            return gaps[:1]
        shared = self._shared_header(prompt, gaps[0])
        if prompt != self._text_after(*roles):  # the template reads add_generation_prompt
            return [prompt, shared, *(gap for gap in gaps if prompt.startswith(gap))]
        # The template always writes the generation prompt.
        if prompt and gaps[0].startswith(prompt) and gaps[0][len(prompt) :].isspace():
            return [prompt]  # the model has to write the space between it and the answer (Mistral)
        return [shared] if shared and not gaps[0].startswith(prompt) else gaps[:1]

    def _shared_header(self, opening: str, gap: str) -> str:
        """The common prefix of an opening and the text before an assistant's text.

        It ends with the last special token or line that both have. Empty if they share no special
        token. Also empty if `opening` continues with a word after the prefix: then the two texts
        are headers of different roles.
        """
        common = opening[: common_prefix_length(opening, gap)]
        token_ends = [
            match.end()
            for match in self._special.finditer(opening)
            if match.end() <= len(common) and gap.startswith(match[0], match.start())
        ]
        header_end = max(token_ends[-1], common.rfind("\n") + 1) if token_ends else 0
        is_complete = opening[header_end:].lstrip()[:1] in ("", "<", "[")
        return opening[:header_end] if is_complete else ""

    def _find_headers(self) -> list[str]:
        """The headers of assistant turns: their openings without the end of the preceding turn."""
        after_user = self._text_after("user") or ""
        between_users = self._text_before("user", "user", index=1) or ""
        headers = []
        for opening in self._openings_after("user"):
            # The end of a user's turn is also written after a user message that nothing follows.
            # But a template that always writes the generation prompt (Command R) writes the whole
            # opening there; it writes the end of the turn alone between two user messages.
            end_of_turn = between_users if after_user.startswith(opening) else after_user
            header_start = common_prefix_length(opening, end_of_turn)
            for match in self._special.finditer(opening):
                if match.start() < header_start < match.end():  # inside of a special token
                    header_start = match.start()
            headers.append(opening[header_start:])
        return [header for header in headers if self._special.search(header)]

    def _find_ends(self) -> set[str]:
        """End-of-turn tokens, which the template writes after answers and tool calls.

        Also sets `inner_ends` and `_appended_end`. Raises UserError if there is no such token.
        """
        ends: set[str] = set()
        inner_end = self._end_token_in(self._text_before("user", "assistant", "user", index=2))
        if inner_end is not None:
            ends.add(inner_end)
        final_end = self._end_token_in(self._text_after("user", "assistant"), preferred=ends)
        if final_end is not None:
            ends.add(final_end)
        if not ends:
            raise UserError(_NO_END)
        if final_end is None and inner_end is not None:
            self._appended_end[False] = inner_end
        if final_end is not None and inner_end is not None:
            self.inner_ends = frozenset({inner_end} - {final_end})
        if self._template.marks_turns:
            self._require_marked_end(ends | self._known_ends)
        after_call = self._text_after("user", "call")
        call_end = self._end_token_in(self._end_of_call(after_call), preferred=ends)
        if call_end is not None:
            ends.add(call_end)
            if after_call is not None and self._end_token_in(after_call, preferred=ends) is None:
                self._appended_end[True] = call_end
        return ends

    def _end_of_call(self, after_call: str | None) -> str | None:
        """The text between a tool call and its result, from the end-of-turn token onwards.

        `after_call`: the text after a call without a result. The markup of a call may contain
        special tokens before its end-of-turn token. Therefore the last special token counts that
        both texts have before they differ.
        """
        before_result = self._text_before("user", "call", "tool", index=2)
        if before_result is None or after_call is None:
            return before_result
        shared = before_result[: common_prefix_length(before_result, after_call)]
        starts = [match.start() for match in self._special.finditer(shared)]
        return before_result[starts[-1] if starts else 0 :]

    def _end_token_in(self, text: str | None, preferred: Collection[str] = ()) -> str | None:
        """The end-of-turn token in the text that follows a turn; None if it has none.

        This is a token of `preferred`, else a token of `_known_ends`, else the first special token
        of the text, unless that token is in a header of assistant turns.
        """
        tokens = [match[0] for match in self._special.finditer(text or "")]
        for ends in (preferred, self._known_ends):
            for token in tokens:
                if token in ends:
                    return token
        in_headers = {token for header in self._headers for token in self._special.findall(header)}
        return tokens[0] if tokens and tokens[0] not in in_headers else None

    def _require_marked_end(self, ends: set[str]) -> None:
        """Raise UserError unless {% generation %} blocks contain an end-of-turn token."""
        rendering, _ = self._probe(*self._leading_roles, "user", "assistant")
        if not rendering.generated:
            raise UserError(_NO_MARK)
        marked = "".join(rendering.text[start:stop] for start, stop in rendering.generated)
        if not any(match[0] in ends for match in self._special.finditer(marked)):
            raise UserError(_NO_END_MARKED)

    # Spans of the turns of a row

    def _special_tokens(
        self, rendering: Rendering
    ) -> tuple[list[tuple[Span, str]], list[tuple[Span, str]]]:
        """Special tokens from the template (span, token) and from the row (span, leaf's name)."""
        spans = rendering.spans
        starts = [span.start for span in spans]
        from_template: list[tuple[Span, str]] = []
        from_row: list[tuple[Span, str]] = []
        for match in self._special.finditer(rendering.text):
            last = bisect_left(starts, match.end()) - 1  # last span that starts before the end
            if last >= 0 and spans[last].stop > match.start():
                from_row.append((match.span(), rendering.leaves[spans[last].source].name))
            else:
                from_template.append((match.span(), match[0]))
        return from_template, from_row

    def _end_of_turn(
        self, template_tokens: Sequence[tuple[Span, str]], extent: Extent
    ) -> int | None:
        """Offset after the turn's end-of-turn token; None if it has none."""
        first = bisect_left(template_tokens, ((extent.stop, 0), ""))  # first token after the turn
        for (start, stop), token in template_tokens[first:]:
            if start >= extent.next_start:
                return None
            if token in self.ends:
                return stop
        return None

    def _with_end(self, text: str, message: Message, extent: Extent) -> tuple[str, int]:
        """Append the end-of-turn token, which some templates write only before another message.

        Returns the text and its new end. Raises RowError if the turn is not the last one.
        """
        added = self._appended_end.get("tool_calls" in message.others)
        if added is None or extent.next_start < len(text):
            raise RowError(
                f"the chat template does not end every assistant turn with one of "
                f"{', '.join(sorted(self.ends))}"
            )
        return text + added, len(text) + len(added)

    def _start_of_turn(self, message: Message, extent: Extent, text: str, is_trained: bool) -> int:
        """Offset at which the span of an assistant turn starts: after its generation prompt."""
        opening_end = self._opening_end(extent, text)
        # The opening of a conversation's first message may end with markup that the model has to
        # write. There, a turn starts after a header, if the text has one.
        search_start = opening_end
        if search_start is None or extent.previous_role is None:
            search_start = extent.previous_stop
        header_ends = [
            offset + len(header)
            for header in self._headers
            if header and (offset := text.rfind(header, search_start, extent.start)) >= 0
        ]
        if header_ends:
            return max(header_ends)
        if opening_end is not None:
            return opening_end
        if not message.others or not is_trained:
            return extent.start
        raise RowError(
            "the start of an assistant turn with reasoning or tool calls is ambiguous in the chat "
            "template's output"
        )

    def _opening_end(self, extent: Extent, text: str) -> int | None:
        """Offset after the opening of a turn; None if the text before it is not a known opening."""
        openings = self._openings_after(extent.previous_role)
        for opening in openings:
            if not opening and extent.previous_stop != extent.start:
                continue  # an empty opening, but the template writes text there
            if text.startswith(opening, extent.previous_stop):
                return min(extent.previous_stop + len(opening), extent.stop)
        for opening in openings:
            if shared := self._shared_header(opening, text[extent.previous_stop : extent.start]):
                return extent.previous_stop + len(shared)
        return None

    def _reasoning_spans(
        self,
        conversation: Conversation,
        rendering: Rendering,
        turn_spans: Mapping[int, Sequence[Span]],
    ) -> dict[int, list[Span]]:
        """Spans of the reasoning in each turn of `turn_spans`, including its tags."""
        text, spans_by_message = rendering.text, dict[int, list[Span]]()
        for i, spans in turn_spans.items():
            match = _EMPTY_REASONING.match(text, spans[0][0]) if spans else None
            spans_by_message[i] = [match.span()] if match else []
        blocks = {i: list(reasoning_blocks(conversation.messages[i])) for i in turn_spans}
        previous_stop = 0  # end of the preceding span
        for span in rendering.spans:
            leaf = rendering.leaves[span.source]
            i = leaf.message
            if turn_spans.get(i):
                turn_start, turn_stop = turn_spans[i][0][0], turn_spans[i][-1][1]
                # The template's opening tag is between the preceding span and this one.
                tag_start = max(previous_stop, min(turn_start, span.start))
                reasoning: list[Span] = []
                if leaf.kind is Kind.REASONING:
                    reasoning = [(tag_start, span.stop)]
                elif leaf.kind is Kind.CONTENT:
                    reasoning = _blocks_in_span(span, [block for block, _ in blocks[i]], tag_start)
                spans_by_message[i] += [
                    (start, self._after_closing_tag(text, stop, turn_stop))
                    for start, stop in reasoning
                ]
            previous_stop = span.stop
        return spans_by_message

    def _after_closing_tag(self, text: str, stop: int, limit: int) -> int:
        """Offset after the closing tag and white space that follow reasoning.

        `stop`: end of the reasoning. `limit`: a tag that ends here or later does not count.
        """
        match = _CLOSING.match(text, stop) or self._special.match(text, stop)
        if match is None or match.end() >= limit:
            match = _SPACE.match(text, stop)
        return match.end() if match is not None else stop


def _blocks_in_span(span: TracedSpan, blocks: Sequence[Span], tag_start: int) -> list[Span]:
    """Offsets in the rendered text of the reasoning blocks in one span of a message's content.

    `blocks`: their offsets in the content. `tag_start`: start of the first block if the span begins
    inside of it, because the template has written the opening tag.
    """
    return [
        (
            tag_start if block_start <= span.first else span.start + block_start - span.first,
            span.stop - max(0, span.last - block_stop),
        )
        for block_start, block_stop in blocks
        if block_start < span.last and block_stop > span.first
    ]


def _marked_spans(blocks: list[Span], end: int | None, is_trained: bool) -> list[Span]:
    """The {% generation %} blocks of a turn, cut off at its end.

    Raises RowError if the turn is trained and its end is in none of them.
    """
    if is_trained and not any(start < (end or 0) <= stop for start, stop in blocks):
        raise RowError(
            "the chat template's {% generation %} block does not contain the end of an assistant "
            "turn"
        )
    return [(start, stop if end is None else min(stop, end)) for start, stop in blocks]
