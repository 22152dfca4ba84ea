"""Conversation with markers for its texts -> the skeleton of its kind, and its assistant turns.

An assistant turn owns the place of its content through its end-of-turn token. A turn with more
than content (reasoning, tool calls) owns all that the template writes for it after the header
with which it would ask the model to go on.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.chat.skeleton import Hole, Skeleton, variants
from pipeline.data.chat.template import ChatTemplate, Span, as_template_gets_it
from pipeline.rows.formats import Conversation, Message, RowError

# Nine letters and digits: what templates ask of the ids of tool calls too.
_MARKER = re.compile(r"Zq([0-9]{5})qZ", re.IGNORECASE)  # a template may change the case
_TOOLS: tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]] = (
    [{"type": "function", "function": {"name": "f", "description": "g", "parameters": {}}}],
    [
        {"type": "function", "function": {"name": name, "parameters": {name: {"k": [name]}}}}
        for name in ("some", "others")
    ],
)


class NoPattern(RowError):
    """No conversation of a row's shape has a consistent pattern."""


@dataclass(frozen=True)
class EndOfTurn:
    """The token that ends assistant turns."""

    text: str
    id: int


@dataclass(frozen=True)
class Pattern:
    """A skeleton; and for each assistant message its hole and how far behind it its end is."""

    skeleton: Skeleton
    turns: Mapping[int, tuple[int, int]]  # message -> (hole, characters from its end to the token)


def shape(conversation: Conversation) -> tuple[Any, ...]:
    """What conversations of one pattern have in common."""
    messages = tuple(
        (m.role, not m.content, _has_thought(m), _shape(m.others) if m.others else ())
        for m in conversation.messages
    )
    return (bool(conversation.tools), *messages)


def refuse_what_is_left_out(
    conversation: Conversation,
    template: ChatTemplate,
    end: EndOfTurn,
    special: re.Pattern[str],
) -> None:
    """Raise NoPattern where the template does not write all that conversations of a shape say.

    RowError where it refuses markers, so that this is not known.
    """
    _PatternMaker(conversation, template, end, special, is_own=False).refuse_what_is_left_out()


def make_pattern(
    conversation: Conversation,
    template: ChatTemplate,
    end: EndOfTurn,
    special: re.Pattern[str],
    *,
    is_own: bool,
) -> Pattern:
    """The pattern of all conversations of a shape; `is_own`: of this one alone.

    Its own pattern has markers in place of what the assistant says only. Raises NoPattern where
    there is no consistent one, RowError where the template refuses this conversation or markers.
    """
    return _PatternMaker(conversation, template, end, special, is_own).make()


