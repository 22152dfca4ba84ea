"""Matrix: the outcome for each template in tests/templates and each kind of conversation.

    python -m tests.data.chat.matrix        (`make templates`) writes the table of docs/masks.md

A cell says that the conversation is trained on correctly, or why it is refused. Each text of a
conversation is a unique word. The words of a document therefore show which texts it has, and which
of them count in the loss; no stored output is compared.
"""

import re
from dataclasses import dataclass, replace
from functools import cache

from pipeline.rows.examples import Conversation, Message, RowError
from tests import ROOT
from tests.data.chat.documents import SPECIAL, encoder, published, tokenizer_with

TEMPLATES = ROOT / "tests/templates"
_WIDE = "\uff5c"  # the full-width vertical bar of DeepSeek's and Hunyuan's special tokens
_HARMONY = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"]
_MISTRAL = [
    "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[CALL_ID]",
    "[ARGS]", "[TOOL_CONTENT]", "[THINK]", "[/THINK]",
]  # fmt: skip
_BRACKETS = {"bos_token": "<s>", "eos_token": "</s>", "others": _MISTRAL}
_DEEPSEEK = [
    f"<{_WIDE}{name}{_WIDE}>"
    for name in (
        "User", "Assistant", "tool▁calls▁begin", "tool▁calls▁end", "tool▁call▁begin",
        "tool▁call▁end", "tool▁sep", "tool▁outputs▁begin", "tool▁outputs▁end",
        "tool▁output▁begin", "tool▁output▁end",
    )
]  # fmt: skip
# Family of models, which is the name of its template in tests/templates -> its special tokens
# other than <|im_start|> and <|im_end|>. `others`: tokens without a name. `ends`: tokens that end a
# turn.
FAMILIES = {
    **SPECIAL,
    "llama-3.1": {**SPECIAL["llama-3"], "ends": ["<|eot_id|>"]},
    "llama-4": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot|>",
        "others": ["<|header_start|>", "<|header_end|>", "<|python_start|>", "<|python_end|>"],
        "ends": ["<|eot|>"],
    },
    "qwen3.5": {"eos_token": "<|im_end|>", "ends": ["<|im_end|>"]},
    "gemma-4": {
        "bos_token": "<bos>",
        "eos_token": "<turn|>",
        "others": [
            "<|turn>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>",
            "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>",
        ],
        "ends": ["<turn|>", "<|tool_response>"],
    },
    "mistral-v3": {**_BRACKETS, "ends": ["</s>"]},
    "mistral-small-3.2": {**_BRACKETS, "ends": ["</s>"]},
    "ministral-3": {**_BRACKETS, "ends": ["</s>"]},
    "gpt-oss": {
        "eos_token": "<|return|>",
        "others": _HARMONY,
        "ends": ["<|return|>", "<|end|>", "<|call|>"],
    },
    "deepseek-v3": {**SPECIAL["deepseek-r1-distill"], "others": _DEEPSEEK},
    "deepseek-v3.1": {**SPECIAL["deepseek-r1-distill"], "others": _DEEPSEEK},
    "glm-4.6": {
        "eos_token": "<|endoftext|>",
        "others": [
            "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
        ],
        "ends": ["<|user|>", "<|observation|>"],
    },
    "kimi-k2": {
        "eos_token": "<|im_end|>",
        "others": [
            "<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>",
            "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>", "<|tool_call_end|>",
        ],
        "ends": ["<|im_end|>"],
    },
    "minimax-m2": {
        "eos_token": "[e~[", "others": ["]~!b[", "]~b]"], "ends": ["[e~["],
    },
    "granite-4": {
        "eos_token": "<|end_of_text|>",
        "others": ["<|start_of_role|>", "<|end_of_role|>"],
        "ends": ["<|end_of_text|>"],
    },
    "lfm2": {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|im_end|>",
        "others": [
            "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>",
            "<|tool_response_start|>", "<|tool_response_end|>",
        ],
        "ends": ["<|im_end|>"],
    },
    "nemotron-3": {"eos_token": "<|im_end|>", "ends": ["<|im_end|>"]},
    "olmo-3": {"eos_token": "<|endoftext|>", "ends": ["<|im_end|>", "<|endoftext|>"]},
    "command-r7b": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "others": [
            "<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
            "<|START_THINKING|>", "<|END_THINKING|>", "<|START_ACTION|>", "<|END_ACTION|>",
            "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TOOL_RESULT|>",
            "<|END_TOOL_RESULT|>",
        ],
        "ends": ["<|END_OF_TURN_TOKEN|>"],
    },
    "smollm3": {"eos_token": "<|im_end|>", "ends": ["<|im_end|>"]},
    "hunyuan-3": {
        "bos_token": f"<{_WIDE}hy_begin_of_sentence:opensource{_WIDE}>",
        "eos_token": f"<{_WIDE}hy_eos:opensource{_WIDE}>",
        "others": [f"<{_WIDE}hy_{name}:opensource{_WIDE}>" for name in ("User", "Assistant")],
        "ends": [f"<{_WIDE}hy_eos:opensource{_WIDE}>"],
    },
    "seed-oss": {
        "bos_token": "<seed:bos>", "eos_token": "<seed:eos>", "ends": ["<seed:eos>"],
    },
    "exaone-4": {
        "eos_token": "[|endofturn|]",
        "others": ["[|system|]", "[|user|]", "[|assistant|]", "[|tool|]"],
        "ends": ["[|endofturn|]"],
    },
    "ernie-4.5": {
        "bos_token": "<|begin_of_sentence|>",
        "eos_token": "</s>",
        "others": ["<|end_of_sentence|>"],
        "ends": ["<|end_of_sentence|>"],
    },
}  # fmt: skip

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "where"}},
            "required": ["city"],
        },
    },
}


