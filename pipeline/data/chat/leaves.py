"""Messages and tools for a chat template, in which every string is traced to a leaf of the row.

A leaf is a string, a key or a scalar in messages, tool calls, arguments, tools and reasoning.
Strings and keys are passed to the template as `Traced` strings (traced.py), which record the index
of their leaf.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from pipeline.data.chat.traced import Arguments, join_traced, traced_from
from pipeline.errors import first_few
from pipeline.rows.examples import Conversation, Message

TOOLS = -1  # message index of leaves in tool definitions
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # synonyms in transformers
# JSON Schema keywords that a template may omit or translate into its own notation.
STRUCTURE_OF_TOOLS = frozenset(
    ("type", "required", "additionalProperties", "strict", "$schema", "nullable")
)
_PARAMETER_MAPS = ("properties", "$defs", "definitions")  # their keys are names, not keywords
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


class Kind(Enum):
    """Kind of a leaf, which determines whether a template may omit it (omissions.py)."""

    STRUCTURAL = "structural"  # such as the id of a tool call: may be omitted
    CONTENT = "content"  # must be written, except reasoning blocks within it
    REASONING = "reasoning"  # may be omitted if the template does so by design
    REQUIRED = "required"  # other parts of tool calls and tool definitions: must be written


class Leaf(NamedTuple):
    """A string, key or scalar of a row.

    `message`: message index or TOOLS. `path`: keys and indexes that lead to it in the row, such as
    ("messages", 2, "content").
    """

    message: int
    kind: Kind
    path: tuple[str | int, ...]
    value: Any

    @property
    def name(self) -> str:
        """The path as text: messages[2].tool_calls[0].arguments.city."""
        parts = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.path)
        return "".join(parts).removeprefix(".")


@dataclass(frozen=True)
class Style:
    """Form in which a template accepts tool calls and reasoning; templates differ in this.

    `empty_content`: content of a message that has only calls. `ids`: form of the ids of calls:
    "given" (as in the row), "short" (nine letters and digits) or "named" (functions.NAME:NUMBER).
    `has_reasoning_parts`: the content is a list of parts, of which one has the type "thinking".
    """

    empty_content: str | None = ""
    ids: str = "given"
    has_reasoning_parts: bool = False


@dataclass
class TracedConversation:
    """Messages and tools for the template, with the leaves that they consist of."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)

    def path_of(self, value: object) -> str:
        """The path of an object that the template received, such as tools[0].function."""
        roots = (("messages", self.messages), ("tools", self.tools))
        return next((path for name, root in roots for path in _paths(root, value, name)), "")


def _paths(root: Any, value: object, path: str) -> Iterator[str]:
    """Yield the path of each place in `root` that holds this object. `path`: path of `root`."""
    if root is value:
        yield path
    items = root.items() if isinstance(root, Mapping) else ()
    for key, item in items:
        yield from _paths(item, value, f"{path}.{key}")
    for number, item in enumerate(root if isinstance(root, list) else ()):
        yield from _paths(item, value, f"{path}[{number}]")


def trace(conversation: Conversation, style: Style) -> TracedConversation:
    """Convert a conversation to messages and tools whose strings are traced."""
    return _Tracer(style).trace(conversation)


