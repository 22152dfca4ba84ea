"""Render a conversation and find the span of each message in the rendered text.

The span of an assistant turn is the text that the model has to generate. It starts after the
generation prompt and ends with the end-of-turn token.
"""

import re
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.data.chat.leaves import TOOLS, Kind, placeholder, reasoning_blocks
from pipeline.data.chat.omissions import OmissionCheck
from pipeline.data.chat.tags import closing_tags, require_no_doubled_tag
from pipeline.data.chat.template import ChatTemplate, Rendering, Span
from pipeline.data.chat.tokenizer import special_pattern
from pipeline.errors import UserError
from pipeline.rows.examples import Conversation, Message, RowError
from pipeline.rows.reasoning import require_opened_reasoning

_NO_END = (
    "model: the chat template ends assistant turns without a special token, so the model would "
    "never learn to stop; use a template that ends them with one, such as ChatML's <|im_end|>"
)
_NO_END_MARKED = (
    "model: the chat template's {% generation %} block does not contain the special token that "
    "ends the turn, so the model would never learn to stop; move {% endgeneration %} after it"
)
_NO_MARK = "model: the chat template's {% generation %} blocks contain no assistant turn"
# An empty reasoning block, possibly without its opening tag, which the generation prompt may have.
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


@dataclass(frozen=True)
class _Extent:
    """Offsets in the rendered text of a message and its neighbours."""

    first: int  # start of its first leaf
    last: int  # end of its last leaf
    before: int  # end of the preceding message's last leaf
    role_before: str | None  # role of the preceding message that is written
    limit: int  # start of the next message's first leaf, or end of the text


@dataclass
class _MessageExtents:
    """Extents of the messages in a rendering, by message index."""

    extents: dict[int, _Extent] = field(default_factory=dict)
    repeated: set[int] = field(default_factory=set)  # messages whose text is written twice
    interleaved: set[int] = field(default_factory=set)  # messages that contain another's text


