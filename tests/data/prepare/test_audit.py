"""The audit: counts of the rows and tokens of prepared data, by source and file (audit.json)."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from pipeline.data.chat.tokenizer import load_tokenizer
from pipeline.data.dataset.reader import DataIndex, open_split
from pipeline.data.prepare.audit import audit_summary
from pipeline.data.prepare.audit_table import audit_table
from pipeline.report.data_audit import source_columns
from pipeline.report.text import cell
from pipeline.train.status import RunStatus
from tests import ROOT
from tests.data.prepare.preparation import row, write_lines
from tests.messages import assert_mentions
from tests.report.test_page import read_page
from tests.tiny import CHATML, make_rows

pytestmark = pytest.mark.tensor


def test_every_row_is_used_rejected_or_dropped_and_every_token_counted(run):
    long = row("long " * 40)  # longer than max_length: truncated inside the answer
    late = row("late", question="ask " * 40)  # truncated before the answer, so rejected
    run.append("{", row(" "), long, late, row("twice"), row("twice"))  # lines 25 to 30
    run.eval.write_text(row("twice") + "\n" + row("never seen") + "\n")
    index = run.prepare(max_length=128, max_rejected=0.2)
    audit = run.audit()
    assert (audit["rows_read"], audit["rows_used"]) == (30, 27)
    assert audit["rejected"] == {
        "not valid JSON: Expecting property name enclosed in double quotes": 1,
        "an assistant message is empty": 1,
        "no supervised token within max_length (128)": 1,
    }
    assert [(reject["file"], reject["line"]) for reject in run.rejects()] == [
        (str(run.train), line) for line in (25, 26, 28)
    ]
    assert {reject["reason"] for reject in run.rejects()} == set(audit["rejected"])
    split = open_split(index.train)
    assert len(split) == 27
    lengths = split.lengths
    assert audit["tokens"] == lengths.sum()
    assert audit["supervised_tokens"] == split.supervised_counts.sum()
    share = audit["supervised_tokens"] / audit["tokens"]
    assert audit["supervised_share"] == pytest.approx(share, abs=1e-4)
    summary = audit["length"]
    assert (summary["min"], summary["max"]) == (lengths.min(), 128)
    assert summary["median"] == np.median(lengths)
    histogram = summary["histogram"]
    assert sum(histogram["documents"]) == 27
    assert histogram["documents"][0] > 0
    for i, count in enumerate(histogram["documents"]):
        first, width = summary["min"] + i * histogram["width"], histogram["width"]
        assert count == ((first <= lengths) & (lengths < first + width)).sum()
    assert audit["end_of_turn_share"] == pytest.approx(26 / 27, abs=1e-4)  # not the truncated one
    tokenizer = load_tokenizer(run.folder / "model")
    tokens_of_long = len(tokenizer.apply_chat_template(json.loads(long)["messages"])["input_ids"])
    assert (audit["truncated_rows"], audit["tokens_lost"]) == (1, tokens_of_long - 128)
    assert audit["duplicate_rows"] == 1
    assert run.audit("eval")["rows_also_in_train"] == 1  # "twice"


def test_a_conversation_whose_last_end_of_turn_is_truncated_has_no_end_of_turn(run):
    turns = json.loads(row("yes"))["messages"] * 3
    write_lines(run.train, [json.dumps({"messages": turns})])
    num_tokens = run.prepare().train.tokens
    assert run.audit()["end_of_turn_share"] == 1
    # The truncated tokens: the newline after the last turn, also its end token, a whole turn.
    for num_truncated, share in ((1, 1), (2, 0), (30, 0)):
        assert run.prepare(max_length=num_tokens - num_truncated).train.documents == 1
        assert run.audit()["end_of_turn_share"] == share
    run.prepare(max_length=num_tokens - 30, over_length="split")
    assert run.audit()["end_of_turn_share"] == 1
    # The row counts once, although two of its three documents are complete.
    run.prepare(max_length=num_tokens - 2, split_turns=True)
    assert run.audit()["end_of_turn_share"] == 0


def test_the_share_of_ends_of_turns_does_not_depend_on_the_order_of_rows(run):
    """The pre-tokenised row ends with an end of turn that is not the end-of-sequence token."""
    tokenizer = load_tokenizer(run.folder / "model")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(run.folder / "model")
    ids = tokenizer("<|im_start|>assistant\nyes<|im_end|>").input_ids
    tokens = json.dumps({"input_ids": ids, "labels": ids})
    for rows in ([tokens, row("yes")], [row("yes"), tokens]):
        write_lines(run.train, rows)
        run.prepare()
        assert run.audit()["end_of_turn_share"] == 1


def test_each_source_has_its_own_counts(run):
    other = make_rows(run.folder / "other.jsonl", 10)
    write_lines(run.train, [*(row(f"a {i}") for i in range(5)), "{"])
    sources = [{"path": str(run.train), "weight": 0.5}, {"path": str(other), "limit": 4}]
    index = run.prepare(train_data=sources, max_rejected=0.5).train
    source_of_document = np.load(index.folder / "sources.npy")
    assert source_of_document.dtype == np.int32
    assert source_of_document.tolist() == [0] * 5 + [1] * 4
    names_and_weights = [(source.name, source.weight) for source in index.sources]
    assert names_and_weights == [(str(run.train), 0.5), (str(other), 1.0)]
    formats = [dict(source.formats) for source in index.sources]
    assert formats == [{"messages": 5}, {"messages": 4}]
    audit = run.audit()
    first, second = audit["sources"]
    assert (first["rows_read"], first["rows_used"], first["rows_rejected"]) == (6, 5, 1)
    assert (second["rows_read"], second["rows_used"], second["rows_rejected"]) == (4, 4, 0)
    for key in ("documents", "tokens", "supervised_tokens", "rows_read", "rows_used"):
        assert first[key] + second[key] == audit[key]
    assert audit["formats"] == {"messages": 9}
    assert DataIndex.load(run.data).train == index


def test_the_report_shows_the_audit(run):
    other = make_rows(run.folder / "other.jsonl", 1234)
    run.append("{", row(" "))
    sources = [{"path": str(run.train), "weight": 0.5}, str(other)]
    run.prepare(train_data=sources, max_rejected=0.5)
    status = RunStatus(run.folder / "run" / "status.json")
    status.take_ownership()
    status.write_start()
    status.end("done", 0, None)
    page = read_page(run.folder / "run").text
    for split in ("train", "eval"):
        audit = run.audit(split)
        histogram = audit["length"]["histogram"]
        for i, count in enumerate(histogram["documents"]):
            first, width = histogram["first"] + i * histogram["width"], histogram["width"]
            assert f"{cell(first)} to {cell(first + width - 1)} {cell(count)} " in page
        for number in (audit["rows_read"], audit["tokens"], audit["supervised_tokens"]):
            assert f" {number:,} " in page
    train = run.audit()
    assert train["rows_read"] == 24 + 2 + 1234
    for source in train["sources"]:
        cells = [source["name"], *(source[name] for name in source_columns()[:-1]), "messages"]
        assert " ".join(map(cell, cells)) in page
    for reason, count in train["rejected"].items():
        assert f"{reason} {count} " in page
    for line in (25, 26):
        assert f"{run.train}:{line}" in page


def test_unread_columns_are_counted_by_source_and_shown_on_the_terminal(run):
    """Columns with a value in used rows are counted; those of rejected rows are not."""
    other = run.folder / "other.jsonl"
    write_lines(run.train, [with_columns(f"a {i}", label=True, note=None) for i in range(6)])
    rows = [with_columns(f"b {i}", label=True, origin="web") for i in range(3)]
    write_lines(other, [*rows, with_columns(" ", label=True)])
    run.prepare(train_data=[str(run.train), str(other)], max_rejected=0.5)
    audit = run.audit()
    assert audit["unread_columns"] == {"label": 9, "origin": 3}
    assert [source["unread_columns"] for source in audit["sources"]] == [
        {"label": 6},
        {"label": 3, "origin": 3},
    ]
    assert_mentions(audit_summary(run.data), "label (9 rows)", "origin (3 rows)")
    assert_mentions(printed(run), "unread columns: label", "unread columns: origin")


def test_the_summary_of_data_without_warnings_is_one_line(run):
    run.prepare(eval_data=None)
    assert run.audit()["unread_columns"] == {}
    assert "\n" not in audit_summary(run.data)


def with_columns(answer, **columns):
    return json.dumps(json.loads(row(answer)) | columns)


def printed(run):
    console = Console(file=io.StringIO(), width=200)
    console.print(audit_table(json.loads((run.data / "audit.json").read_text())))
    return console.file.getvalue()


def test_details_that_are_0_are_left_out_of_the_table(run):
    run.prepare(eval_data=None)
    assert run.audit()["omitted_reasoning"]["rows"] == run.audit()["truncated_rows"] == 0
    assert "omitted reasoning" not in printed(run)
    assert "truncated rows" in printed(run)


def test_the_table_describes_the_lengths_in_terms_of_max_length(run):
    run.prepare(eval_data=None)
    table = printed(run)
    assert "max_length that keeps all" in table
    assert "keeps_all" not in table


def test_every_file_is_listed_with_its_number_of_rows(run):
    """Bad rows are counted too. A file may have no rows, or be read in part because of `limit`."""
    folder = run.folder / "rows"
    folder.mkdir()
    counts = {"a.jsonl": 3, "b.jsonl": 0, "c.jsonl": 5, "d.jsonl": 2}
    for name, count in counts.items():
        rows = [row(f"{name} {i}") for i in range(count)]
        write_lines(folder / name, ["{", *rows[1:]] if name == "c.jsonl" else rows)
    run.prepare(train_data={"path": str(folder), "limit": 9}, max_rejected=0.5)
    (source,) = run.audit()["sources"]
    expected = {str(folder / name): rows for name, rows in zip(counts, (3, 0, 5, 1), strict=True)}
    assert source["files"] == expected
    assert sum(expected.values()) == source["rows_read"] == 9
    shown = printed(run)
    for name, count in expected.items():
        assert_mentions(shown, f"{name}: {count} rows")


def test_a_reason_names_the_column_and_the_audit_its_first_row(run):
    run.append(with_columns("an image", images=["cat.png"]), with_columns("b", images=["dog.png"]))
    run.prepare(max_rejected=0.5)
    (source,) = run.audit()["sources"]
    ((reason, count),) = source["rejected"].items()
    assert_mentions(reason, "images")
    assert count == 2
    assert source["first_rejected"] == {reason: f"{run.train}:25"}
    assert [reject["reason"] for reject in run.rejects()] == [reason] * 2


def test_held_out_rows_in_the_training_set_are_counted_ignoring_white_space(run):
    write_lines(run.train, [row("a  b\n"), row("c", question="q\n"), row("d")])
    write_lines(run.eval, [row("a b"), row("c"), row("dd"), row("d", question="other")])
    run.prepare()
    assert run.audit("eval")["rows_also_in_train"] == 2
    assert_mentions(audit_summary(run.data), "2 documents", "training set")


def test_rows_that_differ_only_in_white_space_are_duplicates_and_held_out_together(run):
    answers = [f"answer number {i}" for i in range(80)]
    spaced = [answer.replace(" ", "  ") + "\n" for answer in answers]
    write_lines(run.train, [row(answer) for answer in (*answers, *spaced)])
    run.prepare(eval_data=0.3)
    audits = [run.audit("train"), run.audit("eval")]
    assert all(audit["duplicate_rows"] == audit["rows_used"] / 2 > 0 for audit in audits)
    assert audits[1]["rows_also_in_train"] == 0


def row_with_reasoning(reasoning):
    """A row of two turns; templates such as Qwen 3's omit the reasoning of the first."""
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "reasoning_content": reasoning},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four", "reasoning_content": "written"},
    ]
    return json.dumps({"messages": turns})