def _user(number):
    return Message("user", f"question{number}")


def _call(city, number):
    function = {"name": "weather", "arguments": {"city": city}}
    return {"id": f"abcdefgh{number}", "type": "function", "function": function}


def _assistant(text, reasoning=None, calls=(), **fields):
    others = {"tool_calls": list(calls)} if calls else {}
    others |= {"reasoning_content": reasoning} if reasoning else {}
    return Message("assistant", text, others=others, **fields)


def _result(text, number):
    return Message("tool", text, others={"tool_call_id": f"abcdefgh{number}", "name": "weather"})


def _conversation(*messages, tools=()):
    return Conversation(messages, tuple(tools))


@dataclass(frozen=True)
class Case:
    """A conversation, the settings of the run, and the words that must count in the loss.

    `documents`: the supervised words of each document. `may_leave_out`: words of reasoning that the
    template may omit from the document.
    """

    conversation: Conversation
    documents: tuple[frozenset[str], ...]
    settings: dict
    may_leave_out: frozenset[str] = frozenset()


def _case(conversation, *documents, may_leave_out="", **settings):
    words = tuple(frozenset(document.split()) for document in documents)
    return Case(conversation, words, settings, frozenset(may_leave_out.split()))


_TWO = _conversation(_user(1), _assistant("answer1"), _user(2), _assistant("answer2"))
_TOOLS = (
    _user(1),
    _assistant("", calls=[_call("Graz1", 1)]),
    _result("sunny1", 1),
    _assistant("answer1"),
)
_WITH_REASONING = _conversation(
    _user(1), _assistant("answer1", "thought1"), _user(2), _assistant("answer2", "thought2")
)
CASES = {
    "two turns": _case(_TWO, "answer1 answer2"),
    "system": _case(replace(_TWO, messages=(Message("system", "rules"), *_TWO.messages)),
                    "answer1 answer2"),
    "tools": _case(_conversation(*_TOOLS, tools=[TOOL]), "weather Graz1 answer1"),
    "parallel calls": _case(
        _conversation(
            _user(1),
            _assistant("", calls=[_call("Graz1", 1), _call("Linz2", 2)]),
            _result("sunny1", 1), _result("rainy2", 2), _assistant("answer1"),
            tools=[TOOL],
        ),
        "weather Graz1 Linz2 answer1",
    ),
    "reasoning": _case(_WITH_REASONING, "thought1 answer1 thought2 answer2",
                     may_leave_out="thought1 thought2"),
    "reasoning, calls": _case(
        _conversation(
            _user(1), _assistant("", "thought1", [_call("Graz1", 1)]), _result("sunny1", 1),
            _assistant("answer1", "thought2"), tools=[TOOL],
        ),
        "thought1 weather Graz1 thought2 answer1", may_leave_out="thought1 thought2",
    ),
    "weight 0": _case(
        _conversation(_user(1), replace(_assistant("answer1"), is_trained=False), _user(2),
              _assistant("answer2")),
        "answer2",
    ),
    "last-assistant": _case(_TWO, "answer2", train_on="last-assistant"),
    "split_turns": _case(_WITH_REASONING, "thought1 answer1", "thought2 answer2",
                         may_leave_out="thought1 thought2", split_turns=True),
}  # fmt: skip
_WORDS = re.compile(r"(?:question|answer|thought|sunny|rainy|Graz|Linz)\d|rules|weather")


