"""Modelfile for Ollama: the chat template as a Go template, and the tokens that stop an answer.

Ollama never evaluates a Jinja template. `ollama create` compares `tokenizer.chat_template` of a
GGUF file with a list of its own, takes the Go template of an entry whose edit distance is at most
99, and otherwise sends the bare prompt (ollama server/model.go, detectChatTemplate;
template/template.go, Named).
"""

import json
from collections.abc import Callable, Sequence

Message = dict[str, str]
# A function that renders a conversation with the trained template, up to the start of the answer.
Render = Callable[[Sequence[Message]], str]
_SYSTEM, _FIRST, _ANSWER, _NEXT = "system-49f1", "question-5b0c", "answer-8e27", "question-d3a6"


def modelfile(model: str, template: str | None, stops: Sequence[str]) -> str:
    """Content of a Modelfile. `model`: file name of the merged GGUF model beside it."""
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
    # Ollama removes these quotes and interprets no escapes (parser/parser.go, unquote).
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, ""])


def go_template(render: Render) -> str | None:
    """A Go template that renders conversations as the trained template does; None if none fits.

    The texts before and after the contents are read from two rendered conversations. The result is
    checked on conversations with and without a system message.
    """
    parts = _parts(render)
    if parts is None or not all(_is_equal(parts, render, chat) for chat in _checks()):
        return None
    template = parts.as_go()
    return None if '"""' in template else template


class _Parts:
    """Texts around the contents: before and after the system message, and between the turns."""

    def __init__(self, with_system: Sequence[str], without: Sequence[str]) -> None:
        self.before_system, self.after_system, *self.turns = with_system
        self.start = without[0]

    def render(self, chat: Sequence[Message]) -> str:
        """The conversation as the Go template renders it."""
        answer, question, generation = self.turns
        text, is_first = "", True
        if chat[0]["role"] == "system":
            text += self.before_system + chat[0]["content"] + self.after_system
        else:
            text += self.start
        for message in chat:
            if message["role"] == "user":
                text += ("" if is_first else question) + message["content"]
                is_first = False
            elif message["role"] == "assistant":
                text += answer + message["content"]
        return text + generation

    def as_go(self) -> str:
        """The template in Go's syntax; every text is a Go string, so that none is interpreted."""
        answer, question, generation = map(_go, self.turns)
        return (
            f"{{{{ if .System }}}}{_go(self.before_system)}{{{{ .System }}}}"
            f"{_go(self.after_system)}{{{{ else }}}}{_go(self.start)}{{{{ end }}}}"
            "{{ $first := true }}{{ range .Messages }}"
            '{{ if eq .Role "user" }}'
            f"{{{{ if not $first }}}}{question}{{{{ end }}}}{{{{ $first = false }}}}"
            '{{ .Content }}{{ else if eq .Role "assistant" }}'
            f"{answer}{{{{ .Content }}}}{{{{ end }}}}{{{{ end }}}}{generation}"
        )


def _go(text: str) -> str:
    """A Go string that renders the text. Ollama drops characters that are not printable."""
    string = "".join(
        c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False)
    )
    return f"{{{{ {string} }}}}" if text else ""


def _parts(render: Render) -> _Parts | None:
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
    except Exception:  # noqa: BLE001 - a template raises what it likes, for example for a system
        return None
    if with_system is None or without is None or with_system[2:] != without[1:]:
        return None
    return _Parts(with_system, without)


def _split(text: str, contents: Sequence[str]) -> list[str] | None:
    """The texts before, between and after these contents; None unless each occurs exactly once."""
    parts = []
    for content in contents:
        if text.count(content) != 1:
            return None
        before, text = text.split(content)
        parts.append(before)
    return [*parts, text]


def _is_equal(parts: _Parts, render: Render, chat: Sequence[Message]) -> bool:
    try:
        return parts.render(chat) == render(chat)
    except Exception:  # noqa: BLE001 - see _parts
        return False


def _checks() -> list[list[Message]]:
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
