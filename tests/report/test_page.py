"""report.html shows all files of a run folder, is self-contained, and accepts incomplete runs."""

import base64
import hashlib
import json
import re
import subprocess
import sys
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.report.curves import MAX_POINTS
from pipeline.report.data_audit import count_table
from pipeline.report.folder import read_run_folder
from pipeline.report.page import write_report
from tests.messages import assert_mentions, refused
from tests.report.folders import (
    FILES,
    GIB,
    HOSTILE_TEXT,
    SPIKE,
    build_hostile_run,
    build_run,
    metrics,
    write_long_metrics,
    write_metrics,
    write_split,
    write_tokenizer,
)

pytestmark = pytest.mark.unit

VOID_TAGS = {"meta", "br", "hr", "img", "input", "link", "rect"}  # without an end tag


class Page(HTMLParser):
    """Parser of a page, which asserts that its elements are nested and closed.

    `tags`: each start tag with its attributes.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.curves_json = ""
        self.feed(html)
        self.close()
        assert self.open_tags == []

    @property
    def text(self) -> str:
        """The visible text, with single spaces."""
        return " ".join(" ".join(self.texts).split())

    @property
    def curves(self) -> dict:
        """The data of the charts (`curves.page_data`)."""
        return json.loads(self.curves_json)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if self.tags[-1:] == [("script", {"type": "application/json", "id": "curves"})]:
            self.curves_json += data
        if not self.open_tags or self.open_tags[-1] not in ("style", "script"):
            self.texts.append(data)


def read_page(folder: Path) -> Page:
    """Write and parse the report of a run folder."""
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_run(tmp_path / "orders")


def test_the_page_shows_every_file_of_the_run_folder(run):
    """The texts are values of tests/report/folders.py, in the order of the page's sections."""
    text = read_page(run).text
    for expected in (
        "SmolLM2-135M-Instruct", "done", "node-17", "80 of 80", "3 min 41 s",  # headline
        "0 % → 98.3 %", "merged 96.7 %", "2.72 → 0.0874", "2.7193", "0.0876", "60 held-out rows",
        "636 tokens/s", "112,000 tokens, 37.1 % supervised",
        "4.88 M of 135 M parameters trained (3.6 %)", "2 x CPU",
        "96 new tokens",
        "held-out loss by +0.0002 (0.23 %), and 0 of 9 answers",  # merge error
        "0.5 s 2.19 s 77.1 % below", "1,500 tokens/s 636 tokens/s 2.4 times as large",
        "1.1e-8 ✓ equal", "0.002 ✗ differs", "not merged: two tensors have no name",  # class
        "without fast paths: the loss differs by 1e-2",
        "resumed from step 40", "stopped (exit code 75)", "time_limit",  # timeline
        "deepspeed --num_accelerators 2 --module pipeline.cli.train", "torch==2.13.0", "2.13.0+cpu",
        "the largest up to 8 that fits", "another reason", "bfloat16",  # plan
        "0.251", "0.839", "1.317", "1.316 GiB", "1.330 GiB", "16.000", "1.1 % below",  # memory
        "cpu-bf16", "no bfloat16 units", "accelerator/cpu_accelerator.py",
        "642", "answer is empty", "112,233", "37.1", "175.4", "259", "10,517",  # audit
        "104 to 155 301", "data/alpaca.parquet 0.25", "100,001", "orders.jsonl:9",
        "3 of 120 documents have more than 1,024 tokens (max_length)", "formats · alpaca 40",
        "rows rejected 2 0",
        "all-linear", "data/held-out.jsonl", "reduce_bucket_size",
    ):  # fmt: skip
        assert expected in text, expected
    assert all(item["prompt"] in text for item in FILES["score.json"]["answers"])


def test_each_choice_of_the_plan_has_its_value(run):
    text = read_page(run).text
    assert "training_dtype bfloat16 the device has units for it" in text
    assert "lora_r 16 set by a preset" in text
    assert "3 checks of the class" not in text  # their results have a table of their own


def test_every_answer_is_marked_right_or_wrong(run):
    text = read_page(run).text
    # All 9 answers of the base are wrong, and one each of adapter and merged model.
    assert text.count("✗ wrong") == 9 + 1 + 1
    assert text.count("✓ right") == 8 + 8


