"""Compare the output of the chat templates in this folder with that of their published copies.

    python -m tests.templates.compare FOLDER ...

The first line of a template names its published copy. A FOLDER has such files, for example
`models/templates` of llama.cpp or `trl/chat_templates` of TRL. If the copy is a string within a
program, save it under the name of the template here, such as `smollm2.jinja`.
"""

import itertools
import json
import re
import sys
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

HERE = Path(__file__).parent
# The copy here shortens the text before the first user turn; the comparison starts at this marker.
_FIRST_USER_TURN = {
    "mistral-small-3.2": "[INST]",
    "ministral-3": "[INST]",
    "smollm3": "<|im_start|>user",
    "command-r7b": "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where"},
                "days": {"type": "integer"},
            },
            "required": ["city"],
        },
    },
}


def _call(arguments, id):
    function = {"name": "weather", "arguments": arguments}
    return {"id": id, "type": "function", "function": function}


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def _result(text, id):
    return {"role": "tool", "content": text, "tool_call_id": id, "name": "weather"}


_SYSTEM = {"role": "system", "content": "Be brief."}
_FIRST = _call({"city": "Ul'm\n", "days": 2}, "abcdefgh1")
_SECOND = _call({"city": "Graz"}, "abcdefgh2")
_THIRD = _call({"city": "Linz"}, "abcdefgh3")
CONVERSATIONS = [
    [
        _user("q"), _assistant("one", reasoning_content="hm"),
        _user("q"), _assistant("one", reasoning_content="hm"),
    ],
    [_user(" q "), _assistant("one\n"), _user("r"), _assistant(" two")],
    [_SYSTEM, _user("q"), _assistant("one")],
    [_SYSTEM, _user("q")],
    [
        _user("q"), _assistant("one", reasoning_content=" hm\n"),
        _user("r"), _assistant("two", reasoning_content="so"),
    ],
    [
        _user("q"), _assistant("<think>\nhm\n</think>\n\none"),
        _user("r"), _assistant("<think>\nso\n</think>\n\ntwo"),
    ],
    [_user("q"), _assistant("one", thinking="hm"), _user("r"), _assistant("two", thinking="so")],
    [
        _SYSTEM, _user("q"), _assistant("", tool_calls=[_FIRST]),
        _result("sun", "abcdefgh1"), _assistant("done"),
    ],
    [
        _user("q"), _assistant("I look.", tool_calls=[_FIRST], reasoning_content="hm"),
        _result("sun", "abcdefgh1"), _assistant("done", reasoning_content="so"),
        _user("r"), _assistant("two"),
    ],
    [
        _user("q"), _assistant("", tool_calls=[_FIRST, _SECOND]), _result("sun", "abcdefgh1"),
        _result("rain", "abcdefgh2"), _assistant("done"), _user("r"),
        _assistant("x", tool_calls=[_THIRD]), _result("snow", "abcdefgh3"), _assistant("ok"),
    ],
    [_user("q"), _assistant("", tool_calls=[_FIRST])],
]  # fmt: skip


def _render(template, messages, **options):
    try:
        texts, _ = render_jinja_template(
            [messages], chat_template=template, bos_token="<BOS>", eos_token="<EOS>", **options
        )
    except Exception as error:  # both templates must raise the same type
        return type(error).__name__
    return texts[0]


def _copy(messages, *, arguments_as_text):
    """Copy the messages; DeepSeek V3 expects the arguments of calls as JSON text."""
    copied = json.loads(json.dumps(messages))
    for call in itertools.chain(*(message.get("tool_calls", ()) for message in copied)):
        if arguments_as_text:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return copied


def compare(path, published):
    """Number of equal renderings, and number of renderings."""
    ours, theirs = path.read_text("utf-8"), published.read_text("utf-8")
    thinking = ({}, {"enable_thinking": False}, {"enable_thinking": True})
    equal = total = 0
    for messages, tools, prompt, mode in itertools.product(
        CONVERSATIONS, (None, [_TOOL]), (False, True), thinking
    ):
        options = mode | {"tools": tools, "add_generation_prompt": prompt}
        copied = _copy(messages, arguments_as_text=path.stem == "deepseek-v3")
        texts = [_render(template, copied, **options) for template in (ours, theirs)]
        if marker := _FIRST_USER_TURN.get(path.stem):
            texts = [text[text.find(marker) :] for text in texts]
        equal, total = equal + (texts[0] == texts[1]), total + 1
    return equal, total


def main():
    for path in sorted(HERE.glob("*.jinja")):
        named = re.search(r"Compared with (\S+)", path.read_text("utf-8"))
        name = Path(named[1]).name if named else ""
        name = name if name.endswith(".jinja") else path.name
        files = [Path(folder) / name for folder in sys.argv[1:]]
        for published in filter(Path.is_file, files):
            equal, total = compare(path, published)
            print(f"{path.stem:24} {equal} of {total} renderings equal")


if __name__ == "__main__":
    main()
