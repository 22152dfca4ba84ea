"""Modelfile for Ollama: the chat template as a Go template, and the tokens that stop an answer.

Ollama never evaluates a Jinja template. `ollama create` compares `tokenizer.chat_template` of a
GGUF file with a built-in list of templates. It uses the Go template of the entry whose edit
distance is at most 99; if there is none, Ollama sends the prompt without a template (ollama
server/model.go, detectChatTemplate; template/template.go, Named). So a Go template is generated
here from conversations that the Jinja template has rendered.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Message = dict[str, str]  # with the keys "role" and "content"
# A function that renders a conversation with the trained template, up to the start of the answer.
Render = Callable[[Sequence[Message]], str]
# Contents of the messages of a test conversation. No template contains these texts.
_SYSTEM, _FIRST, _ANSWER, _NEXT = "system-49f1", "question-5b0c", "answer-8e27", "question-d3a6"


def modelfile(model: str, template: str | None, stops: Sequence[str]) -> str:
    """Content of a Modelfile.

    `model`: file name of the merged GGUF model in the same folder. `template`: from `go_template`.
    `stops`: texts that end an answer.
    """
    lines = [
        f"FROM ./{model}",
        "# Base and adapter instead of the merged model, with a GGUF file of the base:",
        "# FROM ./base.gguf",
        "# ADAPTER ./adapter.gguf",
    ]
    if template is None:
        lines.append("# The trained chat template has no equivalent that could be checked. Ollama")
        lines.append("# uses the template of its own list that resembles it, or the bare prompt.")
    else:
        lines.append(f'TEMPLATE """{template}"""')
    # Ollama removes the outer quotes and interprets no escapes (parser/parser.go, unquote).
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, ""])


def go_template(render: Render) -> str | None:
    """A Go template that renders conversations as the trained template does.

    The texts before and after the contents of messages are read from two rendered conversations.
    The template is then checked on other conversations, with and without a system message. None if
    a check fails: the trained template does more than to join such texts and contents.
    """
    texts = _read_fixed_texts(render)
    if texts is None or not all(_is_equal(texts, render, chat) for chat in _check_conversations()):
        return None
    template = texts.as_go_template()
    return None if '"""' in template else template  # three quotes would end it in a Modelfile


@dataclass(frozen=True, kw_only=True)
class _FixedTexts:
    """Texts of a chat template around the contents of messages.

    `before_system`, `after_system`: around the system message; `start`: instead of these if there
    is no system message. `before_answer`: between a question and its answer. `before_question`:
    between an answer and the next question. `end`: after the last question.
    """

    before_system: str
    after_system: str
    start: str
    before_answer: str
    before_question: str
    end: str

    def render(self, chat: Sequence[Message]) -> str:
        """The conversation as the Go template renders it."""
        text, is_first_question = "", True
        if chat[0]["role"] == "system":
            text += self.before_system + chat[0]["content"] + self.after_system
        else:
            text += self.start
        for message in chat:
            if message["role"] == "user":
                text += ("" if is_first_question else self.before_question) + message["content"]
                is_first_question = False
            elif message["role"] == "assistant":
                text += self.before_answer + message["content"]
        return text + self.end

    def as_go_template(self) -> str:
        """The Go template. Each text is a Go string, so that nothing in it is interpreted."""
        return (
            "{{ if .System }}" + _go_string(self.before_system) + "{{ .System }}"
            + _go_string(self.after_system) + "{{ else }}" + _go_string(self.start) + "{{ end }}"
            + "{{ $first := true }}{{ range .Messages }}"
            + '{{ if eq .Role "user" }}'
            + "{{ if not $first }}" + _go_string(self.before_question) + "{{ end }}"
            + "{{ $first = false }}{{ .Content }}"
            + '{{ else if eq .Role "assistant" }}'
            + _go_string(self.before_answer) + "{{ .Content }}{{ end }}{{ end }}"
            + _go_string(self.end)
        )  # fmt: skip


def _go_string(text: str) -> str:
    """A Go action that renders the text; empty for an empty text.

    Characters that are not printable are escaped, because Ollama drops them.
    """
    string = "".join(
        character if character.isprintable() else f"\\U{ord(character):08x}"
        for character in json.dumps(text, ensure_ascii=False)
    )
    return f"{{{{ {string} }}}}" if text else ""


def _read_fixed_texts(render: Render) -> _FixedTexts | None:
    """The texts around the contents; None if the template changes or reorders contents."""
    turns = [
        {"role": "user", "content": _FIRST},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT},
    ]
    system = {"role": "system", "content": _SYSTEM}
    try:
        with_system = _split(render([system, *turns]), [_SYSTEM, _FIRST, _ANSWER, _NEXT])
        without = _split(render(turns), [_FIRST, _ANSWER, _NEXT])
    except Exception:  # noqa: BLE001 - a template may raise any error, e.g. for a system message
        return None
    if with_system is None or without is None or with_system[2:] != without[1:]:
        return None
    before_system, after_system, before_answer, before_question, end = with_system
    return _FixedTexts(
        before_system=before_system,
        after_system=after_system,
        start=without[0],
        before_answer=before_answer,
        before_question=before_question,
        end=end,
    )


def _split(text: str, contents: Sequence[str]) -> list[str] | None:
    """The texts before, between and after these contents; None unless each occurs exactly once."""
    texts = []
    for content in contents:
        if text.count(content) != 1:
            return None
        before, text = text.split(content)
        texts.append(before)
    return [*texts, text]


def _is_equal(texts: _FixedTexts, render: Render, chat: Sequence[Message]) -> bool:
    """Whether the Go template renders a conversation as the trained template does."""
    try:
        return texts.render(chat) == render(chat)
    except Exception:  # noqa: BLE001 - a template may raise any error
        return False


def _check_conversations() -> list[list[Message]]:
    """Conversations of one to four questions, with and without a system message."""
    chats = []
    for count in range(1, 5):
        turns = []
        for i in range(count):
            turns.append({"role": "user", "content": f"{i}. What is 'x < y'?\nSay it."})
            turns.append({"role": "assistant", "content": f'{{"answer": {i}}}'})
        chats.append(turns[:-1])
        chats.append([{"role": "system", "content": "Be short & exact."}, *turns[:-1]])
    return chats
