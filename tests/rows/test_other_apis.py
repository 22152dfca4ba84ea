"""A row in the form of another API is read as the same example as that row in OpenAI's form."""

import copy
import json

import pytest

from pipeline.rows.examples import RowError
from pipeline.rows.formats import read_example
from tests.messages import refused
from tests.rows.read import row_of

pytestmark = pytest.mark.unit

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
EXPECTED = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Bergen?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "I need the forecast.",
            "tool_calls": [
                {
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "forecast", "arguments": {"city": "Bergen"}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": '{"sky": "rain"}'},
        {"role": "assistant", "content": "It rains."},
    ],
    "tools": [
        {
            "type": "function",
            "function": {"name": "forecast", "description": "d", "parameters": SCHEMA},
        }
    ],
}
GEMINI = {
    "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
    "contents": [
        {"role": "user", "parts": [{"text": "Weather in Bergen?"}]},
        {
            "role": "model",
            "parts": [
                {"text": "I need the forecast.", "thought": True},
                {"text": "Let me look.", "thought": False},
                {"functionCall": {"id": "t1", "name": "forecast", "args": {"city": "Bergen"}}},
            ],
        },
        {
            "role": "user",
            "parts": [{"functionResponse": {"id": "t1", "response": {"sky": "rain"}}}],
        },
        {"role": "model", "parts": [{"text": "It rains."}]},
    ],
    "tools": [
        {"functionDeclarations": [{"name": "forecast", "description": "d", "parameters": SCHEMA}]}
    ],
}
BEDROCK = {
    "system": [{"text": "Be brief."}],
    "messages": [
        {"role": "user", "content": [{"text": "Weather in Bergen?"}]},
        {
            "role": "assistant",
            "content": [
                {"reasoningContent": {"reasoningText": {"text": "I need the forecast."}}},
                {"text": "Let me look."},
                {"toolUse": {"toolUseId": "t1", "name": "forecast", "input": {"city": "Bergen"}}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"toolResult": {"toolUseId": "t1", "content": [{"json": {"sky": "rain"}}]}}
            ],
        },
        {"role": "assistant", "content": [{"text": "It rains."}]},
    ],
    "toolConfig": {
        "tools": [
            {"toolSpec": {"name": "forecast", "description": "d", "inputSchema": {"json": SCHEMA}}}
        ]
    },
}


@pytest.mark.parametrize("row", [GEMINI, BEDROCK], ids=["gemini", "bedrock"])
def test_the_row_is_read_as_the_same_example_as_in_openai_s_form(row):
    expected = read_example(row_of(EXPECTED))
    assert read_example(row_of(row)) == expected


@pytest.mark.parametrize("key", ["thoughtSignature", "thought_signature"])
def test_signatures_of_thoughts_in_gemini_s_parts_are_ignored(key):
    row = copy.deepcopy(GEMINI)
    for content in row["contents"]:
        for part in content["parts"]:
            part[key] = "c2lnbmF0dXJl"
    assert read_example(row_of(row)) == read_example(row_of(EXPECTED))


def test_keys_of_gemini_in_snake_case_are_read_too():
    text = json.dumps(GEMINI)
    for old, new in [
        ("systemInstruction", "system_instruction"),
        ("functionCall", "function_call"),
        ("functionResponse", "function_response"),
        ("functionDeclarations", "function_declarations"),
    ]:
        assert old in text
        text = text.replace(old, new)
    assert read_example(row_of(json.loads(text))) == read_example(row_of(EXPECTED))


def test_keys_of_a_part_that_are_null_are_ignored():
    """Rows of a Parquet file have every key in every part; keys that are not set are null."""
    keys = ("text", "thought", "functionCall", "functionResponse")
    contents = [
        {**turn, "parts": [dict.fromkeys(keys) | part for part in turn["parts"]]}
        for turn in GEMINI["contents"]
    ]
    row = GEMINI | {"contents": contents}
    assert read_example(row_of(row)) == read_example(row_of(EXPECTED))


@pytest.mark.parametrize("keys", [("response", "content"), ("content", "response")])
def test_a_null_key_beside_the_response_of_a_function_is_ignored(keys):
    part = {"id": "t1"} | dict.fromkeys(keys) | {"response": {"sky": "rain"}}
    contents = [*GEMINI["contents"]]
    contents[2] = {"role": "user", "parts": [{"functionResponse": part}]}
    row = GEMINI | {"contents": contents}
    assert read_example(row_of(row)) == read_example(row_of(EXPECTED))


def test_a_function_response_with_role_function_is_read_as_a_tool_message():
    contents = [
        turn | {"role": "function"} if "functionResponse" in turn["parts"][0] else turn
        for turn in GEMINI["contents"]
    ]
    row = GEMINI | {"contents": contents}
    assert read_example(row_of(row)) == read_example(row_of(EXPECTED))


@pytest.mark.parametrize("role", ["model", "gpt", "bot", "chatgpt", "ai", "assistant"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_every_name_of_the_assistant_is_known_in_messages_and_conversations(role, column):
    question = {"role": "human", "content": "q"}
    expected = read_example(row_of({column: [question, {"role": "assistant", "content": "a"}]}))
    assert read_example(row_of({column: [question, {"role": role, "content": "a"}]})) == expected


@pytest.mark.parametrize(
    "part",
    [
        {"inlineData": {"mimeType": "image/png", "data": "aGk="}},
        {"fileData": {"fileUri": "gs://b/o"}},
        {"image": {"format": "png"}},
        {"executableCode": {"code": "1"}},
        {"text": "a", "functionCall": {"name": "f"}},
        {"text": "a", "thought": "hm"},
        {"functionResponse": {"response": {"a": 1}, "content": "b"}},
        {"toolResult": {"toolUseId": "t1", "tool_use_id": "t2", "content": [{"text": "a"}]}},
    ],
)
def test_a_row_with_an_unsupported_part_is_refused_with_the_key_of_the_part(part):
    row = {
        "contents": [{"role": "user", "parts": [part]}, {"role": "model", "parts": [{"text": "a"}]}]
    }
    first_key = next(iter(part))
    with refused("part", first_key, error=RowError):
        read_example(row_of(row))


@pytest.mark.parametrize(
    "item",
    [
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "rain"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
    ],
)
def test_an_item_of_openai_s_responses_api_that_is_not_a_message_is_refused_with_its_type(item):
    row = {
        "messages": [{"role": "user", "content": "q"}, item, {"role": "assistant", "content": "a"}]
    }
    with refused(item["type"], "tool_calls", error=RowError):
        read_example(row_of(row))


def test_a_message_with_content_and_parts_is_refused():
    answer = {"role": "assistant", "content": "a", "parts": [{"text": "b"}]}
    with refused("content", "parts", error=RowError):
        read_example(row_of({"messages": [{"role": "user", "content": "q"}, answer]}))


def test_a_message_of_the_responses_api_is_read():
    answer = {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "a", "annotations": []}],
    }
    result = read_example(row_of({"messages": [{"role": "user", "content": "q"}, answer]}))
    assert result.example.messages[1].content == "a"
    assert result.unread == ("message.status",)
