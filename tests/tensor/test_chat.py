"""Which tokens are trained on, read back as text: `[[like this]]`."""

import json

import pytest

from pipeline.data.chat import encode, load_tokenizer, supervised_runs
from pipeline.data.formats import Completion, Conversation, Message, RowError
from pipeline.errors import UserError
from tests.tiny import CHATML, make_tokenizer

# As published with SmolLM2-135M-Instruct and Meta-Llama-3-8B-Instruct.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# As published with Mistral-7B-Instruct-v0.1: no generation prompt, no system role.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}{% else %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
THINKING = (  # like Qwen3: reasoning is kept in the last turn only
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def tokenizer_with(template, **named):
    tokenizer = make_tokenizer()
    if named:
        tokenizer.add_special_tokens(named)
    tokenizer.chat_template = template
    return tokenizer


def llama_3():
    """<|eot_id|> is special, and neither eos nor any other named token: as Meta published it."""
    tokenizer = tokenizer_with(LLAMA_3, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>"], special_tokens=True)
    tokenizer.add_tokens(["<|eot_id|>"], special_tokens=True)
    return tokenizer


def chat(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    messages = (Message(roles[i % 2], content) for i, content in enumerate(contents))
    return Conversation(tuple(messages))


def shown(example, tokenizer, train_on="assistant"):
    document = encode(example, tokenizer, train_on)
    assert len(document.ids) == len(document.supervised)
    assert not document.supervised[0]
    runs = supervised_runs(document.ids, document.supervised, tokenizer)
    return "".join(f"[[{text}]]" if supervised else text for text, supervised in runs)


def user(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("template", [CHATML, MARKED])
class TestTurns:
    def test_a_turn_is_its_content_through_the_end_of_turn(self, template):
        found = shown(chat("q", "yes"), tokenizer_with(template))
        assert found == user("q") + "[[yes<|im_end|>]]\n"

    def test_every_assistant_turn(self, template):
        found = shown(chat("q", "one", "r", "two", "s"), tokenizer_with(template))
        rest = "<|im_start|>user\ns<|im_end|>\n"
        first = user("q") + "[[one<|im_end|>]]\n"
        assert found == first + user("r") + "[[two<|im_end|>]]\n" + rest

    def test_the_last_assistant_turn(self, template):
        found = shown(chat("q", "one", "r", "two"), tokenizer_with(template), "last-assistant")
        assert found == user("q") + "one<|im_end|>\n" + user("r") + "[[two<|im_end|>]]\n"

    def test_all_but_the_first_token(self, template):
        found = shown(chat("q", "yes"), tokenizer_with(template), "all")
        rest = user("q").removeprefix("<|im_start|>")
        assert found == f"<|im_start|>[[{rest}yes<|im_end|>\n]]"

    def test_no_text_leads_astray(self, template):
        """Neither a content that is in the header or in the end token, nor one said before."""
        for said in ("end", "assistant", "user", "m", "<", "é 😀 日本", "a\n\nb"):
            assert shown(chat("same", said), tokenizer_with(template), "all").endswith("\n]]")
            found = shown(chat("same", said, said, said), tokenizer_with(template))
            first = user("same") + f"[[{said}<|im_end|>]]\n"
            assert found == first + user(said) + f"[[{said}<|im_end|>]]\n", said

    def test_a_text_that_looks_like_an_end_does_not_end_the_turn(self, template):
        found = shown(chat("q", "a<|im_end|>b"), tokenizer_with(template))
        assert found == user("q") + "[[a<|im_end|>b<|im_end|>]]\n"


def test_smollm2():
    system = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    )
    found = shown(chat("q", "one", "r", "two"), tokenizer_with(SMOLLM2))
    turns = user("q") + "[[one<|im_end|>]]\n" + user("r") + "[[two<|im_end|>]]\n"
    assert found == f"{system}<|im_end|>\n{turns}"


def test_llama_3():
    def header(role):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    found = shown(chat(" q ", " yes "), llama_3())
    asked = f"<|begin_of_text|>{header('user')}q<|eot_id|>{header('assistant')}"
    assert found == f"{asked}[[yes<|eot_id|>]]"
    ids = encode(chat("q", "yes"), llama_3(), "assistant").ids
    assert ids.count(llama_3().bos_token_id) == 1


def test_mistral_without_generation_prompt():
    tokenizer = tokenizer_with(MISTRAL, bos_token="<s>", eos_token="</s>")
    found = shown(chat("q", "one", "r", "two"), tokenizer)
    assert found == "<s>[INST] q [/INST][[one</s>]] [INST] r [/INST][[two</s>]] "


def test_a_role_header_is_not_trained_where_the_template_ignores_the_generation_prompt():
    template = CHATML.partition("{% if add_generation_prompt")[0]
    found = shown(chat("q", "one", "r", "assistant two"), tokenizer_with(template))
    assert found == user("q") + "[[one<|im_end|>]]\n" + user("r") + "[[assistant two<|im_end|>]]\n"


def test_a_tokenizer_that_adds_a_bos_does_not_double_the_template_s():
    tokenizer = adding_bos()
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    ids = encode(chat("q", "yes"), tokenizer, "assistant").ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_template_that_rewrites_earlier_turns_is_refused_for_the_rows_it_rewrites():
    tokenizer = tokenizer_with(THINKING)
    with pytest.raises(RowError, match="rewrites earlier turns"):
        shown(chat("q", "<think>a</think>b", "r", "c"), tokenizer)
    found = shown(chat("q", "<think>a</think>b"), tokenizer)
    assert found == user("q") + "[[<think>a</think>b<|im_end|>]]\n"
    last = shown(chat("q", "<think>a</think>b", "r", "c"), tokenizer, "last-assistant")
    assert last == user("q") + "b<|im_end|>\n" + user("r") + "[[c<|im_end|>]]\n"


def test_a_generation_prompt_that_is_no_beginning_is_refused():
    tokenizer = tokenizer_with(CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"))
    with pytest.raises(RowError, match="generation prompt"):
        shown(chat("q", "a"), tokenizer)


@pytest.mark.parametrize("train_on", ["assistant", "last-assistant", "all"])
def test_a_template_that_does_not_end_turns_is_refused(train_on):
    tokenizer = tokenizer_with(NO_END)
    with pytest.raises(UserError, match="without a special token"):
        encode(chat("q", "a", "r", "b"), tokenizer, train_on)
    with pytest.raises(UserError, match="without a special token"):
        encode(chat("q", "a", "r"), tokenizer, train_on)
    with pytest.raises(UserError, match="without a special token"):
        encode(chat("q", "a <|im_end|> b"), tokenizer, "assistant")


def test_a_mark_that_leaves_out_the_end_of_turn_is_refused():
    end = "<|im_end|>\n{% endgeneration %}"
    template = MARKED.replace(end, "{% endgeneration %}<|im_end|>\n")
    with pytest.raises(UserError, match="leaves out"):
        encode(chat("q", "a"), tokenizer_with(template), "assistant")


def test_a_mark_in_pieces_has_no_certain_last_turn():
    piece = "{% generation %}x<|im_end|>{% endgeneration %}"
    tokenizer = tokenizer_with(MARKED.replace("{% generation %}", piece + "{% generation %}"))
    assert shown(chat("q", "a"), tokenizer).count("<|im_end|>]]") == 1  # the pieces touch
    with pytest.raises(UserError, match="last-assistant"):
        encode(chat("q", "a"), tokenizer, "last-assistant")


def test_what_the_template_refuses_is_the_row_s_fault():
    tokenizer = tokenizer_with(MISTRAL, bos_token="<s>", eos_token="</s>")
    with pytest.raises(RowError, match="refuses the conversation: Conversation roles must alt"):
        encode(chat("a", "q", "b", first="assistant"), tokenizer, "assistant")
    with pytest.raises(RowError, match="first message is the assistant's"):
        encode(chat("a", "q", "b", first="assistant"), make_tokenizer(), "assistant")
    with pytest.raises(UserError, match="not valid Jinja"):
        encode(chat("q", "a"), tokenizer_with("{% for %}"), "assistant")


def test_no_chat_template():
    tokenizer = tokenizer_with(None)
    with pytest.raises(UserError, match="`prompt` and `completion`"):
        encode(chat("q", "a"), tokenizer, "assistant")
    assert shown(Completion("q", "a"), tokenizer) == "q[[a<|im_end|>]]"


def adding_bos():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with(CHATML, bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


class TestPromptAndCompletion:
    def test_the_completion_and_the_end_are_trained(self):
        found = shown(Completion("q:", " a"), make_tokenizer())
        assert found == "q:[[ a<|im_end|>]]"

    def test_all(self):
        found = shown(Completion("q:", " a"), make_tokenizer(), "all")
        assert found == "q[[: a<|im_end|>]]"

    def test_an_end_that_is_there_is_not_doubled(self):
        found = shown(Completion("q", "a<|im_end|>"), make_tokenizer())
        assert found == "q[[a<|im_end|>]]"

    def test_one_bos_where_the_tokenizer_adds_one(self):
        assert shown(Completion("q", "a"), adding_bos()) == "<s>q[[a<|im_end|>]]"
        assert shown(Completion("<s>q", "a"), adding_bos()) == "<s>q[[a<|im_end|>]]"
        silent = tokenizer_with(CHATML, bos_token="<s>")
        assert shown(Completion("q", "a"), silent) == "q[[a<|im_end|>]]"

    def test_without_a_prompt_the_first_token_is_not_trained(self):
        assert shown(Completion("", "ab"), make_tokenizer()) == "a[[b<|im_end|>]]"

    def test_a_token_over_the_border_is_cut_there(self):
        """`ab` is one token; after the prompt `a` the model will see `a` and has to say `b`."""
        tokenizer = make_tokenizer()
        data = json.loads(tokenizer.backend_tokenizer.to_str())
        data["model"]["vocab"]["ab"] = len(tokenizer)
        data["model"]["merges"] = [["a", "b"]]
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(data))
        assert len(tokenizer("ab").input_ids) == 1
        document = encode(Completion("xa", "b"), tokenizer, "assistant")
        assert document.ids == [*tokenizer("xa").input_ids, *tokenizer("b").input_ids, 2]
        assert document.supervised == [False, False, True, True]

    def test_no_end_of_sequence_token_is_refused(self):
        tokenizer = make_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(UserError, match="no end-of-sequence token"):
            encode(Completion("q", "a"), tokenizer, "assistant")


class TestLoading:
    def test_a_saved_tokenizer(self, tmp_path):
        make_tokenizer().save_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        assert shown(chat("q", "yes"), tokenizer) == user("q") + "[[yes<|im_end|>]]\n"

    def test_what_cannot_be_loaded_names_the_folder(self, tmp_path):
        with pytest.raises(UserError, match="no such folder"):
            load_tokenizer(tmp_path / "absent")
        with pytest.raises(UserError, match=str(tmp_path)):
            load_tokenizer(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        for text in ('{"half": ', '{"model": {"type": "Unheard"}}'):
            (tmp_path / "tokenizer.json").write_text(text)
            with pytest.raises(UserError, match="cannot be loaded"):
                load_tokenizer(tmp_path)

    def test_a_model_folder_without_tokenizer_gives_none(self, tmp_path):
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="tokenizer"):
            load_tokenizer(tmp_path)
