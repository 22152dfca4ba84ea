"""Examples: the content of a row to train on, whatever its format was."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pipeline.config.data_names import DataFormat

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


class RowError(Exception):
    """A row that cannot be trained on; its text is the reason, which the audit counts.

    The reason names columns, keys and roles, never contents, so that equal reasons count as one.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


def printable(text: str) -> str:
    """The text with escapes for control characters and half surrogate pairs, as names may hold."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    `others`: further keys for the template: name, tool_calls (a list of {id, type, function: {name,
    arguments}}, the arguments an object), tool_call_id, and an assistant's reasoning under one of
    the keys reasoning_content, reasoning and thinking.
    """

    role: Role
    content: str
    is_trained: bool = True
    others: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """Messages for the model's chat template, and the tools that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Completion:
    """A prompt and the completion that is trained on, both without a chat template."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Text that is trained on as a whole."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """Token ids made elsewhere; `supervised`: which of them count in the loss."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


Example = Conversation | Completion | Text | Tokens


@dataclass(frozen=True)
class ReadExample:
    """The example of a row, the format that the row was read as, and what of it was not read.

    `unread`: names of columns, and of keys as `message.timestamp`, that hold a value and are not
    part of the example, sorted.
    """

    example: Example
    data_format: DataFormat
    unread: tuple[str, ...] = ()
