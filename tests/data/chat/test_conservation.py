"""Every leaf of a row is written, structural, a thought omitted by design, or named."""

import json
import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.rows.examples import Conversation, Message, RowError
from tests.data.chat.documents import (
    all_shown,
    chat,
    encoder,
    published,
    shown,
    tokenizer_with,
    user,
)
from tests.data.chat.kinds import KINDS, kind
from tests.data.chat.matrix import FAMILIES
from tests.data.chat.matrix import tokenizer as family
from tests.messages import refused
from tests.tiny import CHATML

pytestmark = pytest.mark.tensor

IS_FULL = os.environ.get("TEMPLATES") == "full"  # `make templates`
RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck)}

TOOL = {
    "type": "function",
    "function": {
        "name": "forecast",
        "description": "The weather of a day",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where"},
                "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
                "days": {"type": "integer", "default": 1},
            },
            "required": ["city"],
        },
    },
}


def call(name="forecast", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def agent(*calls, content="", result="rain", **others):
    messages = (
        Message("user", "Weather?"),
        Message("assistant", content, True, {"tool_calls": list(calls), **others}),
        *(Message("tool", f"{result} {i}") for i in range(len(calls))),
        Message("assistant", "It rains."),
    )
    return Conversation(messages, (TOOL,))


def notes_of(example, tokenizer, **values):
    """Token counts of a row, without those of ends at which generation does not stop."""
    (row,) = encoder(tokenizer, **values).encode_many([example])
    assert not isinstance(row, RowError), row
    return {name: n for name, n in row.token_counts.items() if "without_stop" not in name}


class TestLost:
    """A part of a row that a template drops is named by its path."""

    CALLS = (
        "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
        "{{ c.function.arguments | tojson }}</call>{% endfor %}"
    )
    TEMPLATE = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
        + CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}" + CALLS)
    )  # fmt: skip

    def lossy(self, old, new):
        assert old in self.TEMPLATE
        return tokenizer_with(self.TEMPLATE.replace(old, new))

    def test_a_template_that_writes_all_of_it_loses_nothing(self):
        given = call(city="Oslo", days=3, deep={"flags": [True, None, 1.5, "x"]})
        found = shown(agent(given), tokenizer_with(self.TEMPLATE))
        assert '[[<call>forecast {"city": "Oslo", "days": 3, "deep": {"flags": [true' in found

    @pytest.mark.parametrize(
        ("old", "new", "leaf"),
        [
            ("{{ c.function.name }}", "", "messages[1].tool_calls[0].name"),
            ("{{ c.function.arguments | tojson }}", "", "messages[1].tool_calls[0].arguments.city"),
            (
                "{{ c.function.arguments | tojson }}",
                "{% for k, v in c.function.arguments.items() %}{{ v }}{% endfor %}",
                "messages[1].tool_calls[0].arguments.city",
            ),
            (
                "{{ c.function.arguments | tojson }}",
                "{% for k, v in c.function.arguments.items() %}{{ k }}="
                "{{ v if v is string }}{% endfor %}",
                "messages[1].tool_calls[0].arguments.days",
            ),
            ("{% for c in m.tool_calls or [] %}", "{% for c in (m.tool_calls or [])[:1] %}",
             "messages[1].tool_calls[1].name"),
            ("{{ t | tojson }}", "{{ t.function.name }}", "tools[0].function.description"),
            ("{{ t | tojson }}", "", "tools[0].function.name"),
            ("{{ m['content'] }}", "{{ m['content'] if m.role != 'tool' }}", "messages[2].content"),
            ("{{ m['content'] }}", "{{ m['content'][1:] }}", "messages[0].content"),
            ("{{ m['content'] }}", "{{ m['content'] | replace('e', '') }}", "messages[0].content"),
        ],
    )  # fmt: skip
    def test_a_leaf_that_is_not_written_is_named(self, old, new, leaf):
        row = agent(call(city="Oslo", days=3), call(city="Bergen"))
        with refused(leaf, error=RowError):
            shown(row, self.lossy(old, new))

    def test_a_name_of_a_user_is_named_and_that_of_a_result_is_structural(self):
        asked, answer = chat("q", "a").messages
        with refused("messages[0].name", error=RowError):
            shown(
                Conversation((replace(asked, others={"name": "Ann"}), answer)), published("qwen3")
            )
        row = agent(call(city="Oslo"))
        result = replace(row.messages[2], others={"name": "forecast", "tool_call_id": "c1"})
        row = replace(row, messages=(*row.messages[:2], result, row.messages[3]))
        assert "rain 0" in shown(row, published("qwen3"))

    def test_white_space_around_a_text_may_be_stripped_but_not_inside(self):
        assert "[[a  b<|eot_id|>]]" in shown(chat("q", " a  b\n"), published("llama-3"))
        inside = self.lossy("{{ m['content'] }}", "{{ m['content'] | replace(' ', '') }}")
        with refused("messages[1].content", error=RowError):
            shown(chat("q", "a b"), inside)