def test_the_page_loads_nothing_and_allows_only_its_own_scripts_and_style(run):
    page = read_page(run)
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "style", "xlink:href"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert "href" not in attributes or tag == "a"
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "@import" not in html
    assert "url(" not in html
    policy = next(a["content"] for _, a in page.tags if "Policy" in str(a.get("http-equiv")))
    directives = dict(directive.strip().split(" ", 1) for directive in policy.split(";"))
    assert directives["default-src"] == "'none'"
    names = {"default-src", "script-src", "style-src", "base-uri", "form-action"}
    assert set(directives) == names
    blocks = {
        "script-src": re.findall(r"<script>(.*?)</script>", html, re.DOTALL),
        "style-src": re.findall(r"<style>(.*?)</style>", html, re.DOTALL),
    }
    for name, sources in blocks.items():
        hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in sources)
        assert directives[name].split() == [f"'sha256-{digest}'" for digest in hashes]


def test_ids_are_unique_and_every_chart_has_its_element(run):
    page = read_page(run)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    names = [f"plot-{chart['name']}" for chart in page.curves["charts"]]
    assert {*names, "curves"} == set(ids)


def test_text_of_a_run_is_shown_and_never_becomes_markup(tmp_path):
    run = build_hostile_run(tmp_path)
    page = read_page(run)
    assert page.text.count(" ".join(HOSTILE_TEXT.split())) >= 10
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 3  # data, uPlot, charts.js
    assert "a" not in tags  # a javascript: source does not become a link
    assert "img" not in tags
    html = (run / "report.html").read_text(encoding="utf-8")
    block = html.split('id="curves">')[1].split("</script>")[0]
    assert not set("<>&") & set(block)


@pytest.mark.parametrize("missing", [*FILES, "metrics.jsonl"])
def test_a_missing_file_is_named_and_the_rest_is_shown(tmp_path, missing):
    text = read_page(build_run(tmp_path, without=(missing,))).text
    usual_message = f"{missing} is not in the run folder."
    assert ("Not scored yet" if missing == "score.json" else usual_message) in text
    assert "SmolLM2-135M-Instruct" in text


@pytest.mark.parametrize("broken", FILES)
def test_an_unreadable_file_is_named(run, broken):
    (run / broken).write_text('{"state": [', encoding="utf-8")
    assert f"{broken} cannot be read" in read_page(run).text


def test_values_of_unexpected_types_do_not_break_the_page(run):
    for name, content in FILES.items():
        unexpected = {key: [1, {"deep": None}] for key in content}
        (run / name).write_text(json.dumps(unexpected), encoding="utf-8")
    read_page(run)  # raises no error


def test_status_alone_is_enough(tmp_path):
    status = {"state": "failed", "exit_code": 1, "reason": "rank 3: out of memory"}
    (tmp_path / "status.json").write_text(json.dumps(status), encoding="utf-8")
    assert "rank 3: out of memory (exit code 1)" in read_page(tmp_path).text


@pytest.mark.parametrize("file", ["run.yaml", None])
def test_a_folder_that_is_not_a_run_folder_is_refused(tmp_path, file):
    if file:
        (tmp_path / file).write_text("lora_r: 8", encoding="utf-8")
    with refused("not a run folder"):
        write_report(tmp_path)
    with refused("not a run folder"):
        write_report(tmp_path / "nowhere")


def test_an_incomplete_last_line_is_ignored(run):
    write_metrics(run, metrics(10), end='\n{"step": 11, "lo')
    assert read_run_folder(run).measured("loss")[0] == list(range(1, 11))
    read_page(run)


def test_after_a_resume_later_records_replace_earlier_ones(run):
    before = [*metrics(10), {"step": 9, "eval_loss": 5.0}, {"step": 5, "eval_loss": 4.0}]
    resumed_at_5 = [{"step": step, "loss": 100.0 + step} for step in (6, 7)]
    write_metrics(run, [*before, *resumed_at_5])
    records = read_run_folder(run)
    steps, losses = records.measured("loss")
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert losses[-2:] == [106.0, 107.0]
    assert records.held_out() == ([5], [4.0])


def test_a_memory_prediction_with_an_error_above_10_percent_is_marked(run):
    assert "more than 10 %" not in read_page(run).text
    sizes = {"peak_bytes": 2 * GIB, "predicted_bytes": int(1.316 * GIB)}
    write_metrics(run, [{"step": 1, "loss": 1.0, **sizes}])
    text = read_page(run).text
    assert "1.316 GiB 2.000 GiB 34.2 % below" in text
    assert "more than 10 %" in text


