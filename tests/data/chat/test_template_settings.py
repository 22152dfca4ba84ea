"""The chat template of a run: a file or the model's own, its variables, its template for tools.

Documents are shown as text with supervised spans in [[brackets]].
"""

import pytest

from tests import ROOT
from tests.data.chat.documents import (
    SPECIAL,
    chat,
    conversation_with_calls,
    marked_text,
    published,
    tool_call,
    user,
)
from tests.docs.pages import blocks
from tests.messages import refused
from tests.tiny import CHATML

pytestmark = pytest.mark.tensor


def test_the_tool_use_template_is_used_for_rows_with_tools():
    tokenizer = published("qwen2.5")
    tool_use = tokenizer.chat_template.replace("<|im_start|>system", "TOOLS<|im_start|>system")
    tokenizer.chat_template = {"default": CHATML, "tool_use": tool_use}
    assert marked_text(chat("q", "a"), tokenizer).startswith("<|im_start|>user")
    row = conversation_with_calls(tool_call(city="Oslo"))
    assert marked_text(row, tokenizer).startswith("TOOLS")


def test_a_tool_use_template_may_need_tools_in_every_conversation():
    """The template of Hermes 2 Pro lists the tools without asking whether there are any."""
    tokenizer = published("qwen2.5")
    listed = "{% for tool in tools %}{{ tools[0].function.name }}{{ tool | tojson }}{% endfor %}\n"
    tokenizer.chat_template = {"default": CHATML, "tool_use": listed + tokenizer.chat_template}
    text = marked_text(conversation_with_calls(tool_call(city="Oslo")), tokenizer)
    assert text.startswith("forecast{")
    assert text.endswith("[[It rains.<|im_end|>]]\n")


def test_a_template_file_replaces_the_template_of_the_model(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML.replace("<|im_start|>", "<|im_start|>my "))
    text = marked_text(chat("q", "a"), published("qwen3"), chat_template=str(path))
    expected = (user("q") + "[[a<|im_end|>]]\n").replace("start|>", "start|>my ")
    assert text == expected


def test_a_missing_template_file_is_refused(tmp_path):
    path = tmp_path / "none.jinja"
    with refused("chat_template", path):
        marked_text(chat("q", "a"), published("qwen3"), chat_template=str(path))


def test_the_documented_template_is_refused_without_its_generation_prompt(tmp_path):
    path = tmp_path / "mine.jinja"
    page = (ROOT / "docs/howto/chat-template.md").read_text(encoding="utf-8")
    example = blocks(page, "jinja")[0]
    path.write_text(example)
    text = marked_text(chat("q", "a"), published("qwen3"), chat_template=str(path))
    assert text == "<|user|>\nq\n<|assistant|>\n[[a<|im_end|>]]\n"
    path.write_text(example[: example.rindex("{%- if add_generation_prompt")])
    with refused("chat_template", "<|assistant|>", "add_generation_prompt"):
        marked_text(chat("q", "a"), published("qwen3"), chat_template=str(path))


def test_a_template_file_with_another_header_in_the_generation_prompt_is_refused(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML.replace("<|im_start|>assistant", "<|im_start|>bot"))
    with refused("chat_template", "<|im_start|>assistant", "<|im_start|>bot", "same header"):
        marked_text(chat("q", "a"), published("qwen3"), chat_template=str(path))


@pytest.mark.parametrize("header_of_prompt", ["<|bot|>", "### Response:"])
def test_a_template_file_whose_two_headers_share_nothing_is_refused(tmp_path, header_of_prompt):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
        f"{{% if add_generation_prompt %}}{header_of_prompt}{{% endif %}}"
    )
    with refused("chat_template", "<|assistant|>", header_of_prompt, "same header"):
        marked_text(chat("q", "a"), published("qwen3"), chat_template=str(path))


@pytest.mark.parametrize("family", sorted(SPECIAL))
def test_each_published_template_is_accepted_as_a_file(family, tmp_path):
    path = tmp_path / "published.jinja"
    path.write_text(published(family).chat_template)
    assert "[[" in marked_text(chat("q", "a"), published(family), chat_template=str(path))


def test_a_variable_that_the_template_reads_is_passed_to_it():
    variables = {"date_string": "26 Jul 2024"}
    text = marked_text(chat("q", "a"), published("llama-3.2"), chat_template_kwargs=variables)
    assert "26 Jul 2024" in text


def test_a_variable_that_the_template_does_not_read_is_refused_with_those_that_it_reads():
    """Variables that the tokenizer sets, such as eos_token, are not among them."""
    tokenizer = published("qwen3")
    tokenizer.chat_template = "{{ eos_token }}" + tokenizer.chat_template
    with refused("chat_template_kwargs", "moood", "enable_thinking") as error:
        marked_text(chat("q", "a"), tokenizer, chat_template_kwargs={"moood": 1})
    assert "eos_token" not in str(error.value)
