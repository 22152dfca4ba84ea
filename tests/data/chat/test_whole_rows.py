"""Random rows with every template: each leaf is in the document, or its omission is explained.

A leaf is a text or number of a row. It may be missing for three reasons: it is structural (an id),
it is reasoning that the template omits by design, or its column is reported as unread. A row is
read, rendered and tokenised as `prepare` does it. The text of every leaf is unique, so a document
shows which leaves are in it and which of them count in the loss.
"""

import json
import os
import re
from functools import cache
from random import Random

import pytest

from pipeline.data.chat.tokenizer import special_ids, special_pattern
from pipeline.data.prepare.show import supervised_segments
from pipeline.rows.examples import RowError
from pipeline.rows.formats import read_example
from tests.data.chat.documents import encoder
from tests.data.chat.kinds import KINDS, tokenizer_of
from tests.data.chat.matrix import FAMILIES
from tests.rows.random_rows import RandomRow
from tests.rows.read import row_of

pytestmark = pytest.mark.tensor

IS_FULL = os.environ.get("TEMPLATES") == "full"  # `make templates`
NUM_ROWS = 3000 if IS_FULL else 100
STRUCTURAL_KEYS = {"id", "call_id", "tool_call_id", "tool_use_id", "toolUseId"}
LEAF = re.compile(r"leaf\d+-")
REASONING_KEYS = {"reasoning_content", "reasoning", "thinking"}


@cache
def tokenizer_and_encoder(name, train_on_reasoning):
    tokenizer = tokenizer_of(name)
    return tokenizer, encoder(tokenizer, train_on_reasoning=train_on_reasoning)


@cache
def prompt_markup(name):
    """Markup between a question and its answer, which the model reads and never writes.

    It is rendered by transformers: `<|im_end|>` and `<|im_start|>`, or `[/INST]`. A generation
    prompt may end in markup that the model writes itself in other turns, such as an empty thought.
    """
    tokenizer = tokenizer_and_encoder(name, True)[0]
    question = {"role": "user", "content": "QUESTION"}
    answer = {"role": "assistant", "content": "ANSWER"}
    answers = [answer, answer | {"reasoning_content": "THOUGHT"}]
    texts = [
        tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True),
        *(tokenizer.apply_chat_template([question, each], tokenize=False) for each in answers),
    ]
    after_question = [text.partition("QUESTION")[2] for text in texts]
    markup = os.path.commonprefix(after_question)  # noqa: RUF071 - of strings, not of paths
    return special_pattern(special_ids(tokenizer)).findall(markup) or [markup.strip()]


def require_prompts_untrained(name, document):
    """Assert that no turn is trained from before the end of its generation prompt."""
    tokenizer = tokenizer_and_encoder(name, True)[0]
    for text, is_trained in supervised_segments(
        document.ids.tolist(), document.supervised.tolist(), tokenizer
    ):
        first = LEAF.search(f"l{text}")  # a document's first token, an l, is never supervised
        if is_trained and first:
            markup = f"l{text}"[: first.start()]
            assert not [mark for mark in prompt_markup(name) if mark in markup], text


def is_reasoning(leaf):
    return leaf.is_reasoning or leaf.path[-1] in REASONING_KEYS


def is_structural(leaf):
    is_name_of_result = leaf.role == "tool" and leaf.path[-1] == "name"
    return leaf.path[-1] in STRUCTURAL_KEYS or is_name_of_result


def require_no_unexplained_omission(leaves, text, unread, omitted_tokens):
    """Assert that each missing leaf is unread, structural, or reasoning omitted by design."""
    unread_keys = {name.rpartition(".")[2] for name in unread}
    missing = {
        name: leaf
        for name, leaf in leaves.items()
        if name not in text and unread_keys.isdisjoint(leaf.path) and not is_structural(leaf)
    }
    unexplained = {name: leaf for name, leaf in missing.items() if not is_reasoning(leaf)}
    assert not unexplained, text
    # The tokenizer has a token for each byte; white space around a leaf may be omitted with it.
    assert sum(map(len, missing)) <= omitted_tokens, (missing, text)
    assert bool(missing) == bool(omitted_tokens), (missing, omitted_tokens, text)


def require_trained(leaves, text, trained, train_on_reasoning):
    """Assert that the loss mask covers the leaves of assistant messages, and no others."""
    for name, leaf in leaves.items():
        if name in text and leaf.role != "column" and not is_structural(leaf):
            is_counted = leaf.role == "assistant"
            if is_reasoning(leaf):
                is_counted = is_counted and train_on_reasoning
            assert (name in trained) == is_counted, (name, leaf, trained, text)


def row_is_used(name, seed):
    """Read, encode and check the random row of this seed; returns False if it is refused."""
    generator = RandomRow(Random(seed))
    is_regular = not generator.is_rare(one_in=10)
    row = generator.row(is_regular=is_regular)
    train_on_reasoning = not generator.is_rare(one_in=3)
    tokenizer, row_encoder = tokenizer_and_encoder(name, train_on_reasoning)
    try:
        read = read_example(row_of(row))
        (encoded,) = row_encoder.encode_many([read.example])
    except RowError as error:
        encoded = error
    if isinstance(encoded, RowError):
        assert str(encoded)
        return False
    (document,) = encoded.documents
    text = tokenizer.decode(document.ids.tolist())
    trained = tokenizer.decode(document.ids[document.supervised].tolist())
    content = json.dumps(row)  # in an irregular row, other values may have replaced leaves
    leaves = {name: leaf for name, leaf in generator.leaves.items() if name in content}
    require_no_unexplained_omission(
        leaves, text, read.unread, encoded.token_counts["omitted_reasoning"]
    )
    if is_regular:
        require_trained(leaves, text, trained, train_on_reasoning)
    # Without reasoning, trained text may begin with a header that the model writes after reasoning.
    if train_on_reasoning:
        require_prompts_untrained(name, document)
    return True


@pytest.mark.parametrize("name", [*KINDS, *sorted(FAMILIES)])
def test_each_leaf_of_a_row_is_written_or_its_omission_is_explained(name):
    """Rows are drawn by seed and not by Hypothesis, which takes ten times as long."""
    are_used = [row_is_used(name, seed) for seed in range(NUM_ROWS)]
    assert sum(are_used) >= NUM_ROWS / 50  # each template refuses some forms of rows