def test_omitted_reasoning_is_counted_with_its_remedy(run):
    template = str(ROOT / "tests" / "templates" / "qwen3.jinja")
    write_lines(
        run.train,
        [row("plain"), row_with_reasoning("left out"), row_with_reasoning("left out too")],
    )
    run.prepare(chat_template=template)
    omitted = run.audit()["omitted_reasoning"]
    tokenizer = load_tokenizer(run.folder / "model")
    texts = ("left out", "left out too")
    expected = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    assert omitted["rows"] == 2
    assert omitted["tokens"] == pytest.approx(expected, abs=4)  # white space of the template
    assert omitted["first"] == f"{run.train}:2"
    assert_mentions(audit_summary(run.data), f"{run.train}:2", "split_turns: true")
    index = run.prepare(chat_template=template, split_turns=True)
    assert run.audit()["omitted_reasoning"]["rows"] == 0
    split = open_split(index.train)
    text = "".join(tokenizer.decode(split.document(i)[0]) for i in range(len(split)))
    assert all(part in text for part in texts)


def test_special_tokens_inside_texts_are_counted_with_their_first_row(run):
    write_lines(
        run.train, [row("plain"), row("say <|im_end|> twice <|im_end|>"), row("<|im_end|>")]
    )
    run.prepare()
    special = run.audit()["special_tokens_in_text"]
    assert special == {"rows": 2, "tokens": 3, "first": f"{run.train}:2"}
    assert_mentions(audit_summary(run.data), f"{run.train}:2", "special_tokens_in_text")
    run.prepare(special_tokens_in_text="reject", max_rejected=0.7)
    assert run.audit()["special_tokens_in_text"]["rows"] == 0
    assert sum(run.audit()["rejected"].values()) == 2


