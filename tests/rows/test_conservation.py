"""Each text of a row is in its example or under an unread key, or the row is rejected."""

import itertools
import json

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pipeline.rows.examples import Completion, Conversation, RowError, Text
from pipeline.rows.formats import read_example
from tests.rows.read import row_of

pytestmark = pytest.mark.unit

ROW_KEYS = ["system", "system_prompt", "tools", "functions", "images", "chosen", "label", "text"]
ROW_KEYS += ["prompt", "completion", "conversations", "messages", "output", "history", "x"]
MESSAGE_KEYS = ["name", "tool_call_id", "reasoning", "reasoning_content", "thinking", "id", "x"]
MESSAGE_KEYS += ["timestamp", "refusal", "tool_calls", "function_call", "content", "value", "role"]
CALL_KEYS = ["name", "arguments", "args", "parameters", "input", "id", "call_id", "x", "function"]
PART_KEYS = ["text", "thinking", "content", "name", "input", "tool_use_id", "is_error", "x"]
PART_KEYS += ["thought", "toolUseId", "status"]
PART_TYPES = ["text", "thinking", "tool_use", "tool_result", "image", "reasoning"]
WRAPPERS = ["functionCall", "toolUse", "functionResponse", "toolResult", "reasoningContent"]
ROLES = ["system", "developer", "user", "assistant", "tool", "function_call", "human", "gpt"]


LAYOUTS = ["messages", "conversations", "prompt_and_completion", "texts", "alpaca"]


class Rows:
    """Random rows with a conversation and other keys; each leaf (a text value) occurs once."""

    def __init__(self, draw):
        self.draw, self.numbers, self.leaves = draw, itertools.count(), {}

    def leaf(self, *path):
        text = f"leaf{next(self.numbers)}-"
        self.leaves[text] = path
        return text

    def some(self, keys):
        """None of the keys, seldom one: with many unusual keys every row would be rejected."""
        key = self.draw(st.sampled_from([None] * 6 * len(keys) + keys))
        return [] if key is None else [key]

    def arguments(self, *path):
        value = {"a": self.leaf(*path, "a"), "b": {"c": [self.leaf(*path, "b")]}}
        return json.dumps(value) if self.draw(st.booleans()) else value

    def call(self, *path):
        key = self.draw(st.sampled_from(["arguments", "args", "parameters", "input"]))
        call = {"name": self.leaf(*path, "name"), key: self.arguments(*path, key)}
        for extra in self.some(CALL_KEYS):
            call[extra] = self.leaf(*path, extra)
        return {"function": call} if self.draw(st.booleans()) else call

    def part(self, *path):
        kind = self.draw(st.sampled_from(PART_TYPES))
        if self.draw(st.integers(0, 4)) == 0:
            return self.wrapped_part(*path)
        part = {"type": kind}
        if kind == "tool_use":
            part |= {"name": self.leaf(*path, "name"), "input": self.arguments(*path, "input")}
        else:
            key = "content" if kind == "tool_result" else kind
            part[key] = self.leaf(*path, key)
        for extra in self.some(PART_KEYS):
            part[extra] = self.leaf(*path, extra)
        return part

    def wrapped_part(self, *path):
        """A part as in the APIs of Gemini and Bedrock."""
        kind = self.draw(st.sampled_from(WRAPPERS))
        inner = {"name": self.leaf(*path, "name")}
        if kind in ("functionCall", "toolUse"):
            inner["args"] = self.arguments(*path, "args")
        elif kind == "toolResult":
            inner["content"] = [{"json": {"a": self.leaf(*path, "json")}}]
        else:
            key = "response" if kind == "functionResponse" else "text"
            inner[key] = self.leaf(*path, key)
        for extra in self.some(PART_KEYS):
            inner[extra] = self.leaf(*path, extra)
        part = {kind: inner}
        for extra in self.some(PART_KEYS):
            part[extra] = self.leaf(*path, extra)
        return part

    def message(self, *path):
        role = self.draw(st.sampled_from(ROLES))
        keys = (
            ("from", "value") if role in ("human", "gpt", "function_call") else ("role", "content")
        )
        message = {keys[0]: role, keys[1]: self.leaf(*path, keys[1])}
        form = self.draw(st.sampled_from(["text"] * 3 + ["parts", "object", "null"]))
        if form == "parts":
            message[keys[1]] = [
                self.part(*path, keys[1]) for _ in range(self.draw(st.integers(1, 3)))
            ]
        elif form == "object":
            message[keys[1]] = self.call(*path, keys[1])
        elif form == "null":
            message[keys[1]] = None
        for extra in self.some(MESSAGE_KEYS):
            message[extra] = self.leaf(*path, extra)
        if role == "assistant" and self.draw(st.booleans()):
            message["tool_calls"] = [self.call(*path, "tool_calls")]
        return message

    def row(self):
        layout = self.draw(st.sampled_from(LAYOUTS))
        row = getattr(self, layout)()
        for extra in self.some(ROW_KEYS):
            row[extra] = self.leaf(extra)
        if self.draw(st.booleans()):
            row["tools"] = [{"name": self.leaf("tools"), "parameters": {"x": self.leaf("tools")}}]
        return row

    def turns(self, column):
        answer = {"role": "assistant", "content": self.leaf(column, "content")}
        return [*(self.message(column) for _ in range(self.draw(st.integers(1, 3)))), answer]

    def messages(self):
        return {"messages": self.turns("messages")}

    def contents(self):
        """Turns as in the API of Gemini."""
        turns = []
        for role in ("user", self.draw(st.sampled_from(ROLES)), "model"):
            parts = [self.part("contents") for _ in range(self.draw(st.integers(0, 2)))]
            turns.append({"role": role, "parts": [*parts, {"text": self.leaf("contents")}]})
        return {"contents": turns, "systemInstruction": {"parts": [{"text": self.leaf("system")}]}}

    def conversations(self):
        return {"conversations": self.turns("conversations")}

    def prompt_and_completion(self):
        prompt = [self.message("prompt") for _ in range(self.draw(st.integers(1, 2)))]
        return {"prompt": prompt, "completion": self.turns("completion")}

    def texts(self):
        return {"prompt": self.leaf("prompt"), "completion": self.leaf("completion")}

    def alpaca(self):
        keys = ("instruction", "input", "output")
        return {key: self.leaf(key) for key in keys}


def texts_of(example):
    """All texts of an example, concatenated."""
    if isinstance(example, Conversation):
        messages = [[message.content, message.others] for message in example.messages]
        return json.dumps([messages, example.tools])
    if isinstance(example, Completion):
        return example.prompt + example.completion
    assert isinstance(example, Text)
    return example.text


@settings(max_examples=600)
@given(st.data())
def test_each_leaf_is_in_the_example_or_unread_or_the_row_is_rejected(data):
    rows = Rows(data.draw)
    row = rows.row()
    # A key that was drawn twice has replaced the leaf of the first draw.
    leaves = [leaf for leaf in rows.leaves if leaf in json.dumps(row)]
    try:
        result = read_example(row_of(row))
    except RowError:
        event("rejected")
        return
    event("read")
    text = texts_of(result.example)
    keys = {name.rpartition(".")[2] for name in result.unread}
    for leaf in leaves:
        assert leaf in text or not keys.isdisjoint(rows.leaves[leaf]), (leaf, row, result)
