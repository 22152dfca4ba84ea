"""Conversations with the templates of tests/data/chat/kinds.py: loss masks, calls and their ids.

Documents are shown as text with supervised spans in [[brackets]].
"""

from dataclasses import replace

import pytest

from pipeline.rows.examples import Conversation, Message
from tests.data.chat.documents import (
    TOOL,
    chat,
    conversation_with_calls,
    marked_text,
    published,
    tool_call,
)
from tests.data.chat.kinds import kind_tokenizer

pytestmark = pytest.mark.tensor


def test_channel_headers_and_every_end_of_turn_are_supervised():
    text = marked_text(conversation_with_calls(tool_call(city="Oslo")), kind_tokenizer("channels"))
    header = "<|start|>assistant[[<|channel|>"
    call_text = 'commentary to=functions.forecast<|message|>{"city": "Oslo"}<|call|>]]'
    assert header + call_text in text
    assert text.endswith(f"{header}final<|message|>It rains.<|return|>]]")
    text = marked_text(chat("q", "one", "r", "two"), kind_tokenizer("channels"))
    assert f"{header}final<|message|>one<|end|>]]<|start|>user" in text


def test_the_token_of_the_next_role_ends_every_turn():
    text = marked_text(chat("q", "one", "r", "two"), kind_tokenizer("next-role"))
    assert text.endswith(
        "<|user|>q<|assistant|>[[<think></think>one<|user|>]]"
        "r<|assistant|>[[<think></think>two<|user|>]]"
    )
    row = conversation_with_calls(tool_call(city="Oslo"))
    text = marked_text(replace(row, messages=row.messages[:2]), kind_tokenizer("next-role"))
    assert text.endswith("</tool_call><|observation|>]]")


def test_arguments_are_json_text_if_a_template_concatenates_them():
    row = conversation_with_calls(tool_call(city="Oslo", days=2), tools=())
    text = marked_text(row, kind_tokenizer("joined"))
    assert '[[<call>function<sep>forecast\n{"city": "Oslo", "days": 2}</call></s>]]' in text


def test_two_generation_blocks_are_one_span():
    text = marked_text(chat("q", "one", "r", "two"), kind_tokenizer("two-blocks"))
    assert text.count("[[") == text.count("<|im_end|>]]") == 2


def test_missing_call_ids_are_generated_if_a_template_requires_them():
    row = conversation_with_calls(tool_call(city="Oslo"), tool_call(city="Bergen"), tools=())
    text = marked_text(row, published("mistral-nemo"))
    for number in (0, 1):
        assert f'"id": "call0000{number}"' in text
        assert f'"call_id": "call0000{number}"' in text
    text = marked_text(row, kind_tokenizer("named-ids"))
    assert "[[<|call|>functions.forecast:0<|argument|>" in text


def test_valid_call_ids_are_kept_invalid_ones_replaced_and_results_refer_to_them():
    """Mistral Nemo needs ids of nine characters, so `b2` is replaced."""
    ids = ("abc123DEF", "b2")
    calls = [tool_call(city="Oslo") | {"id": ids[0]}, tool_call(city="Bergen") | {"id": ids[1]}]
    row = conversation_with_calls(*calls, tools=())
    question, turn, result_0, result_1, answer = row.messages
    results = (  # not in the order of their calls
        replace(result_0, others={"tool_call_id": ids[1]}),
        replace(result_1, others={"tool_call_id": ids[0]}),
    )
    row = Conversation((question, turn, *results, answer))
    text = marked_text(row, published("mistral-nemo"))
    assert text.index('"id": "abc123DEF"') < text.index('"id": "call00001"')
    assert '{"content": rain 0, "call_id": "call00001"}' in text
    assert '{"content": rain 1, "call_id": "abc123DEF"}' in text


def test_a_thousand_turns_and_calls_are_one_document():
    messages = [Message("user", "go")]
    for i in range(1000):
        others = {"tool_calls": [tool_call(city=f"c{i}")], "reasoning_content": f"reason {i}"}
        messages += [Message("assistant", f"step {i}", True, others), Message("tool", f"r{i}")]
    messages.append(Message("assistant", "done"))
    text = marked_text(Conversation(tuple(messages), (TOOL,)), published("qwen3"))
    assert text.count("[[") == 1001