def test_special_tokens_in_texts_without_template_are_counted(run):
    write_lines(
        run.train,
        [
            json.dumps({"prompt": "q", "completion": "a"}),
            json.dumps({"prompt": "say <|im_end|>", "completion": "x <|im_start|>"}),
            json.dumps({"text": "one <|im_end|> two"}),
        ],
    )
    run.prepare()
    counted = run.audit()["special_tokens_in_text"]
    assert counted == {"rows": 2, "tokens": 3, "first": f"{run.train}:2"}


class TestEndsWithoutStop:
    """A token that ends trained turns, while generation does not stop at it."""

    def change_tokenizer(self, run, **attributes):
        """Change attributes of the model's tokenizer; return the id of <|im_end|>."""
        tokenizer = load_tokenizer(run.folder / "model")
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(run.folder / "model")
        return tokenizer.convert_tokens_to_ids("<|im_end|>")

    def test_the_audit_has_the_token_with_its_rows_and_the_remedy(self, run):
        """A base model with ChatML: its eos_token is <|endoftext|>."""
        token_id = self.change_tokenizer(run, eos_token="<|endoftext|>")
        write_lines(run.train, [row("plain"), json.dumps({"text": "t"}), row("two")])
        run.prepare()
        (entry,) = run.audit()["ends_without_stop"].values()
        assert (entry["rows"], entry["first"]) == (2, f"{run.train}:1")
        assert_mentions(
            audit_summary(run.data), "<|im_end|>", str(token_id), "2 rows", "eos_token_id",
            "generation_config.json",
        )  # fmt: skip
        assert_mentions(printed(run), f"<|im_end|> ({token_id}): rows")

    def test_a_token_at_which_generation_stops_is_not_in_the_audit(self, run):
        run.prepare()
        assert run.audit()["ends_without_stop"] == {}
        token_id = self.change_tokenizer(run, eos_token="<|endoftext|>")
        config = run.folder / "model" / "generation_config.json"
        config.write_text(json.dumps({"eos_token_id": [0, token_id]}))
        run.prepare()
        assert run.audit()["ends_without_stop"] == {}

    def test_split_turns_is_the_remedy_if_only_the_last_turn_ends_with_a_stop_token(self, run):
        last = "{{ eos_token if loop.last and m.role == 'assistant' else '<|im_end|>' }}"
        template = CHATML.replace("<|im_end|>", last)
        self.change_tokenizer(run, eos_token="<|endoftext|>", chat_template=template)
        turns = json.loads(row("yes"))["messages"]
        write_lines(run.train, [json.dumps({"messages": turns * 2}), row("one turn")])
        run.prepare()
        (entry,) = run.audit()["ends_without_stop"].values()
        assert entry["rows"] == 1
        assert_mentions(audit_summary(run.data), "<|im_end|>", "split_turns: true")
        run.prepare(split_turns=True)
        assert run.audit()["ends_without_stop"] == {}