class TestThoughts:
    def test_text_before_and_between_thoughts_is_not_dropped(self):
        for said in ("Before.<think>a</think>b", "<think>a</think>b<think>c</think>d"):
            with refused("messages[1].content", error=RowError):
                shown(chat("q", said), published("qwen3"))
            found = shown(chat("q", said), published("qwen2.5"))
            assert found.endswith(f"assistant\n[[{said}<|im_end|>]]\n")

    @pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
    def test_thoughts_of_earlier_turns_are_counted(self, key):
        def turn(text, thought):
            return Message("assistant", text, True, {key: thought})

        asked = Message("user", "q")
        row = Conversation((asked, turn("a", "12345"), asked, turn("b", "678")))
        for name in ("channels", "qwen3"):
            tokenizer = kind(name) if name in KINDS else published(name)
            assert notes_of(row, tokenizer) == {"omitted_reasoning": 5}  # bytes
            assert notes_of(row, tokenizer, split_turns=True) == {}
        for text in all_shown(row, published("qwen3"), split_turns=True):
            assert text.count("[[<think>") == 1

    def test_thoughts_that_are_always_stripped_are_counted(self):
        row = chat("q", "<think>123</think>a", "r", "<think>45</think>b")
        assert notes_of(row, published("deepseek-r1-distill")) == {"omitted_reasoning": 5}

    def test_a_thought_that_is_dropped_in_some_rows_only_is_named(self):
        moody = CHATML.replace(
            "{{ m['content'] }}",
            "{{ m.reasoning_content if 'b' not in (m.reasoning_content or '') }}{{ m['content'] }}",
        )
        for thought in ("a", "b"):
            said = Message("assistant", "x", True, {"reasoning_content": thought})
            row = Conversation((Message("user", "q"), said))
            if thought == "a":
                assert "[[ax<|im_end|>]]" in shown(row, tokenizer_with(moody))
            else:
                with refused("messages[1].reasoning_content", error=RowError):
                    shown(row, tokenizer_with(moody))

    def test_an_empty_thought_is_treated_alike_before_answers_and_calls(self):
        empty = "<think>\n\n</think>\n\n"
        rows = [chat("q", "a"), replace(agent(call(city="Oslo")), tools=())]
        rows[1] = replace(rows[1], messages=rows[1].messages[:2])
        for row in rows:
            header = "<|im_start|>assistant\n"
            assert f"{header}[[{empty}" in shown(row, published("qwen3"))
            for values in (
                {"train_on_reasoning": False},
                {"chat_template_kwargs": {"enable_thinking": False}},
            ):
                assert f"{header}{empty}[[" in shown(row, published("qwen3"), **values)

    @pytest.mark.parametrize("name", ["channels", "next-role", "qwen3"])
    def test_reasoning_that_is_not_trained_is_read(self, name):
        tokenizer = kind(name) if name in KINDS else published(name)
        row = agent(call(city="Oslo"), reasoning_content="I must look")
        kept, read = shown(row, tokenizer), shown(row, tokenizer, train_on_reasoning=False)
        assert kept.replace("[[", "").replace("]]", "") == read.replace("[[", "").replace("]]", "")
        trained = "".join(part.partition("]]")[0] for part in read.split("[[")[1:])
        assert "I must look" in kept
        assert "I must look" not in trained
        assert "think>" not in trained
        assert "forecast" in trained
        assert "It rains." in trained