class TurnFinder:
    """Finds the turns in the output of a chat template.

    The constructor probes the template with placeholder conversations. `ends`: end-of-sequence
    tokens from the tokenizer (eos_token) and generation_config.json.
    """

    def __init__(
        self,
        template: ChatTemplate,
        special: Mapping[str, int],
        ends: Sequence[str],
    ) -> None:
        self._template, self._omission_check = template, OmissionCheck(template)
        self._special = special_pattern(special)
        self._openings: dict[str | None, list[str]] = {}
        self._leading_roles = self._find_leading_roles()
        self._headers = self._find_headers()
        # Whether a turn has tool calls -> end-of-turn token to append if the text ends without one.
        self._appended_end: dict[bool, str] = {}
        self._known_ends = set(ends)
        self.inner_ends = frozenset[str]()  # ends of earlier turns, if the last one has another
        self.ends = frozenset(self._find_ends() | self._known_ends)

    def render(self, conversation: Conversation, trained: Collection[int]) -> Rendered:
        """Render a conversation. Raises RowError if the row cannot be trained on as it is."""
        rendering = self._template.render(conversation)
        omitted = self._omission_check.omitted_reasoning(conversation, rendering)
        require_no_doubled_tag(rendering)
        written = _locate_messages(
            self._template.with_blank_spans(conversation, rendering), conversation
        )
        special, in_texts = self._special_tokens(rendering)
        turn_spans: dict[int, list[Span]] = {}
        text, closing = rendering.text, closing_tags(rendering)
        marks = _generation_blocks(rendering, conversation) if self._template.marks_turns else {}
        for i, extent in written.extents.items():
            message, is_trained = conversation.messages[i], i in trained
            if message.role != "assistant":
                turn_spans[i] = [(extent.first, extent.last)]
                continue
            if message.content.strip() and not text[extent.first : extent.last].strip():
                continue  # the message has only reasoning, which the template omitted
            if is_trained:
                _require_unambiguous(i, written)
            if is_trained and i in closing:
                prompts = "".join(self._openings_after(extent.role_before))
                before = prompts + text[extent.before : closing[i].start()]
                require_opened_reasoning(closing[i], before, f"messages[{i}].content")
            end = self._end_of_turn(special, extent)
            if end is None and is_trained:
                text, end = self._with_end(text, message, extent)
            if self._template.marks_turns:
                turn_spans[i] = _marked_spans(marks.get(i, []), end, is_trained)
            else:
                start = self._start_of(message, extent, text, is_trained)
                turn_spans[i] = [(start, end or extent.last)]
        assistants = [i for i in turn_spans if conversation.messages[i].role == "assistant"]
        reasoning = self._reasoning_spans(
            conversation, rendering, {i: turn_spans[i] for i in assistants}
        )
        return Rendered(text, turn_spans, reasoning, in_texts, omitted)

    # Probes of the template with placeholder conversations

    def _find_leading_roles(self) -> tuple[str, ...]:
        """Roles with which a conversation must begin: `system` if the template requires it."""
        first_error = None
        for start in ((), ("system",)):
            try:
                written = self._probe(*start, "user", "assistant")
            except RowError as error:
                first_error = first_error or error
                continue
            if len(start) + 1 not in written[1].extents:
                raise UserError("model: the chat template does not write assistant messages")
            return start
        raise UserError(
            f"model: the chat template cannot write a question and its answer: {first_error}"
        )

    def _probe(
        self, *roles: str, add_generation_prompt: bool = False
    ) -> tuple[Rendering, _MessageExtents]:
        conversation = placeholder(*roles)
        rendering = self._template.render(conversation, add_generation_prompt=add_generation_prompt)
        return rendering, _locate_messages(rendering, conversation)

    def _text_after(self, *roles: str, add_generation_prompt: bool = False) -> str | None:
        """Text that the template writes after the last message; None if it refuses the roles."""
        try:
            rendering, written = self._probe(
                *self._leading_roles, *roles, add_generation_prompt=add_generation_prompt
            )
        except RowError:
            return None
        last = written.extents.get(len(self._leading_roles) + len(roles) - 1)
        return rendering.text[last.last :] if last is not None else None

    def _text_between(self, *roles: str, at: int) -> str | None:
        """Text that the template writes before message `at`; None if it refuses the roles."""
        try:
            rendering, written = self._probe(*self._leading_roles, *roles)
        except RowError:
            return None
        at += len(self._leading_roles)
        extent = written.extents.get(at)
        if extent is None or (at and at - 1 not in written.extents):
            return None
        return rendering.text[extent.before : extent.first]

    def _openings_after(self, role: str | None) -> list[str]:
        """Candidates for the text that opens an assistant turn after this role, longest first."""
        if role not in self._openings:
            roles = {"user": ("user",), "tool": ("user", "call", "tool"), "system": ("system",)}
            before = roles.get(role or "", ("user", "assistant") if role else ())
            if role == "system" and self._leading_roles:
                before = ()
            prompt = self._text_after(*before, add_generation_prompt=True) if before else None
            between = [
                self._text_between(*before, "assistant", at=len(before)),
                self._text_between(*before, "assistant", "user", "assistant", at=len(before)),
            ]
            gaps = sorted({gap for gap in between if gap is not None}, key=len)
            openings = gaps[:1]
            if prompt is not None and gaps:
                shared = self._shared_header(prompt, gaps[0])
                if prompt != self._text_after(*before):  # the template reads add_generation_prompt
                    openings = [prompt, shared, *(gap for gap in gaps if prompt.startswith(gap))]
                elif shared and not gaps[0].startswith(prompt):  # the prompt is always written
                    openings = [shared]
            self._openings[role] = sorted(set(openings), key=len, reverse=True)
        return self._openings[role]

    def _shared_header(self, one: str, other: str) -> str:
        """The common prefix of two texts, up to its last special token or line end.

        Empty if they share no special token. Also empty if `one` continues with a word after the
        prefix, because the texts are then different headers, not one header with other markup.
        """
        common = one[: _common_prefix_length(one, other)]
        ends = [
            match.end()
            for match in self._special.finditer(one)
            if match.end() <= len(common) and other.startswith(match[0], match.start())
        ]
        cut = max(ends[-1], common.rfind("\n") + 1) if ends else 0
        return one[:cut] if one[cut:].lstrip()[:1] in ("", "<", "[") else ""

    def _find_headers(self) -> list[str]:
        """Texts that open an assistant turn, without the end of the preceding turn."""
        bare = self._text_after("user") or ""
        before_user = self._text_between("user", "user", at=1) or ""
        headers = []
        for opening in self._openings_after("user"):
            # The header is the part of the opening that is not in other text after a user message.
            # A template that always writes the generation prompt (Command R) writes the opening
            # after every user message, except before a second user message.
            other = before_user if bare.startswith(opening) else bare
            cut = _common_prefix_length(opening, other)
            for match in self._special.finditer(opening):
                if match.start() < cut < match.end():
                    cut = match.start()
            headers.append(opening[cut:])
        return [header for header in headers if self._special.search(header)]

    def _find_ends(self) -> set[str]:
        """End-of-turn tokens, which the template writes after answers and tool calls."""
        ends: set[str] = set()
        end_within_text = self._end_in(self._text_between("user", "assistant", "user", at=2))
        if end_within_text is not None:
            ends.add(end_within_text)
        end_at_text_end = self._end_in(self._text_after("user", "assistant"), first=ends)
        ends |= {end_at_text_end} if end_at_text_end is not None else set()
        if not ends:
            raise UserError(_NO_END)
        if end_at_text_end is None and end_within_text is not None:
            self._appended_end[False] = end_within_text
        if end_at_text_end is not None and end_within_text is not None:
            self.inner_ends = frozenset({end_within_text} - {end_at_text_end})
        if self._template.marks_turns:
            self._require_marked_end(ends | self._known_ends)
        tail = self._text_after("user", "call")
        call_end = self._end_in(self._end_of_call(tail), first=ends)
        if call_end is not None:
            ends.add(call_end)
            if tail is not None and self._end_in(tail, first=ends) is None:
                self._appended_end[True] = call_end
        return ends

    def _end_of_call(self, tail: str | None) -> str | None:
        """The text between a tool call and its result, from the end-of-turn token onwards.

        The markup of a call may contain other special tokens before that token. The end-of-turn
        token is the last one that is also in `tail`, the text after a call without a result.
        """
        gap = self._text_between("user", "call", "tool", at=2)
        if gap is None or tail is None:
            return gap
        shared = gap[: _common_prefix_length(gap, tail)]
        starts = [match.start() for match in self._special.finditer(shared)]
        return gap[starts[-1] if starts else 0 :]

    def _end_in(self, gap: str | None, first: Collection[str] = ()) -> str | None:
        """The end-of-turn token in `gap`, the text after a turn; None if it has none.

        This is a known end-of-turn token, or else the first special token in `gap`. The latter may
        open the next turn; it does not count if it opens assistant turns.
        """
        tokens = [match[0] for match in self._special.finditer(gap or "")]
        for known in (first, self._known_ends):
            for token in tokens:
                if token in known:
                    return token
        opening = {match[0] for header in self._headers for match in self._special.finditer(header)}
        return tokens[0] if tokens and tokens[0] not in opening else None

    def _require_marked_end(self, ends: set[str]) -> None:
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
        by_template: list[tuple[Span, str]] = []
        in_texts: list[tuple[Span, str]] = []
        for match in self._special.finditer(rendering.text):
            at = bisect_left(starts, match.end()) - 1
            if at >= 0 and spans[at].stop > match.start():
                in_texts.append((match.span(), rendering.leaves[spans[at].source].name))
            else:
                by_template.append((match.span(), match[0]))
        return by_template, in_texts

    def _end_of_turn(self, special: Sequence[tuple[Span, str]], extent: _Extent) -> int | None:
        """Offset after the turn's end-of-turn token; None if it has none."""
        at = bisect_left(special, ((extent.last, 0), ""))
        while at < len(special) and special[at][0][0] < extent.limit:
            if special[at][1] in self.ends:
                return special[at][0][1]
            at += 1
        return None

    def _with_end(self, text: str, message: Message, extent: _Extent) -> tuple[str, int]:
        """Append the end-of-turn token, if the template writes it only before another message."""
        added = self._appended_end.get("tool_calls" in message.others)
        if added is None or extent.limit < len(text):
            raise RowError(
                f"the chat template does not end every assistant turn with one of "
                f"{', '.join(sorted(self.ends))}"
            )
        return text + added, len(text) + len(added)

    def _start_of(self, message: Message, extent: _Extent, text: str, is_trained: bool) -> int:
        """Offset at which the span of an assistant turn starts: after its generation prompt."""
        start = self._after_opening(extent, text)
        # The opening of a conversation's first message may end with markup that the model has to
        # write. There, a turn starts after a header, if the text has one.
        first = extent.before if start is None or extent.role_before is None else start
        ends = [
            at + len(header)
            for header in self._headers
            if header and (at := text.rfind(header, first, extent.first)) >= 0
        ]
        if ends:
            return max(ends)
        if start is not None:
            return start
        if not message.others or not is_trained:
            return extent.first
        raise RowError(
            "the start of an assistant turn with reasoning or tool calls is ambiguous in the chat "
            "template's output"
        )

    def _after_opening(self, extent: _Extent, text: str) -> int | None:
        """Offset at which a turn starts, if a known opening precedes it; else None."""
        openings = self._openings_after(extent.role_before)
        for opening in openings:
            is_whole = bool(opening) or extent.before == extent.first
            if is_whole and text.startswith(opening, extent.before):
                return min(extent.before + len(opening), extent.last)
        for opening in openings:
            if shared := self._shared_header(opening, text[extent.before : extent.first]):
                return extent.before + len(shared)
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
        before = 0  # end of the preceding leaf
        inner = {i: list(reasoning_blocks(conversation.messages[i])) for i in turn_spans}
        for span in rendering.spans:
            leaf = rendering.leaves[span.source]
            if leaf.message in spans_by_message and turn_spans[leaf.message]:
                turn_start, limit = turn_spans[leaf.message][0][0], turn_spans[leaf.message][-1][1]
                opened = max(before, min(turn_start, span.start))
                if leaf.kind is Kind.REASONING:
                    spans_by_message[leaf.message].append(
                        (opened, self._after_closing_tag(text, span.stop, limit))
                    )
                for (first, last), _ in inner[leaf.message] if leaf.kind is Kind.CONTENT else ():
                    if first < span.last and last > span.first:
                        inside = span.start + first - span.first
                        stop = span.stop - max(0, span.last - last)
                        start = opened if first <= span.first else inside
                        spans_by_message[leaf.message].append(
                            (start, self._after_closing_tag(text, stop, limit))
                        )
            before = span.stop
        return spans_by_message

    def _after_closing_tag(self, text: str, stop: int, limit: int) -> int:
        """Offset after the closing tag of reasoning that ends at `stop`; it is below `limit`."""
        match = _CLOSING.match(text, stop) or self._special.match(text, stop)
        if match is None or match.end() >= limit:
            match = _SPACE.match(text, stop)
        return match.end() if match is not None else stop


