"""Special tokens inside a row's texts never end a turn or open one, whatever the setting."""

import json

import pytest

from pipeline.data.chat.tokenizer import special_ids, special_pattern
from pipeline.rows.examples import Conversation, Message, RowError
from tests.data.chat.documents import encoder, published
from tests.data.chat.kinds import tokenizer_of
from tests.messages import refused

pytestmark = pytest.mark.tensor

# A kind of template, or a family of tests/templates -> special tokens to write into texts: those
# that end a turn, and those that open a turn of the user or the assistant.
TOKENS = {
    "channels": ["<|end|>", "<|return|>", "<|start|>"],
    "next-role": ["<|user|>", "<|observation|>", "<|assistant|>"],
    "joined": ["</s>", "<|User|>", "<|Assistant|>"],
    "named-ids": ["<|im_end|>", "<|im_user|>", "<|im_assistant|>"],
    "gpt-oss": ["<|end|>", "<|call|>", "<|start|>"],
    "glm-4.6": ["<|user|>", "<|observation|>", "<|assistant|>"],
    "qwen3": ["<|im_end|>", "<|im_start|>"],
    "llama-3.1": ["<|eot_id|>", "<|start_header_id|>"],
    "mistral-nemo": ["</s>", "[INST]"],
}
CASES = [(name, token) for name, tokens in TOKENS.items() for token in tokens]


def conversation(mark):
    """A conversation with `mark` NUM_MARKS times: at the start, inside and at the end of texts."""
    call = {"id": "call00001", "type": "function"}
    call["function"] = {"name": "weather", "arguments": {"city": f"Oslo{mark}"}}
    return Conversation(
        (
            Message("user", f"{mark}question {mark} one"),
            Message("assistant", f"answer{mark}{mark} one"),
            Message("user", f"question two{mark}"),
            Message("assistant", "", others={"tool_calls": [call]}),
            Message("tool", f"result {mark}.", others={"tool_call_id": "call00001"}),
            Message("assistant", f"answer {mark} two"),
        )
    )


NUM_MARKS = 8


def encoded(name, mark, **settings):
    """The encoded conversation, or the RowError of a refused one."""
    (result,) = encoder(tokenizer_of(name), **settings).encode_many([conversation(mark)])
    return result


def texts(name, document):
    """The text of a document and the trained text."""
    decode = tokenizer_of(name).decode
    return decode(document.ids.tolist()), decode(document.ids[document.supervised].tolist())


@pytest.mark.parametrize(("name", "token"), CASES)
@pytest.mark.parametrize("setting", ["keep", "as-text"])
def test_special_tokens_in_texts_change_neither_the_text_nor_the_mask(name, token, setting):
    """Compare the document with one that has a plain word, MARK, in place of the special token."""
    settings = {"special_tokens_in_text": setting}
    with_token = encoded(name, token, **settings)
    with_word = encoded(name, "MARK", **settings)
    assert not isinstance(with_token, RowError), with_token
    text, trained = texts(name, with_word.documents[0])
    expected = text.replace("MARK", token), trained.replace("MARK", token)
    assert texts(name, with_token.documents[0]) == expected
    assert with_token.token_counts["special_tokens_in_text"] == NUM_MARKS
    assert not with_word.token_counts["special_tokens_in_text"]


@pytest.mark.parametrize(("name", "token"), CASES)
def test_as_text_leaves_only_the_special_tokens_of_the_template(name, token):
    ids_of_special_tokens = set(special_ids(tokenizer_of(name)).values())

    def special_ids_in_document(mark, setting):
        result = encoded(name, mark, special_tokens_in_text=setting)
        return [i for i in result.documents[0].ids.tolist() if i in ids_of_special_tokens]

    of_template = special_ids_in_document("MARK", "keep")
    assert special_ids_in_document(token, "as-text") == of_template
    assert len(special_ids_in_document(token, "keep")) == len(of_template) + NUM_MARKS


@pytest.mark.parametrize(("name", "token"), CASES)
def test_reject_refuses_the_row_with_the_first_text_that_has_a_special_token(name, token):
    result = encoded(name, token, special_tokens_in_text="reject")
    with refused("messages[0].content", token, "special_tokens_in_text", error=RowError):
        raise result
    plain = encoded(name, "MARK", special_tokens_in_text="reject")
    assert len(plain.documents) == 1


@pytest.mark.parametrize(("name", "token"), CASES)
def test_split_turns_counts_special_tokens_in_texts_once(name, token):
    result = encoded(name, token, split_turns=True)
    assert len(result.documents) == 3
    assert result.token_counts["special_tokens_in_text"] == NUM_MARKS


@pytest.mark.parametrize(("name", "token"), CASES)
def test_last_assistant_trains_the_last_answer_only_despite_special_tokens_in_texts(name, token):
    result = encoded(name, token, train_on="last-assistant")
    _text, trained = texts(name, result.documents[0])
    assert f"answer {token} two" in trained
    assert "one" not in trained
    assert "Oslo" not in trained


def test_of_two_special_tokens_with_the_same_beginning_the_longer_is_matched():
    assert special_pattern(["<|a|>", "<|a|>b"]).findall("<|a|>b <|a|>") == ["<|a|>b", "<|a|>"]


def test_end_tokens_of_the_generation_config_end_turns(tmp_path):
    """<|eom_id|> ends a call of a built-in tool; no template writes it."""
    tokenizer = published("llama-3")
    tokenizer.add_tokens(["<|eom_id|>"], special_tokens=True)
    eom_id = tokenizer.convert_tokens_to_ids("<|eom_id|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eom_id, 1]}))
    assert eom_id in encoder(tokenizer, model=str(tmp_path)).end_ids
    assert eom_id not in encoder(tokenizer, model="elsewhere").end_ids


def test_a_generation_config_that_cannot_be_read_is_refused(tmp_path):
    """It may name tokens that end a turn."""
    assert encoder(tokenizer_of("qwen3"), model=str(tmp_path)).end_ids
    config = tmp_path / "generation_config.json"
    for content in ("{", "[1]", '{"eos_token_id": '):
        config.write_text(content)
        with refused(config, "end a turn"):
            encoder(tokenizer_of("qwen3"), model=str(tmp_path))
