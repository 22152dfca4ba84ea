"""What a row is trained on as, whatever its format was. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


class RowError(Exception):
    """A row that cannot be trained on; its text is the reason, which the audit counts."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    `others`: what else the template may ask for: name, tool_calls (as a list of {type, function:
    {name, arguments}}, the arguments an object), tool_call_id, and an assistant's reasoning.
    """

    role: Role
    content: str
    is_trained: bool = True
    others: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """Turns for the model's chat template, and the tools that it may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Completion:
    """Raw text to go on from, and how it goes on."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Text of which all is trained on."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """What was tokenised elsewhere: ids, and which of them count in the loss."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


Example = Conversation | Completion | Text | Tokens