def test_the_same_error_in_several_messages_is_one_reason_with_its_first_row(run):
    """The answer has a name, which the template omits, as message 1, 2 or 3 of its row."""
    question = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a", "name": "n"}
    conversations = [{"messages": [question] * number + [answer]} for number in (1, 2, 3)]
    write_lines(run.train, [*(row(f"a{i}") for i in range(5)), *map(json.dumps, conversations)])
    run.prepare(max_rejected=0.9)
    (reason,) = run.audit()["rejected"]
    assert "messages[].name" in reason
    assert run.audit()["rejected"][reason] == 3
    assert run.audit()["sources"][0]["first_rejected"] == {reason: f"{run.train}:6"}
    assert [reject["reason"].count("messages[3].name") for reject in run.rejects()] == [0, 0, 1]


def test_a_mapping_of_columns_that_applies_to_no_row_is_named(run, caplog):
    run.prepare(columns={"completion": "answers"})
    (message,) = [each for each in caplog.messages if "columns" in each]
    assert_mentions(message, "no effect", "answers")
    caplog.clear()
    write_lines(run.train, [json.dumps({"prompt": "q", "answers": "a"}), row("b")])
    run.prepare(columns={"completion": "answers"})
    assert not [each for each in caplog.messages if "no effect" in each]


def test_settings_without_effect_on_the_formats_of_all_rows_are_named(run, caplog):
    write_lines(run.train, [json.dumps({"text": f"t {n}"}) for n in range(4)])
    run.prepare(eval_data=None, split_turns=True, max_length=64)
    (message,) = [each for each in caplog.messages if "split_turns" in each]
    assert_mentions(message, "no effect", "text")
    caplog.clear()
    run.append(row("a"))
    run.prepare(eval_data=None, split_turns=True, max_length=64)
    assert not [each for each in caplog.messages if "split_turns" in each]


def test_a_part_that_is_missing_in_several_messages_is_counted_once_in_the_reason(run):
    write_lines(run.train, [row("plain"), row_with_reasoning("a"), row_with_reasoning("b")])
    run.prepare(max_rejected=0.9)  # the template writes no reasoning
    ((reason, count),) = run.audit()["rejected"].items()
    assert (reason.count("messages[].reasoning_content"), count) == (1, 2)