def test_documents_are_shown_with_their_supervised_text_marked(run):
    documents, supervised_offsets = [[5, 6, 7, 8, 9, 10], [11, 12]], [[2, 3], [1]]
    write_split(run / "data", documents, supervised_offsets)
    assert "No tokenizer.json" in read_page(run).text
    write_tokenizer(run / "adapter")  # token 7 is the word w<7>&
    html = write_report(run).read_text(encoding="utf-8")
    marked = [unescape(text).split() for text in re.findall("<mark>(.*?)</mark>", html)]
    assert marked == [["w<7>&", "w<8>&"], ["w<12>&"]]
    text = Page(html).text
    assert "Document 0: 2 of 6 tokens are supervised." in text
    assert "w<5>& w<6>& w<7>& w<8>& w<9>& w<10>&" in text


def test_a_running_state_with_an_old_heartbeat_is_shown_as_dead(run):
    status = FILES["status.json"] | {"state": "running", "machine": "another", "heartbeat": 1e9}
    (run / "status.json").write_text(json.dumps(status), encoding="utf-8")
    assert_mentions(read_page(run).text, "2001-09-09", "has ended", "to resume")


def test_100_000_steps_make_a_small_page(run, capsys):
    write_long_metrics(run, 100_000)
    start, cpu_start = time.perf_counter(), time.process_time()
    size = write_report(run).stat().st_size
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    with capsys.disabled():  # a measurement for the reader of the test's output
        print(f"\n100,000 steps: {size:,} bytes, {seconds:.2f} s, {cpu_seconds:.2f} s of CPU")  # noqa: T201
    assert size < 5_000_000  # bytes
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "thinned to at most 4,000 points" in page.text
    series = [series for chart in page.curves["charts"] for series in chart["series"]]
    assert max(len(series["x"]) for series in series) <= MAX_POINTS
    loss = next(chart for chart in page.curves["charts"] if chart["name"] == "loss")
    assert max(loss["series"][0]["y"]) == SPIKE


def test_writing_replaces_the_page_and_leaves_no_other_file(run):
    before = {path.name for path in run.iterdir()}
    (run / "report.html").write_text("old", encoding="utf-8")
    assert read_page(run).text.startswith("SmolLM2")
    assert {path.name for path in run.iterdir()} == before | {"report.html"}


def test_scores_are_shown_with_their_intervals(run):
    text = read_page(run).text
    assert "0.0874 (0.0612 to 0.1136)" in text
    assert "98.3 % (91.1 % to 99.7 %)" in text
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "2.7193</td>" in html  # a score of an earlier version has no interval


def test_scores_of_answers_at_evaluations_have_a_chart(run):
    lines = metrics()
    for line in lines:
        if "eval_loss" in line:
            line |= {"eval_exact_match": 0.5, "eval_exact_match_interval": [0.4, 0.6]}
    write_metrics(run, lines)
    assert "Held-out answers" in write_report(run).read_text(encoding="utf-8")


def test_the_page_is_written_without_importing_torch(run):
    code = (
        "import sys; from pathlib import Path; from pipeline.report.page import write_report; "
        "write_report(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, timeout=60)


def test_the_script_prints_the_path_of_the_page_and_refuses_a_folder_that_is_not_a_run(run):
    script = [sys.executable, "launch/report.py"]
    not_a_run = run.parent
    done, failed = (
        subprocess.run(
            [*script, str(folder)], check=False, capture_output=True, text=True, timeout=60
        )
        for folder in (run, not_a_run)
    )
    assert (done.returncode, done.stdout) == (0, f"{run / 'report.html'}\n"), done.stderr
    assert failed.returncode == 2
    assert_mentions(failed.stderr, "not a run folder")
    assert "Traceback" not in failed.stderr


def test_counts_of_the_audit_have_separators_and_shares_are_percent():
    split = {"tokens": 4565, "supervised_share": 0.4344, "omitted": {"rows": 0, "first": None}}
    table = count_table({"train": split, "eval": split | {"tokens": None}})
    assert dict(table["rows"]) == {
        "tokens": ["4,565", ""],
        "supervised_share": ["43.4\u00a0%"] * 2,
        "omitted · rows": ["0", "0"],
    }
