"""Random rows with conversations, in which every text and number occurs once.

The form of each part is random: role names, content as text or as a list of parts, layout of tool
calls, names of keys, and tools. Rarely a row has a key or column that does not belong there.
"""

import itertools
import json
from dataclasses import dataclass

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
# Names of a role in the formats of different programs.
USERS, ASSISTANTS = ["user", "human"], ["assistant", "model", "gpt", "bot", "chatgpt"]
TOOLS = ["tool", "function", "tool_response", "observation"]
FORMS = ["contents", "messages", "conversations", "prompt_and_completion", "texts", "alpaca"]
DECORATIONS = ["", "", "", ' "q"', "\nline", " {b}", " \u00e9\U0001f600", " <b>", " \\n", " 'a'"]


@dataclass(frozen=True)
class Leaf:
    """A text or number of a row.

    `role`: role of its message, or "untrained", "tools" or "column". `path`: keys that lead to it.
    """

    role: str
    path: tuple[str, ...]
    is_reasoning: bool = False


class RandomRow:
    """Generator of one row, by `row`; the methods draw its parts from a `random.Random`.

    `leaves`: text of each leaf of the row -> Leaf. `role`: role of the leaves that are drawn next.
    """

    def __init__(self, random):
        self.random, self.numbers, self.leaves = random, itertools.count(100), {}
        self.role = ""

    def choose(self, values):
        return self.random.choice(values)

    def is_rare(self, one_in):
        """True with a probability of 1 / `one_in`."""
        return self.random.randrange(one_in) == 0

    def leaf(self, *path, is_reasoning=False):
        """A new unique text."""
        text = f"leaf{next(self.numbers)}-"
        self.leaves[text] = Leaf(self.role, path, is_reasoning)
        return text + self.choose(DECORATIONS)

    def number(self, *path):
        """A new unique number, whose digits are not part of another leaf."""
        number = next(self.numbers) * 1000 + 7
        self.leaves[str(number)] = Leaf(self.role, path)
        return number

    def add_stray_key(self, value, keys, *path):
        """Rarely add a key that does not belong there; a row with many of them is always rejected.

        `path`: the keys that lead to `value`.
        """
        if self.is_rare(6 * len(keys)):
            key = self.choose(keys)
            value[key] = self.leaf(*path, key)

    def arguments(self, *path):
        value = {"a": self.leaf(*path, "a"), "b": {"c": [self.leaf(*path, "b")]}}
        if self.is_rare(2):
            value |= {self.leaf(*path, "key"): self.number(*path, "number"), "flag": True}
        return json.dumps(value) if self.is_rare(2) else value

    def call(self, *path):
        key = self.choose(["arguments", "args", "parameters", "input"])
        call = {"name": self.leaf(*path, "name"), key: self.arguments(*path, key)}
        self.add_stray_key(call, CALL_KEYS, *path)
        layout = self.choose(["flat", "function", "id"])
        if layout == "flat":
            return call
        identifier = {"id": self.leaf(*path, "id")} if layout == "id" else {}
        return {**identifier, "type": "function", "function": call}

    def part(self, *path, kind=None):
        kind = kind or self.choose(PART_TYPES + WRAPPERS)
        if kind in WRAPPERS:
            return self.wrapped_part(kind, *path)
        part = {"type": kind}
        if kind == "tool_use":
            part |= {"name": self.leaf(*path, "name"), "input": self.arguments(*path, "input")}
        else:
            key = "content" if kind == "tool_result" else kind
            part[key] = self.leaf(*path, key, is_reasoning=kind in ("thinking", "reasoning"))
        self.add_stray_key(part, PART_KEYS, *path)
        return part

    def wrapped_part(self, kind, *path):
        """A part as in the APIs of Gemini and Bedrock."""
        inner = {}
        if kind in ("functionCall", "toolUse"):
            inner |= {"name": self.leaf(*path, "name"), "args": self.arguments(*path, "args")}
        elif kind == "toolResult":
            inner["content"] = [{"json": {"a": self.leaf(*path, "json")}}]
        elif kind == "functionResponse":
            inner["response"] = {"a": self.leaf(*path, "response")}
        else:
            inner["text"] = self.leaf(*path, "text", is_reasoning=True)
        self.add_stray_key(inner, PART_KEYS, *path)
        part = {kind: inner}
        self.add_stray_key(part, PART_KEYS, *path)
        return part

    def tools(self):
        """Tools in one of the forms of the column, or no column."""
        self.role = "tools"
        form = self.choose(["none", "none", "flat", "wrapped", "text", "declarations"])
        if form == "none":
            return {}
        properties = {self.leaf("tools"): {"type": "string", "description": self.leaf("tools")}}
        tool = {
            "name": self.leaf("tools"),
            "description": self.leaf("tools"),
            "parameters": {"type": "object", "properties": properties},
        }
        if form == "declarations":
            return {"tools": [{"functionDeclarations": [tool]}]}
        tools = [tool if form == "flat" else {"type": "function", "function": tool}]
        return {"tools": json.dumps(tools) if form == "text" else tools}

    def row(self, *, is_regular):
        """A row of any format. `is_regular`: its turns alternate as most chat templates want."""
        if is_regular:
            row = self.regular_row()
        else:
            row = getattr(self, self.choose(FORMS))()
        row |= self.tools()
        self.role = "column"
        self.add_stray_key(row, ROW_KEYS)
        return row

    # Turns in an order that most chat templates accept

    def regular_row(self):
        form = self.choose(["messages", "text", "conversations", "contents", "completion"])
        keys = ("from", "value") if form == "conversations" else ("role", "content")
        if form == "contents":
            keys = ("role", "parts")
        turns = self.regular_turns(keys)
        if form == "completion":
            prompt_roles = {*USERS, "system", "developer"}
            first_answer = next(
                i for i, turn in enumerate(turns) if turn["role"] not in prompt_roles
            )
            return {"prompt": turns[:first_answer], "completion": turns[first_answer:]}
        if form == "text":
            return {"messages": json.dumps(turns)}
        return {form: turns}

    def regular_turns(self, keys):
        """Turns in which user and assistant alternate; `keys`: those of role and content."""
        turns = []
        if self.is_rare(3):
            turns.append(self.plain_turn("system", ["system", "developer"], keys))
        for _ in range(self.random.randint(1, 3)):
            turns.append(self.plain_turn("user", USERS, keys))
            if self.is_rare(2):
                count = self.random.randint(1, 2)
                turns.append(self.calling_turn(keys, count))
                turns += [self.plain_turn("tool", TOOLS, keys) for _ in range(count)]
            turns.append(self.answer(keys))
        return turns

    def turn(self, role, names, keys, content, **others):
        turn = {keys[0]: self.choose(names), keys[1]: content, **others}
        self.add_stray_key(turn, MESSAGE_KEYS, role)
        return turn

    def plain_turn(self, role, names, keys):
        """A system prompt, a question, or the result of a tool."""
        self.role = role
        has_parts = keys[1] == "parts"
        if role == "tool" and has_parts:
            part = self.wrapped_part("functionResponse", role)
            return self.turn(role, ["user", "function"], keys, [part])
        if has_parts or self.is_rare(4):
            parts = [{"text": self.leaf(role, "text")} for _ in range(self.random.randint(1, 2))]
            typed = parts if has_parts else [{"type": "text", **part} for part in parts]
            return self.turn(role, names, keys, typed)
        if role == "tool" and self.is_rare(3):
            return self.turn(role, names, keys, {"a": self.leaf(role), "n": self.number(role)})
        return self.turn(role, names, keys, self.leaf(role, keys[1]))

    def answer(self, keys):
        self.role = "assistant"
        others = {}
        if self.is_rare(6):
            others["weight"], self.role = 0, "untrained"
        # Reasoning: none, in a <think> block, under a key of the message, in a content part, in a
        # block with text before it, or in two blocks.
        form = self.choose(["text"] * 3 + ["block", "key", "parts", "before", "two"])
        if keys[1] == "parts":
            parts = [{"text": self.leaf("answer")}]
            if form == "key":
                thought = self.leaf("thought", is_reasoning=True)
                parts.insert(0, {"text": thought, "thought": True})
            return self.turn("assistant", ["model"], keys, parts, **others)
        if form == "key":
            key = self.choose(["reasoning_content", "reasoning", "thinking"])
            others[key] = self.leaf(key, is_reasoning=True)
        content = self.leaf("answer")
        if form == "parts":
            content = [self.part("content", kind="thinking"), self.part("content", kind="text")]
        elif form in ("block", "before", "two"):
            block = f"<think>\n{self.leaf('block', is_reasoning=True)}\n</think>\n\n"
            before = self.leaf("before") + "\n" if form == "before" else ""
            if form == "two":
                before = f"<think>{self.leaf('block', is_reasoning=True)}</think>"
            content = before + block + content
        return self.turn("assistant", ASSISTANTS, keys, content, **others)

    def calling_turn(self, keys, count):
        """An assistant turn with this number of tool calls."""
        self.role = "assistant"
        if keys[1] == "parts":
            parts = [self.wrapped_part("functionCall", "call") for _ in range(count)]
            return self.turn("call", ["model"], keys, parts)
        form = self.choose(["list", "list", "parts", "turn", "text"])
        if form == "turn":
            content = [self.call("turn") for _ in range(count)]
            content = json.dumps(content) if self.is_rare(2) else content
            return self.turn("call", ["function_call", "tool_call"], keys, content)
        if form == "parts":
            kind = self.choose(["tool_use", "toolUse"])
            content = [self.part("content", kind="text")] if self.is_rare(2) else []
            content += [self.part("content", kind=kind) for _ in range(count)]
            return self.turn("call", ASSISTANTS, keys, content)
        calls = [self.call("tool_calls") for _ in range(count)]
        content = self.choose([None, "", "text"])
        content = self.leaf("beside") if content == "text" else content
        others = {"tool_calls": json.dumps(calls) if form == "text" else calls}
        if self.is_rare(3):
            others["reasoning_content"] = self.leaf("reasoning_content", is_reasoning=True)
        return self.turn("call", ASSISTANTS, keys, content, **others)

    # Turns in any order

    def message(self, *path):
        role = self.choose(ROLES)
        self.role = role
        keys = (
            ("from", "value") if role in ("human", "gpt", "function_call") else ("role", "content")
        )
        message = {keys[0]: role, keys[1]: self.leaf(*path, keys[1])}
        form = self.choose(["text"] * 3 + ["parts", "object", "null"])
        if form == "parts":
            count = self.random.randint(1, 3)
            message[keys[1]] = [self.part(*path, keys[1]) for _ in range(count)]
        elif form == "object":
            message[keys[1]] = self.call(*path, keys[1])
        elif form == "null":
            message[keys[1]] = None
        self.add_stray_key(message, MESSAGE_KEYS, *path)
        if role == "assistant" and self.is_rare(2):
            message["tool_calls"] = [self.call(*path, "tool_calls")]
        return message

    def turns(self, column):
        turns = [self.message(column) for _ in range(self.random.randint(1, 3))]
        self.role = "assistant"
        return [*turns, {"role": "assistant", "content": self.leaf(column, "content")}]

    def messages(self):
        return {"messages": self.turns("messages")}

    def conversations(self):
        return {"conversations": self.turns("conversations")}

    def contents(self):
        turns = []
        for role in ("user", self.choose(ROLES), "model"):
            self.role = role
            parts = [self.part("contents") for _ in range(self.random.randint(0, 2))]
            turns.append({"role": role, "parts": [*parts, {"text": self.leaf("contents")}]})
        return {"contents": turns, "systemInstruction": {"parts": [{"text": self.leaf("system")}]}}

    def prompt_and_completion(self):
        prompt = [self.message("prompt") for _ in range(self.random.randint(1, 2))]
        return {"prompt": prompt, "completion": self.turns("completion")}

    def texts(self):
        return {"prompt": self.leaf("prompt"), "completion": self.leaf("completion")}

    def alpaca(self):
        return {key: self.leaf(key) for key in ("instruction", "input", "output")}
