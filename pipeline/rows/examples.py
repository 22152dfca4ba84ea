"""Examples: the training content of a row, in classes that do not depend on the row's format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pipeline.config.data_names import DataFormat

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


class RowError(Exception):
    """Raised for a row that cannot be trained on. Its message is the reason.

    The audit counts rows by reason. A reason therefore names columns, keys and roles but never
    quotes their contents, so that equal faults have equal reasons.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


def printable(text: str) -> str:
    """The text with control characters and lone surrogates escaped; column names may have them."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    `others`: optional keys for the chat template: `name`, `tool_call_id`, `tool_calls`, and the
    assistant's reasoning under `reasoning_content`, `reasoning` or `thinking`. `tool_calls` is a
    list of {id, type, function: {name, arguments}}, in which `arguments` is an object.
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
    """A prompt and its completion, used without a chat template.

    Only the completion is trained on, unless `train_on` is `all`.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text without a prompt; all of it is trained on."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """Token ids of a pre-tokenised row, and for each of them whether it counts in the loss."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


Example = Conversation | Completion | Text | Tokens


@dataclass(frozen=True)
class ReadExample:
    """The example of a row, the row's format, and the names of its unread columns and keys.

    `unread`: sorted names, such as `score` or `message.timestamp`. Each has a value that is not
    part of the example. `has_renamed_columns`: whether the setting `columns` renamed a
    column of the row.
    """

    example: Example
    data_format: DataFormat
    unread: tuple[str, ...] = ()
    has_renamed_columns: bool = False
