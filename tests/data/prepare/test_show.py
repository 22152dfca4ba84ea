"""Documents and audit on the terminal: supervised text is marked, and all text is shown.

The mark is [[brackets]] in plain text, and colour on a terminal.
"""

import io
from argparse import ArgumentTypeError
from math import ceil

import pytest
from rich.console import Console

from pipeline.data.prepare.audit_table import audit_table
from pipeline.data.prepare.show import number_of_documents, show_documents, supervised_segments
from tests.data.chat.documents import chat, encoder, sentence_piece
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.tensor

LONG = "a line that is much longer than a terminal is wide, " * 5


class Documents(list):
    """Encoded documents with the interface of a prepared split."""

    def document(self, i):
        return self[i].ids, self[i].supervised


@pytest.fixture
def split():
    examples = (chat("q", LONG), chat("[bold]q[/bold]", "a\n\nb", "c", "d"))
    return Documents(map(document_of, examples))


def document_of(example):
    (document,) = encoder(make_tokenizer()).encode(example)
    return document


def printed(split, count, **options):
    console = Console(file=io.StringIO(), width=40, **options)
    show_documents(console, split, make_tokenizer(), count)
    return console.file.getvalue()


def test_plain_text_has_brackets_and_every_character(split):
    text = printed(split, 9)
    user = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert f"{user.format('q')}[[{LONG}<|im_end|>]]\n" in text
    second = user.format("[bold]q[/bold]") + "[[a\n\nb<|im_end|>]]\n"
    assert second + user.format("c") + "[[d<|im_end|>]]\n" in text
    assert "document 0" in text
    assert f"{len(LONG) + 1} of" in text


def test_only_the_requested_number_of_documents_is_shown(split):
    assert "document 1" not in printed(split, 1)
    assert printed(split, 0) == ""


def test_a_terminal_has_colour_and_no_brackets(split):
    text = printed(split, 1, force_terminal=True, color_system="standard")
    assert "[[" not in text
    green, dim = "\x1b[1;32m", "\x1b[2m"
    assert f"{green}{LONG}" in text.replace("\n", "")
    assert f"{dim}<|im_start|>user" in text.replace("\n", "")


def test_a_terminal_without_colour_has_brackets(split):
    text = printed(split, 1, force_terminal=True, color_system=None)
    assert f"[[{LONG}<|im_end|>]]\n" in text


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "color_system": "standard"}])
def test_no_control_character_of_the_data_reaches_the_terminal(options):
    answer = "a\x1b]0;title\x07\x1b[2J\x9b2J\x7f\r\x08b\nd"
    text = printed(Documents([document_of(chat("q", answer))]), 1, **options)
    escaped = r"a\x1b]0;title\x07\x1b[2J\x9b2J\x7f\x0d\x08b"
    assert escaped in text
    for control in ("\x07", "\x9b", "\x7f", "\r", "\x08", "\x1b]", "\x1b[2J"):
        assert control not in text


def test_an_argument_that_is_not_a_number_of_documents_is_refused():
    assert number_of_documents("3") == 3
    for text in ("-1", "x", "1.5", ""):
        with pytest.raises(ArgumentTypeError, match="documents"):
            number_of_documents(text)


def test_source_names_are_not_shortened_in_a_narrow_terminal():
    length = dict.fromkeys(("min", "median", "mean", "p95", "max"), 7.0)
    length["histogram"] = {"first": 1000, "width": 500, "documents": [1, 2]}
    keys = ("rows_read", "rows_used", "rows_rejected", "rows_dropped", "tokens")
    numbers = dict.fromkeys(keys, 123_456)
    names = ["here/train.jsonl", "there/[bold]other/train.parquet"]
    sources = [{"name": name, "weight": 0.25, "formats": {"text": 1}, **numbers} for name in names]
    for source in sources:
        source["files"] = {source["name"]: 1}
    console = Console(file=io.StringIO(), width=80)
    console.print(audit_table({"train": {"length": length, "sources": sources}}))
    text = console.file.getvalue()
    for i, name in enumerate(names, 1):
        assert f"\n{i}  {name}\n" in text
    assert text.count("123,456") == 10
    assert [line.split()[:4] for line in text.splitlines() if " to " in line] == [
        ["1,000", "to", "1,499", "1"],
        ["1,500", "to", "1,999", "2"],
    ]


def test_a_supervised_segment_keeps_the_space_at_its_beginning():
    tokenizer = sentence_piece()
    ids = tokenizer("yes no yes").input_ids
    segments = list(supervised_segments(ids, [False, True, False], tokenizer))
    assert segments == [("yes", False), (" no", True), (" yes", False)]


@pytest.mark.parametrize("segment_tokens", [1, 3, 40])
def test_the_joined_segments_are_the_text_of_the_document(segment_tokens):
    tokenizer = sentence_piece()
    ids = tokenizer("yes no " * 100).input_ids
    is_supervised = [i // segment_tokens % 2 == 1 for i in range(len(ids))]  # every second segment
    segments = list(supervised_segments(ids, is_supervised, tokenizer))
    assert len(segments) == ceil(len(ids) / segment_tokens)
    assert "".join(text for text, _ in segments) == tokenizer.decode(ids)
