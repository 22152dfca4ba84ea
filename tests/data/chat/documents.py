"""Tokenizers with chat templates, conversations, and encoded documents shown as text."""

import numpy as np

from pipeline.config.settings import RunSettings
from pipeline.data.chat.encoder import Encoder
from pipeline.data.chat.template import ChatTemplate
from pipeline.data.prepare.show import supervised_segments
from pipeline.rows.examples import Conversation, Message
from tests import ROOT
from tests.tiny import CHATML, make_tokenizer

TEMPLATES = ROOT / "tests/templates"
_BAR = "\uff5c"  # DeepSeek's special tokens have a full-width vertical bar
# Special tokens of each template's tokenizer, in addition to <|im_start|> and <|im_end|>.
SPECIAL = {
    "smollm2": {},
    "qwen2.5": {},
    "qwen3": {},
    "phi-4": {"others": ["<|im_sep|>"]},
    "phi-3.5": {
        "eos_token": "<|endoftext|>",
        "others": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    },
    "llama-3": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "others": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    },
    "mistral-7b-v0.1": {"bos_token": "<s>", "eos_token": "</s>"},
    "mistral-nemo": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "others": ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
    },
    "gemma-2": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "others": ["<start_of_turn>", "<end_of_turn>"],
    },
    "deepseek-r1-distill": {
        "bos_token": f"<{_BAR}begin▁of▁sentence{_BAR}>",
        "eos_token": f"<{_BAR}end▁of▁sentence{_BAR}>",
        "others": [f"<{_BAR}User{_BAR}>", f"<{_BAR}Assistant{_BAR}>"],
    },
}
SPECIAL["llama-3.2"] = SPECIAL["llama-3"]
SPECIAL["phi-4-first"] = SPECIAL["phi-4"]
SPECIAL["gemma-3"] = SPECIAL["gemma-2"]


def published(name):
    """A tokenizer with a published chat template and its special tokens."""
    special_tokens = dict(SPECIAL[name])
    others = special_tokens.pop("others", [])
    template = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    return tokenizer_with(template, others, **special_tokens)


def tokenizer_with(template, others=(), **named_special_tokens):
    """A byte-level tokenizer with this chat template.

    `named_special_tokens`: bos_token and eos_token. `others`: special tokens without such a name,
    like <|eot_id|>.
    """
    tokenizer = make_tokenizer()
    if named_special_tokens:
        tokenizer.add_special_tokens(named_special_tokens)
    tokenizer.add_tokens(list(others), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def encoder(tokenizer, **settings):
    """The Encoder of a run with these settings, which tokenises examples and masks their tokens."""
    required = {"model": "m", "train_data": "t.jsonl", "output_dir": "o"}
    return Encoder(tokenizer, RunSettings.model_validate(required | settings))


def chat(*contents, first="user", system=None):
    """A conversation in which user and assistant alternate."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    messages = [Message(roles[i % 2], content) for i, content in enumerate(contents)]
    if system is not None:
        messages.insert(0, Message("system", system))
    return Conversation(tuple(messages))


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


def tool_call(name="forecast", **arguments):
    """A tool call of an assistant message."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def conversation_with_calls(*calls, tools=(TOOL,), **others):
    """A conversation with these tool calls in one turn, their results and an answer.

    `others`: further keys of the message that has the calls.
    """
    messages = (
        Message("user", "Weather?"),
        Message("assistant", "", True, {"tool_calls": list(calls), **others}),
        *(Message("tool", f"rain {i}") for i in range(len(calls))),
        Message("assistant", "It rains."),
    )
    return Conversation(messages, tools)


def user(text):
    """A question in ChatML, and the header of its answer."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def marked_texts(example, tokenizer, **settings):
    """The text of each document of an example, with supervised spans in [[brackets]]."""
    texts = []
    for document in encoder(tokenizer, **settings).encode(example):
        assert document.ids.dtype == np.int32
        assert document.supervised.dtype == np.bool_
        assert len(document.ids) == len(document.supervised)
        assert not document.supervised[0]
        segments = supervised_segments(
            document.ids.tolist(), document.supervised.tolist(), tokenizer
        )
        texts.append(
            "".join(f"[[{text}]]" if is_supervised else text for text, is_supervised in segments)
        )
    return texts


def marked_text(example, tokenizer, **settings):
    """The text of the only document of an example, with supervised spans in [[brackets]]."""
    (text,) = marked_texts(example, tokenizer, **settings)
    return text


def supervised_spans(text):
    """The supervised spans of a text with [[brackets]]."""
    return [part.partition("]]")[0] for part in text.split("[[")[1:]]


def bos_tokenizer():
    """A ChatML tokenizer that writes the token <s> before each text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with(CHATML, bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


def tokenizer_without_im_end():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(("<|endoftext|>", *alphabet))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")


def sentence_piece():
    """A tokenizer like Llama 2's: a space is a part of the token that follows it.

    It puts a space before the text, and splits unknown characters into bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁[]/INSTqryesnoINT", "no", "ye", "yes", "▁yes", "▁no"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("n", "o"), ("y", "e"), ("ye", "s"), ("▁", "yes"), ("▁", "no")]
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def record_renderings(monkeypatch) -> list:
    """A list to which each later rendering of a chat template appends its positional arguments."""
    renderings, render = [], ChatTemplate._render

    def render_and_record(self, *arguments, **keywords):
        renderings.append(arguments)
        return render(self, *arguments, **keywords)

    monkeypatch.setattr(ChatTemplate, "_render", render_and_record)
    return renderings