class TestKinds:
    def test_channel_headers_are_trained_and_every_end_is_known(self):
        found = shown(agent(call(city="Oslo")), kind("channels"))
        opened = "<|start|>assistant[[<|channel|>"
        call_text = 'commentary to=functions.forecast<|message|>{"city": "Oslo"}<|call|>]]'
        assert opened + call_text in found
        assert found.endswith(f"{opened}final<|message|>It rains.<|return|>]]")
        found = shown(chat("q", "one", "r", "two"), kind("channels"))
        assert f"{opened}final<|message|>one<|end|>]]<|start|>user" in found

    def test_the_token_of_the_next_role_ends_turns_and_the_last_one(self):
        found = shown(chat("q", "one", "r", "two"), kind("next-role"))
        assert found.endswith(
            "<|user|>q<|assistant|>[[<think></think>one<|user|>]]"
            "r<|assistant|>[[<think></think>two<|user|>]]"
        )
        row = agent(call(city="Oslo"))
        found = shown(replace(row, messages=row.messages[:2]), kind("next-role"))
        assert found.endswith("</tool_call><|observation|>]]")

    def test_arguments_are_text_where_a_template_joins_them(self):
        found = shown(replace(agent(call(city="Oslo", days=2)), tools=()), kind("joined"))
        assert '[[<call>function<sep>forecast\n{"city": "Oslo", "days": 2}</call></s>]]' in found

    def test_two_blocks_are_one_turn(self):
        found = shown(chat("q", "one", "r", "two"), kind("two-blocks"))
        assert found.count("[[") == found.count("<|im_end|>]]") == 2

    def test_ids_are_made_where_a_template_demands_them(self):
        row = replace(agent(call(city="Oslo"), call(city="Bergen")), tools=())
        found = shown(row, published("mistral-nemo"))
        for number in (0, 1):
            assert f'"id": "call0000{number}"' in found
            assert f'"call_id": "call0000{number}"' in found
        assert "[[<|call|>functions.forecast:0<|argument|>" in shown(row, kind("named-ids"))

    def test_ids_of_the_row_are_kept_where_they_will_do_and_results_follow_them(self):
        calls = [{**call(city=city), "id": new} for city, new in (("O", "toolong_1"), ("B", "b2"))]
        row = agent(*calls)
        answers = [
            replace(row.messages[n], others={"tool_call_id": old})
            for n, old in ((2, "b2"), (3, "toolong_1"))
        ]
        calls[0]["id"] = "abc123DEF"
        answers[1] = replace(answers[1], others={"tool_call_id": "abc123DEF"})
        row = Conversation((*row.messages[:2], *answers, row.messages[4]))
        found = shown(row, published("mistral-nemo"))
        assert found.index('"id": "abc123DEF"') < found.index('"id": "call00001"')
        assert '{"content": rain 0, "call_id": "call00001"}' in found
        assert '{"content": rain 1, "call_id": "abc123DEF"}' in found

    def test_a_thousand_turns_and_calls_are_one_document(self):
        messages = [Message("user", "go")]
        for i in range(1000):
            others = {"tool_calls": [call(city=f"c{i}")], "reasoning_content": f"thought {i}"}
            messages += [Message("assistant", f"step {i}", True, others), Message("tool", f"r{i}")]
        messages.append(Message("assistant", "done"))
        found = shown(Conversation(tuple(messages), (TOOL,)), published("qwen3"))
        assert found.count("[[") == 1001

    def test_a_template_for_tools_is_used_for_rows_with_tools(self):
        tokenizer = published("qwen2.5")
        tools = tokenizer.chat_template.replace("<|im_start|>system", "TOOLS<|im_start|>system")
        tokenizer.chat_template = {"default": CHATML, "tool_use": tools}
        assert shown(chat("q", "a"), tokenizer).startswith("<|im_start|>user")
        assert shown(agent(call(city="Oslo")), tokenizer).startswith("TOOLS")

    def test_a_template_file_replaces_the_model_s(self, tmp_path):
        path = tmp_path / "mine.jinja"
        path.write_text(CHATML.replace("<|im_start|>", "<|im_start|>my "))
        found = shown(chat("q", "a"), published("qwen3"), chat_template=str(path))
        expected = (user("q") + "[[a<|im_end|>]]\n").replace("start|>", "start|>my ")
        assert found == expected
        with refused("chat_template", tmp_path / "none.jinja"):
            shown(chat("q", "a"), published("qwen3"), chat_template=str(tmp_path / "none.jinja"))

    def test_variables_that_a_template_does_not_read_are_refused(self):
        with refused("chat_template_kwargs", "moood", "enable_thinking"):
            shown(chat("q", "a"), published("qwen3"), chat_template_kwargs={"moood": 1})
        fixed = {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}
        assert "26 Jul 2024" in shown(chat("q", "a"), published("llama-3.2"), **fixed)

    def test_the_ends_that_generation_stops_at_are_known(self, tmp_path):
        """<|eom_id|> ends a call that a tool of the server answers: no template shows it."""
        ends = published("llama-3")
        ends.add_tokens(["<|eom_id|>"], special_tokens=True)
        number = ends.convert_tokens_to_ids("<|eom_id|>")
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [number, 1]}))
        assert number in encoder(ends, model=str(tmp_path)).ends
        assert number not in encoder(ends, model="elsewhere").ends