@cache
def tokenizer(family):
    """A byte-level tokenizer with the family's template and special tokens."""
    if family in SPECIAL:
        return published(family)
    named = {key: value for key, value in FAMILIES[family].items() if key != "ends"}
    template = (TEMPLATES / f"{family}.jinja").read_text("utf-8")
    return tokenizer_with(template, named.pop("others", []), **named)


def outcome(family, name):
    """`trained`, or the reason of a refusal; AssertionError if the mask is wrong."""
    case, family_tokenizer = CASES[name], tokenizer(family)
    try:
        documents = encoder(family_tokenizer, **case.settings).encode(case.conversation)
    except RowError as error:
        return str(error)
    assert len(documents) == len(case.documents)
    for document, expected in zip(documents, case.documents, strict=True):
        _assert_mask(document, expected, case, family_tokenizer)
        _assert_end(document, family_tokenizer, FAMILIES[family].get("ends", ()))
    return "trained"


def _assert_mask(document, expected, case, tokenizer):
    """Assert that the words in the trained text are the expected words that the document has."""
    text = tokenizer.decode(document.ids.tolist())
    trained_text = tokenizer.decode(document.ids[document.supervised].tolist())
    words, trained_words = set(_WORDS.findall(text)), set(_WORDS.findall(trained_text))
    missing = expected - words - case.may_leave_out
    assert not missing, f"{missing} are not in the document: {text}"
    to_train = expected & words
    assert trained_words == to_train, f"trains on {trained_words} instead of {to_train}: {text}"


def _assert_end(document, tokenizer, ends):
    """Assert that the end token of the last turn is trained."""
    text = tokenizer.decode(document.ids.tolist())
    trained = tokenizer.decode(document.ids[document.supervised].tolist())
    if text.rstrip().endswith(tuple(ends)):
        assert trained.rstrip().endswith(tuple(ends)), f"the last turn has no end: {trained}"


def table():
    """The matrix in Markdown: T for trained, or the number of a reason in the list below it."""
    reasons, lines = {}, [f"| template | {' | '.join(CASES)} |", f"|---|{'---|' * len(CASES)}"]
    for family in sorted(FAMILIES):
        cells = []
        for name in CASES:
            reason = outcome(family, name)
            is_trained = reason == "trained"
            cells.append("T" if is_trained else reasons.setdefault(reason, str(len(reasons) + 1)))
        lines.append(f"| {family} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines)


PAGE = ROOT / "docs/masks.md"
_START, _END = "<!-- matrix: make templates -->\n", "\n<!-- end of the matrix -->"


def written_table():
    """The matrix in docs/masks.md."""
    return PAGE.read_text("utf-8").partition(_START)[2].partition(_END)[0]


def main():
    before, start, rest = PAGE.read_text("utf-8").partition(_START)
    assert start, f"{PAGE}: no line {_START}"
    PAGE.write_text(before + start + table() + _END + rest.partition(_END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