class _Tracer:
    """Builds the traced messages and tools of one conversation."""

    def __init__(self, style: Style) -> None:
        self._style = style
        self._result = TracedConversation()
        self._message = TOOLS  # message index of the leaves that are added
        self._new_ids: dict[str, str] = {}  # id of a call in the row -> id given to the template
        self._unanswered: list[str] = []  # ids of calls without a tool result so far
        self._num_calls = 0

    def trace(self, conversation: Conversation) -> TracedConversation:
        for number, tool in enumerate(conversation.tools):
            self._result.tools.append(self._tool(tool, ("tools", number)))
        for number, message in enumerate(conversation.messages):
            self._message = number
            self._result.messages.append(self._template_message(message))
        return self._result

    def _template_message(self, message: Message) -> dict[str, Any]:
        path: tuple[str | int, ...] = ("messages", self._message)
        others = message.others
        calls = others.get("tool_calls") or ()
        content: str | None = self._text(message.content, (*path, "content"), Kind.CONTENT)
        if calls and not content:
            content = self._style.empty_content
        result: dict[str, Any] = {"role": message.role, "content": content}
        for key, value in others.items():
            if key == "tool_calls":
                calls_path = (*path, key)
                result[key] = [self._call(c, (*calls_path, n)) for n, c in enumerate(calls)]
            elif key in REASONING_KEYS:
                text = self._text(value, (*path, key), Kind.REASONING)
                if self._style.has_reasoning_parts:
                    parts = [{"type": "thinking", "thinking": text}]
                    parts += [{"type": "text", "text": content}] if content else []
                    result["content"] = parts
                    continue
                # As in transformers: the same text under each key that templates may read.
                result = {"thinking": text, **result, "reasoning_content": text, key: text}
            else:
                is_structural = message.role == "tool" and key in ("name", "tool_call_id")
                kind = Kind.STRUCTURAL if is_structural else Kind.REQUIRED
                if key != "tool_call_id":
                    result[key] = self._value(value, (*path, key), kind)
        if message.role == "tool":
            self._add_result_id(result, others.get("tool_call_id"), (*path, "tool_call_id"))
        return result

    def _call(self, call: Mapping[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
        function: dict[str, Any] = {}
        for key, value in call["function"].items():
            if key == "arguments" and isinstance(value, Mapping):
                function[key] = Arguments(self._value(value, (*path, key), Kind.REQUIRED))
            else:
                function[key] = self._value(value, (*path, key), Kind.REQUIRED)
        result: dict[str, Any] = {"type": "function", "function": function}
        for key, value in call.items():
            if key not in ("function", "type", "id"):
                kind = Kind.STRUCTURAL if key == "index" else Kind.REQUIRED
                result[key] = self._value(value, (*path, key), kind)
        call_id = self._call_id(call.get("id"), function["name"])
        if call_id:
            result["id"] = self._structural(call_id, (*path, "id"))
            self._unanswered.append(str.__str__(call_id))
        self._num_calls += 1
        return result

    def _call_id(self, id_in_row: Any, name: str) -> str:
        """The id of a call in the form that the template accepts (Style.ids); "" for none.

        `name`: name of the called function.
        """
        old_id = id_in_row if isinstance(id_in_row, str) else ""
        if self._style.ids == "short" and not _SHORT_ID.fullmatch(old_id):
            new_id = f"call{self._num_calls:05d}"
        elif self._style.ids == "named":
            before, separator, after = old_id.rpartition(name)
            if separator:  # the id in the row contains the name
                new_id = join_traced((before, name, after))
            else:
                new_id = join_traced(("functions.", name, f":{self._num_calls}"))
        else:
            return old_id
        if old_id:
            self._new_ids[old_id] = str.__str__(new_id)
        return new_id

    def _add_result_id(
        self, result: dict[str, Any], id_in_row: Any, path: tuple[str | int, ...]
    ) -> None:
        """Add the id of the call to a message with its result.

        If the template needs ids, results without an id belong to the calls in their order.
        """
        call_id = self._new_ids.get(id_in_row, id_in_row) if isinstance(id_in_row, str) else None
        if call_id in self._unanswered:
            self._unanswered.remove(call_id)
        elif self._style.ids != "given" and self._unanswered:
            call_id = self._unanswered.pop(0)
        if call_id:
            result["tool_call_id"] = self._structural(call_id, path)

    def _structural(self, text: str, path: tuple[str | int, ...]) -> str:
        """A traced string that the template may omit."""
        if type(text) is not str:  # already traced, such as functions.NAME:0
            return text
        return self._text(text, path, Kind.STRUCTURAL)

    def _text(self, text: str, path: tuple[str | int, ...], kind: Kind) -> str:
        """A traced string, for which a leaf is added."""
        if not text:
            return text
        leaves = self._result.leaves
        leaves.append(Leaf(self._message, kind, path, text))
        return traced_from(text, len(leaves) - 1)

    def _value(self, value: Any, path: tuple[str | int, ...], kind: Kind) -> Any:
        """A copy of a value with its keys and strings traced."""
        if isinstance(value, str):
            return self._text(value, path, kind)
        if isinstance(value, Mapping):
            return {
                self._text(key, (*path, key), kind): self._value(item, (*path, key), kind)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._value(item, (*path, n), kind) for n, item in enumerate(value)]
        if value is not None or kind is Kind.REQUIRED:
            self._result.leaves.append(Leaf(self._message, kind, path, value))
        return value

    def _tool(self, value: Any, path: tuple[str | int, ...]) -> Any:
        """Copy a tool definition or a value in it, with all strings traced except type names.

        Keys that are keywords of JSON Schema are not traced; names of parameters are.
        """
        if isinstance(value, list | tuple):
            return [self._tool(item, (*path, n)) for n, item in enumerate(value)]
        if not isinstance(value, Mapping):
            return self._value(value, path, Kind.REQUIRED)
        result: dict[str, Any] = {}
        are_parameter_names = path[-1] in _PARAMETER_MAPS
        for key, item in value.items():
            item_path = (*path, key)
            if are_parameter_names:
                result[self._text(key, item_path, Kind.REQUIRED)] = self._tool(item, item_path)
            elif key in STRUCTURE_OF_TOOLS:
                result[key] = item
            else:
                result[key] = self._tool(item, item_path)
        return result


# A block with tags in angle brackets (inner text: group a), with [THINK] (b), or at the start of
# the content without an opening tag (c).
_REASONING_BLOCK = re.compile(
    r"<(?P<tag>think|thinking|thought|reasoning|seed:think)>(?P<a>.*?)</(?P=tag)>"
    r"|\[THINK\](?P<b>.*?)\[/THINK\]|\A(?P<c>(?:(?!<think>).)*?)</think>",
    re.DOTALL,
)


def reasoning_blocks(message: Message) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield two spans [start, stop) for each reasoning block in an assistant message's content.

    The first span includes the tags, the second does not.
    """
    if message.role != "assistant" or ("</" not in message.content and "[/" not in message.content):
        return
    for match in _REASONING_BLOCK.finditer(message.content):
        inner = next(name for name in "abc" if match[name] is not None)
        yield match.span(), match.span(inner)


def placeholder_of_same_shape(conversation: Conversation) -> tuple[Conversation, tuple[Any, ...]]:
    """A placeholder conversation of the same shape as this one, and a hashable key of the shape.

    The shape is whether there are tools, the sequence of roles, and whether each message has
    content, calls, reasoning under a key of its own, and reasoning blocks in the content.
    """
    shape: list[Any] = [bool(conversation.tools)]
    messages = []
    for number, message in enumerate(conversation.messages):
        others: dict[str, Any] = {}
        if message.others.get("tool_calls"):
            others["tool_calls"] = [placeholder_call()]
        reasoning_keys = [key for key in REASONING_KEYS if message.others.get(key)]
        if reasoning_keys:
            others[reasoning_keys[0]] = f"reasoning {number}"
        content = f"text {number}" if message.content.strip() else ""
        has_reasoning_block = any(True for _ in reasoning_blocks(message))
        if has_reasoning_block:
            content = f"<think>\nreasoning {number}\n</think>\n\ntext {number}"
        messages.append(Message(message.role, content, True, others))
        shape.append((message.role, bool(content), has_reasoning_block, *others))
    tools = (PLACEHOLDER_TOOL,) if conversation.tools else ()
    return Conversation(tuple(messages), tools), tuple(shape)


PLACEHOLDER_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look up a word",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "The word"}},
            "required": ["word"],
        },
    },
}


def placeholder_call() -> Mapping[str, Any]:
    """A call of the placeholder tool."""
    function = {"name": "lookup", "arguments": {"word": "tree"}}
    return {"type": "function", "id": "call_lookup", "function": function}


def placeholder(*roles: str) -> Conversation:
    """A placeholder conversation of these roles; `call` is an assistant message with a tool call.

    If there is such a message, the conversation has the definition of the tool.
    """
    messages: list[Message] = []
    for number, role in enumerate(roles):
        if role == "call":
            others: Mapping[str, Any] = {"tool_calls": [placeholder_call()]}
            messages.append(Message("assistant", "", True, others))
        elif role == "tool":
            messages.append(Message("tool", "a result", True, {"tool_call_id": "call_lookup"}))
        else:
            messages.append(Message(role, f"{role} says {number}", True))  # type: ignore[arg-type]
    has_calls = "call" in roles
    return Conversation(tuple(messages), (PLACEHOLDER_TOOL,) if has_calls else ())


def leaf_names(leaves: Sequence[Leaf]) -> str:
    """The names of the first few leaves, for an error message."""
    # A key of a mapping has the same name as its value.
    return first_few(list(dict.fromkeys(leaf.name for leaf in leaves)))