class TestSpecialTokensInText:
    ROW = chat("say <|im_end|>", "x <|im_start|>y<|im_end|>")

    def test_they_are_kept_and_counted(self):
        assert notes_of(self.ROW, published("qwen3")) == {"special_tokens_in_text": 3}
        assert notes_of(chat("q", "a"), published("qwen3")) == {}

    def test_the_row_is_rejected(self):
        with refused("messages[0].content", "<|im_end|>", error=RowError):
            shown(self.ROW, published("qwen3"), special_tokens_in_text="reject")

    @pytest.mark.parametrize("name", ["qwen3", "mistral-nemo"])
    def test_they_are_tokenised_as_text(self, name):
        tokenizer = published(name)
        row = chat("say </s><|im_end|>", "x [INST]<|im_end|>y\u00e9", "r", "z")
        (plain,) = encoder(tokenizer).encode(row)
        (document,) = encoder(tokenizer, special_tokens_in_text="as-text").encode(row)
        decode = tokenizer.decode
        assert decode(document.ids.tolist()) == decode(plain.ids.tolist())
        special = set(encoder(tokenizer)._special_ids)
        ours = [token for token in document.ids.tolist() if token in special]
        (bare,) = encoder(tokenizer).encode(chat("say", "xy\u00e9", "r", "z"))
        assert ours == [token for token in bare.ids.tolist() if token in special]
        trained = decode(document.ids[document.supervised].tolist())
        assert trained == decode(plain.ids[plain.supervised].tolist())


# Random conversations over every template

words = st.text(st.sampled_from("abz \n\"'\\{}<>/\u00e9\U0001f600"), max_size=8)
solid = words.filter(str.strip)
keys = st.text(st.sampled_from("abk_"), min_size=1, max_size=4)
values = st.recursive(
    words | st.integers(-9, 99) | st.booleans() | st.none() | st.floats(0, 2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=2),
    max_leaves=5,
)


@st.composite
def contents(draw):
    """A text, perhaps with thoughts, text before them, between them and behind them."""
    parts = draw(st.lists(solid, min_size=1, max_size=3))
    if draw(st.booleans()):
        return "".join(parts)
    return "".join(f"<think>\n{part}\n</think>\n\n" for part in parts[:-1]) + parts[-1]


@st.composite
def assistants(draw):
    others = {}
    if draw(st.booleans()):
        named = st.dictionaries(keys, values, max_size=3)
        calls = draw(st.lists(named, min_size=1, max_size=2))
        others["tool_calls"] = [call(f"f{n}", **arguments) for n, arguments in enumerate(calls)]
    if draw(st.integers(0, 2)) == 0:
        others[draw(st.sampled_from(["reasoning_content", "thinking", "reasoning"]))] = draw(solid)
    text = draw(contents()) if "tool_calls" not in others or draw(st.booleans()) else ""
    return Message("assistant", text, draw(st.integers(0, 4)) > 0, others)


