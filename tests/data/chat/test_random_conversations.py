"""Random conversations with every template: texts of the document, and equality with transformers.

Each text of a row is in the document, except reasoning that the template omits by design, or the
row is refused. The rendered text is that of `apply_chat_template`.
"""

import json
import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.rows.examples import Conversation, Message, RowError
from tests.data.chat.documents import TOOL, chat, encoder, tool_call
from tests.data.chat.kinds import KINDS, tokenizer_of
from tests.data.chat.matrix import FAMILIES

pytestmark = pytest.mark.tensor

IS_FULL = os.environ.get("TEMPLATES") == "full"  # `make templates`
# Hypothesis: examples may take long, and many of them may be refused.
RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck)}

words = st.text(st.sampled_from("abz \n\"'\\{}<>/\u00e9\U0001f600"), max_size=8)
non_blank = words.filter(str.strip)
keys = st.text(st.sampled_from("abk_"), min_size=1, max_size=4)
values = st.recursive(
    words | st.integers(-9, 99) | st.booleans() | st.none() | st.floats(0, 2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=2),
    max_leaves=5,
)


@st.composite
def contents(draw):
    """A text, perhaps with <think> blocks before it."""
    parts = draw(st.lists(non_blank, min_size=1, max_size=3))
    if draw(st.booleans()):
        return "".join(parts)
    return "".join(f"<think>\n{part}\n</think>\n\n" for part in parts[:-1]) + parts[-1]


@st.composite
def assistants(draw):
    others = {}
    if draw(st.booleans()):
        named = st.dictionaries(keys, values, max_size=3)
        calls = draw(st.lists(named, min_size=1, max_size=2))
        others["tool_calls"] = [
            tool_call(f"f{n}", **arguments) for n, arguments in enumerate(calls)
        ]
    if draw(st.integers(0, 2)) == 0:
        others[draw(st.sampled_from(["reasoning_content", "thinking", "reasoning"]))] = draw(
            non_blank
        )
    text = draw(contents()) if "tool_calls" not in others or draw(st.booleans()) else ""
    return Message("assistant", text, draw(st.integers(0, 4)) > 0, others)


@st.composite
def conversations(draw):
    messages = []
    if draw(st.booleans()):
        messages.append(Message("system", draw(non_blank)))
    for _ in range(draw(st.integers(1, 3))):
        name = {"name": draw(non_blank)} if draw(st.integers(0, 9)) == 0 else {}
        messages.append(Message("user", draw(non_blank), True, name))
        answer = draw(assistants())
        messages.append(answer)
        for number, _ in enumerate(answer.others.get("tool_calls", [])):
            result = {"tool_call_id": f"c{number}"} if draw(st.booleans()) else {}
            messages.append(Message("tool", draw(non_blank), True, result))
        if "tool_calls" in answer.others:
            messages.append(Message("assistant", draw(contents())))
    tools = (TOOL,) if draw(st.booleans()) else ()
    return Conversation(tuple(messages), tools)


def texts_of(value):
    """Keys and texts of a value; numbers as JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)
    else:
        yield json.dumps(value)


def is_in(text, document):
    """Whether the stripped text is in the document, plain or with escape sequences."""
    text = text.strip()
    # The last form is that of text between single quotes, as in LFM2's calls.
    forms = [text, repr(text)[1:-1], repr(f"""'"{text}""")[4:-1]]
    forms += [json.dumps(text, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True)]
    return any(form in document for form in forms)


def required_texts(row):
    """The texts that a document must have, and reasoning that it may omit."""
    required, reasoning = [], []
    for message in row.messages:
        # Texts outside and inside <think> blocks alternate.
        alternating = message.content.replace("</think>", "<think>").split("<think>")
        required += alternating[::2]
        reasoning += alternating[1::2]
        for key, value in message.others.items():
            if key == "tool_calls":
                required += texts_of([each["function"] for each in value])
            elif key == "name":
                required.append(value)
            elif key != "tool_call_id":
                reasoning.append(value)
    if row.tools:
        required += ["forecast", "The weather of a day", "Where", "celsius", "kelvin"]
    return [text for text in required if text not in ("name", "arguments")], reasoning


# Templates whose input the encoder changes: generated ids, arguments as text, reasoning parts. For
# some of them it also appends the end of the last turn.
CHANGED_INPUT = [
    "named-ids", "joined", "next-role", "mistral-nemo", "mistral-v3", "mistral-small-3.2",
    "deepseek-r1-distill", "deepseek-v3", "ministral-3",
]  # fmt: skip
ALL = [*KINDS, *sorted(FAMILIES)]
PYTHON_SPELLING = {"true": "True", "false": "False", "null": "None"}  # some templates write these


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=300 if IS_FULL else 5, **RELAXED)
@given(rows=st.lists(conversations(), min_size=1, max_size=4))
def test_each_text_of_a_row_is_written_or_omitted_reasoning_or_the_row_is_refused(name, rows):
    tokenizer = tokenizer_of(name)
    row_encoder = encoder(tokenizer)
    for row, result in zip(rows, row_encoder.encode_many(rows), strict=True):
        if isinstance(result, RowError):
            assert str(result)
            continue
        (document,) = result.documents
        text = tokenizer.decode(document.ids.tolist())
        required, reasoning = required_texts(row)
        for each in required:
            assert is_in(each, text) or is_in(PYTHON_SPELLING.get(each, each), text), each
        if not result.token_counts["omitted_reasoning"]:
            assert all(is_in(each, text) for each in reasoning)
        trained = tokenizer.decode(document.ids[document.supervised].tolist())
        for message in row.messages:
            answer = message.content.split("</think>")[-1]
            if message.role == "assistant" and message.is_trained:
                assert is_in(answer, trained)
        assert tokenizer.decode([document.ids[document.supervised][-1]]) in tokenizer.decode(
            sorted(row_encoder.end_ids)
        )


@pytest.mark.parametrize("name", [name for name in ALL if name not in CHANGED_INPUT])
@settings(max_examples=300 if IS_FULL else 5, **RELAXED)
@given(row=conversations())
def test_the_rendered_text_equals_that_of_transformers(name, row):
    assert_rendered_like_transformers(tokenizer_of(name), row)


@pytest.mark.parametrize("name", CHANGED_INPUT)
@settings(max_examples=300 if IS_FULL else 5, **RELAXED)
@given(row=conversations())
def test_the_rendered_text_of_plain_turns_equals_that_of_transformers(name, row):
    """Plain turns are rendered without a change of the template's input."""
    row = replace(row, messages=(*chat("q", row.messages[-1].content, "r").messages,))
    assert_rendered_like_transformers(tokenizer_of(name), row)


def assert_rendered_like_transformers(tokenizer, row):
    messages = [{"role": m.role, "content": m.content, **m.others} for m in row.messages]
    finder = encoder(tokenizer)._finder_for(bool(row.tools))
    try:
        text = finder._template.render(row).text
    except RowError:
        return
    expected = tokenizer.apply_chat_template(
        messages, tools=list(row.tools) or None, tokenize=False
    )
    assert text == expected