def _marked_spans(marks: list[Span], end: int | None, is_trained: bool) -> list[Span]:
    if is_trained and not any(start < (end or 0) <= stop for start, stop in marks):
        raise RowError(
            "the chat template's {% generation %} block does not contain the end of an assistant "
            "turn"
        )
    return [(start, stop if end is None else min(stop, end)) for start, stop in marks]


def _locate_messages(rendering: Rendering, conversation: Conversation) -> _MessageExtents:
    """Find the extent of each message. If a text is written twice, the first copy counts."""
    result = _MessageExtents()
    seen: dict[int, int] = {}  # leaf -> number of its characters that are written so far
    order: list[tuple[int, int, int]] = []  # message, start, stop
    for span in rendering.spans:
        leaf = rendering.leaves[span.source]
        if span.first < seen.get(span.source, 0):
            if leaf.kind in (Kind.CONTENT, Kind.REASONING):
                result.repeated.add(leaf.message)
            continue
        seen[span.source] = span.last
        if order and order[-1][0] == leaf.message:
            order[-1] = (leaf.message, order[-1][1], span.stop)
        else:
            order.append((leaf.message, span.start, span.stop))
    runs: dict[int, list[int]] = {}
    for number, (message, _, _) in enumerate(order):
        runs.setdefault(message, []).append(number)
    for message, numbers in runs.items():
        if message == TOOLS:
            continue
        if len(numbers) > 1:
            result.interleaved.add(message)
        first, last = numbers[0], numbers[-1]
        before = order[first - 1] if first else None
        role = conversation.messages[before[0]].role if before and before[0] != TOOLS else None
        result.extents[message] = _Extent(
            first=order[first][1],
            last=order[last][2],
            before=before[2] if before else 0,
            role_before=role,
            limit=order[last + 1][1] if last + 1 < len(order) else len(rendering.text),
        )
    return result


def _require_unambiguous(message: int, written: _MessageExtents) -> None:
    if message in written.repeated:
        raise RowError("the chat template writes an assistant turn more than once")
    if message in written.interleaved:
        raise RowError("the chat template mixes the texts of several messages")


def _generation_blocks(rendering: Rendering, conversation: Conversation) -> dict[int, list[Span]]:
    """Spans of the {% generation %} blocks, by index of the assistant message.

    A block without text of the row belongs to the preceding assistant message, or to the following
    one if the preceding message is not an assistant's.
    """
    spans = [s for s in rendering.spans if rendering.leaves[s.source].message != TOOLS]
    starts = [span.start for span in spans]
    spans_by_message: dict[int, list[Span]] = {}
    for start, stop in rendering.generated:
        following = bisect_left(starts, start)
        candidates = [n for n in (following, following - 1) if 0 <= n < len(spans)]
        if following < len(spans) and spans[following].start >= stop:
            candidates.reverse()
        for n in candidates:
            message = rendering.leaves[spans[n].source].message
            if conversation.messages[message].role == "assistant":
                spans_by_message.setdefault(message, []).append((start, stop))
                break
    return spans_by_message


def _common_prefix_length(one: str, other: str) -> int:
    """Length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