@st.composite
def conversations(draw):
    messages = []
    if draw(st.booleans()):
        messages.append(Message("system", draw(solid)))
    for _ in range(draw(st.integers(1, 3))):
        name = {"name": draw(solid)} if draw(st.integers(0, 9)) == 0 else {}
        messages.append(Message("user", draw(solid), True, name))
        said = draw(assistants())
        messages.append(said)
        for number, _ in enumerate(said.others.get("tool_calls", [])):
            result = {"tool_call_id": f"c{number}"} if draw(st.booleans()) else {}
            messages.append(Message("tool", draw(solid), True, result))
        if "tool_calls" in said.others:
            messages.append(Message("assistant", draw(contents())))
    tools = (TOOL,) if draw(st.booleans()) else ()
    return Conversation(tuple(messages), tools)


def texts_of(value):
    """Keys and texts of a value that a template must write; numbers as JSON."""
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
    forms = [text, repr(text)[1:-1], repr(f"'{text}")[2:-1]]
    forms += [json.dumps(text, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True)]
    return any(form in document for form in forms)


def must_be_written(row):
    """The texts that a document must hold; and those that it may omit as thoughts."""
    written, thoughts = [], []
    for message in row.messages:
        pieces = message.content.replace("</think>", "<think>").split("<think>")
        written += pieces[::2]
        thoughts += pieces[1::2]
        for key, value in message.others.items():
            if key == "tool_calls":
                written += texts_of([each["function"] for each in value])
            elif key == "name":
                written.append(value)
            elif key != "tool_call_id":
                thoughts.append(value)
    if row.tools:
        written += ["forecast", "The weather of a day", "Where", "celsius", "kelvin"]
    return [text for text in written if text not in ("name", "arguments")], thoughts


# Templates for which ids are made, arguments are joined, ends added, or reasoning is a part.
ADDED_TO = {
    "named-ids", "joined", "next-role", "mistral-nemo", "mistral-v3", "mistral-small-3.2",
    "deepseek-r1-distill", "deepseek-v3", "ministral-3",
}  # fmt: skip
PYTHON_SPELLING = {"true": "True", "false": "False", "null": "None"}


@pytest.mark.parametrize("name", [*KINDS, *sorted(FAMILIES)])
@settings(max_examples=300 if IS_FULL else 10, **RELAXED)
@given(rows=st.lists(conversations(), min_size=1, max_size=4))
def test_what_a_row_holds_is_written_omitted_by_design_or_named(name, rows):
    tokenizer = kind(name) if name in KINDS else family(name)
    made = encoder(tokenizer)
    for row, result in zip(rows, made.encode_many(rows), strict=True):
        if isinstance(result, RowError):
            assert str(result)
            continue
        (document,) = result.documents
        text = tokenizer.decode(document.ids.tolist())
        written, thoughts = must_be_written(row)
        for leaf in written:
            assert is_in(leaf, text) or is_in(PYTHON_SPELLING.get(leaf, leaf), text), leaf
        if not result.token_counts["omitted_reasoning"]:
            assert all(is_in(thought, text) for thought in thoughts)
        trained = tokenizer.decode(document.ids[document.supervised].tolist())
        for message in row.messages:
            answer = message.content.split("</think>")[-1]
            if message.role == "assistant" and message.is_trained:
                assert is_in(answer, trained)
        assert tokenizer.decode([document.ids[document.supervised][-1]]) in tokenizer.decode(
            sorted(made.ends)
        )


@pytest.mark.parametrize("name", [*KINDS, *sorted(FAMILIES)])
@settings(max_examples=300 if IS_FULL else 5, **RELAXED)
@given(row=conversations())
def test_the_text_is_that_of_transformers(name, row):
    """Where nothing had to be added: ids, arguments as text, an end behind the last turn."""
    if name in ADDED_TO:
        row = replace(row, messages=(*chat("q", row.messages[-1].content, "r").messages,))
    tokenizer = kind(name) if name in KINDS else family(name)
    messages = [{"role": m.role, "content": m.content, **m.others} for m in row.messages]
    finder = encoder(tokenizer)._turns(bool(row.tools))
    try:
        text = finder._template.render(row).text
    except RowError:
        return
    expected = tokenizer.apply_chat_template(
        messages, tools=list(row.tools) or None, tokenize=False
    )
    assert text == expected
