"""Rows of the known formats -> Example. No torch.

A reason is the same for all rows that share it: it names columns and roles, never contents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from pipeline.data.sources import Row, json_name

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)
_WORKS = "`messages`, or `prompt` and `completion`"


class RowError(Exception):
    """A row that cannot be trained on; its text is the reason, which the audit counts."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `others`: tool calls and the like, as the template gets them."""

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


def to_example(row: Row) -> Example:
    """The row's example; raises RowError with the reason where it has none."""
    columns = row.value
    if "messages" in columns and "completion" in columns:
        raise RowError(f"both `messages` and `completion`; expected {_WORKS}")
    if "messages" in columns:
        return Conversation(_messages(columns["messages"]))
    if "prompt" in columns and "completion" in columns:
        prompt = _text(columns["prompt"], "`prompt`")
        completion = _text(columns["completion"], "`completion`")
        if not completion.strip():
            raise RowError("`completion` is empty")
        return Completion(prompt, completion)
    found = ", ".join(sorted(columns)[:8]) or "none"
    raise RowError(f"no known format: found the columns {found}; expected {_WORKS}")


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise RowError(f"`messages` is {json_name(value)}; expected a list")
    messages = tuple(_message(item) for item in value)
    if not any(message.role == "assistant" for message in messages):
        raise RowError("`messages` has no assistant message, so nothing to train on")
    return messages


def _message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise RowError(f"a message is {json_name(value)}; expected {{role, content}}")
    _refuse_what_would_be_lost(value)
    role = value.get("role")
    if role not in ROLES:
        found = repr(role)[:40] if isinstance(role, str) else json_name(role)
        raise RowError(f"a message has the role {found}; expected one of {', '.join(ROLES)}")
    content = _text(value.get("content"), f"content of a message ({role})")
    if role == "assistant" and not content.strip():
        raise RowError("an assistant message is empty")
    return Message(cast("Role", role), content)


def _refuse_what_would_be_lost(message: Mapping[str, Any]) -> None:
    """Tool calls, weights and the like change what should be trained: never drop them unsaid."""
    others = sorted(key for key in message if key not in ("role", "content"))
    if unread := [key for key in others if message[key] is not None]:
        raise RowError(f"a message has {', '.join(unread[:5])}; expected role and content only")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} is {json_name(value)}; expected text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # "\ud800" is valid JSON and no character
            raise RowError(f"{name} holds half a surrogate pair, which is no character") from None
    return value