class _PatternMaker:
    def __init__(
        self,
        conversation: Conversation,
        template: ChatTemplate,
        end: EndOfTurn,
        special: re.Pattern[str],
        is_own: bool,
    ) -> None:
        self._said, self._template, self._end = conversation.messages, template, end
        self._special, self._is_own = special, is_own
        if is_own and _MARKER.search(_real_texts(conversation)):
            raise RowError("a message holds one of the markers by which turns are found")
        self._owners: list[tuple[int, str]] = []  # of each marker: its message, its key there
        self._messages = [self._marked(i, message) for i, message in enumerate(self._said)]
        self._tools: Sequence[Mapping[str, Any]] = conversation.tools
        self._header = ""  # with which the template asks for an answer, once it is known

    def make(self) -> Pattern:
        text, regions = self._rendered()
        found = self._found(text)
        ends: dict[int, int] = {}
        for i, message in enumerate(self._said):
            mine = [(span, key) for span, owner, key in found if owner == i]
            if message.role != "assistant":
                regions += [(span, Hole(i, key == "content")) for span, key in mine]
                continue
            if not mine:
                raise NoPattern("the chat template leaves out an assistant turn")
            (start, _), (_, last) = mine[0][0], mine[-1][0]
            others = (a for (a, _), owner, _ in found if owner != i and a >= last)
            ends[i] = self._end_of(i, text, last, min(others, default=len(text)))
            if not _is_plain(message):
                start = min(start, self._start_of(i, text, start))
                is_content = not message.others
                regions.append(((start, ends[i]), Hole(i, is_content, has_thought=is_content)))
            elif len(mine) == 1:
                regions.append((mine[0][0], Hole(i, is_content=True)))
            else:
                raise NoPattern("the chat template writes an assistant turn more than once")
        return _pattern(text, regions, ends)

    def refuse_what_is_left_out(self) -> None:
        self._found(self._rendered()[0])

    def _found(self, text: str) -> list[tuple[Span, int, str]]:
        """The markers in a rendering, each with its owner; all that there must be."""
        found = [(m.span(), *self._owners[int(m[1])]) for m in _MARKER.finditer(text)]
        self._refuse_what_is_left_out(text, {(owner, key) for _, owner, key in found})
        return found

    def _rendered(self) -> tuple[str, list[tuple[Span, Hole]]]:
        """The text with markers, and where in it the tools of any conversation would be."""
        if not self._tools or self._is_own:
            return self._template.render(self._messages, self._tools), []
        self._tools = _TOOLS[0]
        text = self._template.render(self._messages, _TOOLS[0])
        other = self._template.render(self._messages, _TOOLS[1])
        first = _common(text, other)
        last = _common(text[first:][::-1], other[first:][::-1])
        region = first, len(text) - last
        if text == other:
            raise NoPattern("the chat template has no place for tools")
        if _MARKER.search(text, *region):
            raise RowError("the chat template has no one place for tools")
        return text, [(region, Hole(None, is_content=False))]

    def _start_of(self, i: int, text: str, first: int) -> int:
        """Where the model starts to write message `i`, which is more than content.

        `first`: where its first marker is.
        """
        between = text[max((m.end() for m in _MARKER.finditer(text, 0, first)), default=0) : first]
        if self._header and between.count(self._header) == 1:
            return first - len(between.partition(self._header)[2])
        before = self._messages[:i]
        bare = asks = None
        if before:
            bare = self._render_or_none(before, asks=False)
            asks = self._render_or_none(before, asks=True)
        if asks is not None and asks != bare and text.startswith(asks):
            if bare is not None and asks.startswith(bare):
                self._header = asks[len(bare) :]
            return len(asks)
        # A plain answer in its place, and in that of the tools' answers: roles have to alternate.
        plain = {"role": "assistant", "content": self._marker(i, "plain")}
        asked = (k for k in range(i + 1, len(self._said)) if self._said[k].role == "user")
        rest = self._messages[next(asked, len(self._said)) :]
        marked = self._render_or_none([*before, plain, *rest], asks=False)
        if marked is not None and plain["content"] in marked:
            return _common(text, marked[: marked.index(plain["content"])])
        if bare is not None and text.startswith(bare):
            return len(bare)
        raise NoPattern(
            "where the chat template begins an assistant turn with reasoning or tool calls is not "
            "certain"
        )

    def _end_of(self, i: int, text: str, start: int, following: int) -> int:
        """Where the end-of-turn token is: before anything of another message."""
        if _is_plain(self._said[i]):
            found = self._special.search(text, start, following)
            at = found.start() if found and found[0] == self._end.text else -1
        else:
            at = text.find(self._end.text, start, following)
        if at < 0:
            raise NoPattern(
                f"the chat template does not end every assistant turn with {self._end.text}"
            )
        return at

    def _render_or_none(self, messages: Sequence[Mapping[str, Any]], *, asks: bool) -> str | None:
        try:
            return self._template.render(messages, self._tools, asks=asks)
        except RowError:
            return None

    def _refuse_what_is_left_out(self, text: str, written: set[tuple[int, str]]) -> None:
        text = _MARKER.sub("", text)
        for i, message in enumerate(self._said):
            is_marked = not self._is_own or message.role == "assistant"
            if is_marked and message.content and (i, "content") not in written:
                raise _leaves_out(message)
            if not is_marked:
                refuse_lost_content(message, text)
            calls = {(i, f"call {n}") for n in range(len(message.others.get("tool_calls", ())))}
            if not calls <= written:
                raise NoPattern("the chat template leaves out a tool call")

    def _marked(self, i: int, message: Message) -> dict[str, Any]:
        """The message as the template gets it, with markers for its texts."""
        if self._is_own and message.role != "assistant":
            return as_template_gets_it(message)
        content = message.content and self._marker(i, "content")
        if _has_thought(message):
            content = f"<think>\n{self._marker(i, 'thought')}\n</think>\n\n{content}"
        others = {}
        for key, value in message.others.items():
            if key == "tool_calls":
                others[key] = [self._mark(i, f"call {n}", call) for n, call in enumerate(value)]
            else:
                others[key] = self._mark(i, key, value)
        return {"role": message.role, "content": content, **others}

    def _mark(self, i: int, name: str, value: Any, key: str = "") -> Any:
        if key == "arguments" and value:
            pair = {self._marker(i, name): self._marker(i, name)}
            return str(pair).replace("'", '"') if isinstance(value, str) else pair
        if isinstance(value, str):
            return value if key == "type" or not value else self._marker(i, name)
        if isinstance(value, Mapping):
            return {k: self._mark(i, name, inner, k) for k, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark(i, name, inner) for inner in value]
        return value

    def _marker(self, i: int, key: str) -> str:
        self._owners.append((i, key))
        return f"Zq{len(self._owners) - 1:05d}qZ"


def _pattern(text: str, regions: list[tuple[Span, Hole]], ends: Mapping[int, int]) -> Pattern:
    literals: list[str] = []
    holes: list[Hole] = []
    at = 0
    turns: dict[int, tuple[int, int]] = {}
    for (start, end), hole in sorted(regions, key=lambda region: region[0]):
        if start < at:
            raise NoPattern("the chat template mixes the texts of several messages")
        if hole.message is not None and hole.message in ends:
            turns[hole.message] = len(holes), ends[hole.message] - end
        literals.append(text[at:start])
        holes.append(hole)
        at = end
    return Pattern(Skeleton((*literals, text[at:]), tuple(holes)), turns)


def refuse_lost_content(message: Message, text: str) -> None:
    """Raise NoPattern where the content of a message is nowhere in a rendering."""
    written = variants(message.content, _has_thought(message))
    if not any(content in text for content in written):
        raise _leaves_out(message)


def _leaves_out(message: Message) -> NoPattern:
    return NoPattern(f"the chat template leaves out the content of a message ({message.role})")


def _real_texts(conversation: Conversation) -> str:
    """All that a conversation's own pattern has no markers for."""
    messages = [as_template_gets_it(m) for m in conversation.messages if m.role != "assistant"]
    return repr((messages, conversation.tools))


def _is_plain(message: Message) -> bool:
    return not message.others and not _has_thought(message)


def _has_thought(message: Message) -> bool:
    return message.role == "assistant" and "</think>" in message.content


def _shape(value: Any, key: str = "") -> Any:
    """Structure of what comes beside content: keys, kinds, and values that are no text."""
    if key == "arguments":
        return type(value), not value
    if isinstance(value, str):
        return value if key == "type" else not value
    if isinstance(value, Mapping):
        return tuple((k, _shape(inner, k)) for k, inner in value.items())
    if isinstance(value, list | tuple):
        return (None, *(_shape(inner) for inner in value))
    return repr(value)


def _common(one: str, other: str) -> int:
    """Length of the common beginning."""
    pairs: Iterator[tuple[str, str]] = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
