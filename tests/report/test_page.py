"""report.html shows all files of a run folder, is self-contained, and accepts incomplete runs."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from pipeline.report.folder import read_run_folder
from pipeline.report.page import write_report
from pipeline.report.plots import line_curve, loss_curve, smoothed
from tests.messages import assert_mentions, refused

pytestmark = pytest.mark.unit

GIB = 2**30
VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = "<script>alert('x')</script> & \"quoted\""


def answer(index: int) -> dict[str, str]:
    order = {
        "item": ["croissant", "rye loaf", "cheesecake"][index % 3],
        "count": index + 2,
        "size": None if index % 2 else "large",
        "day": "2025-03-0" + str(index % 9 + 1),
        "time": "08:30",
        "delivery": index % 2 == 0,
    }
    expected = json.dumps(order)
    wrong = json.dumps(order | {"count": 1}) if index == 4 else expected
    base = (
        f"Sure! Here is the order you asked for:\n\n- {order['item']} x {order['count']}\n"
        "- day: Saturday\n\nLet me know if you need anything else."
    )
    prompt = (
        f"Hiya, could I get {order['count']} of your {order['item']} on {order['day']} "
        "at half past eight? We'll pick up. Cheers"
    )
    return {
        "prompt": prompt,
        "expected": expected,
        "base": base,
        "adapter": wrong,
        "merged": wrong,
    }


def metrics(num_steps: int = 80) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for step in range(1, num_steps + 1):
        wiggle = math.sin(7.3 * step) * math.cos(3.1 * step)
        lines.append(
            {
                "step": step,
                "epoch": step / num_steps,
                "loss": 0.05 + 2.6 * math.exp(-step / 14) + 0.5 * math.exp(-step / 30) * wiggle,
                "lr": 1e-3 * min(1, step / 3) * 0.5 * (1 + math.cos(math.pi * step / num_steps)),
                "grad_norm": 0.3 + 2 * math.exp(-step / 10) + 0.1 * abs(wiggle),
                "tokens": 1400,
                "supervised_tokens": 520,
                "tokens_per_second": 640 + 45 * wiggle,
                "step_seconds": 2.1875,
                "peak_bytes": int((1.31 + 0.02 * (step > 2)) * GIB),
                "predicted_bytes": int(1.316 * GIB),
            }
        )
        if step in (27, 54, 80):
            lines.append({"step": step, "eval_loss": {27: 0.412, 54: 0.133, 80: 0.0874}[step]})
    return lines


FILES: dict[str, object] = {
    "run.yaml": {
        "model": "models/SmolLM2-135M-Instruct",
        "train_data": ["data/orders.jsonl"],
        "eval_data": "data/held-out.jsonl",
        "output_dir": "runs/orders",
        "lora_r": 16,
        "lora_alpha": 32.0,
        "lora_target_modules": "all-linear",
        "lr": 1e-3,
        "epochs": 1,
        "load_in_4bit": False,
        "seed": 42,
    },
    "status.json": {
        "state": "done",
        "step": 80,
        "total_steps": 80,
        "exit_code": 0,
        "reason": "",
        "host": "node-17",
        "started": "2025-03-01T09:12:00+00:00",
        "ended": "2025-03-01T09:15:41+00:00",
    },
    "plan.json": {
        "settings": {},
        "model": {
            "folder": "models/SmolLM2-135M-Instruct",
            "parameters": 134_515_008,
            "trainable": 4_884_480,
            "training_dtype": "bfloat16",
        },
        "hardware": {"kind": "cpu", "name": "CPU", "ranks": 2},
        "choice": {
            "zero_stage": 2,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "global_batch_size": 8,
            "gradient_checkpointing": False,
            "why": {
                "zero_stage": "the base fits on each rank: only adapter gradients are communicated",
                "batch_size": "the largest up to 8 that fits (1.3 GiB a rank)",
                "gradient_checkpointing": "off: the activations fit (1.3 GiB a rank)",
                "resident_why": "another reason",
            },
        },
        "memory": {
            "per_rank": {
                "base_weights": 269_030_016,
                "adapter_weights": 9_768_960,
                "optimizer_state": 29_306_880,
                "activations": 901_251_072,
                "logits": 204_472_320,
            },
            "peak_bytes": 1_413_829_248,
            "device_bytes": 16 * GIB,
            "fits": True,
        },
        "rules": [
            {
                "id": "cpu-bf16",
                "level": "warn",
                "message": "this CPU has no bfloat16 units; fp32 may be faster",
                "source": "DeepSpeed 0.19.8 accelerator/cpu_accelerator.py",
            },
            {
                "id": "alpha-2r",
                "level": "advise",
                "message": "alpha is 2 x r, as the guide says",
                "source": "https://example.org/guide",
            },
        ],
        "steps": {"total_steps": 80, "warmup_steps": 3},
        "deepspeed": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 4884480}},
    },
    "score.json": {
        "rows": 60,
        "max_new_tokens": 96,
        "models": {
            "base": {"loss": 2.7193, "exact_match": 0.0, "seconds": 41.2},
            "adapter": {"loss": 0.0874, "exact_match": 0.983, "seconds": 22.4},
            "merged": {"loss": 0.0876, "exact_match": 0.967, "seconds": 15.9},
        },
        "answers": [answer(index) for index in range(9)],
    },
    "data/audit.json": {
        "train": {
            "rows_read": 642,
            "rows_used": 640,
            "rejected": {"answer is empty": 2},
            "formats": {"messages": 600, "alpaca": 40},
            "tokens": 112_233,
            "supervised_share": 0.371,
            "length": {
                "mean": 175.4,
                "max": 259,
                "histogram": {"width": 52, "documents": [11, 150, 301, 153, 25]},
            },
            "sources": [
                {
                    "name": "data/orders.jsonl",
                    "weight": 1.0,
                    "rows_used": 600,
                    "tokens": 100_001,
                    "formats": {"messages": 600},
                },
                {
                    "name": "data/alpaca.parquet",
                    "weight": 0.25,
                    "rows_used": 40,
                    "tokens": 12_232,
                    "formats": {"alpaca": 40},
                },
            ],
        },
        "eval": {"rows_read": 60, "rows_used": 60, "rejected": {}, "tokens": 10_517},
    },
}


def build_run(folder: Path, *, without: tuple[str, ...] = ()) -> Path:
    for name, content in FILES.items():
        if name not in without:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            as_text = yaml.safe_dump if name.endswith(".yaml") else json.dumps
            path.write_text(as_text(content), encoding="utf-8")
    if "data/audit.json" not in without:
        lines = [{"file": "orders.jsonl", "line": at, "reason": "answer is empty"} for at in (7, 9)]
        rejects = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "data" / "rejects.jsonl").write_text(rejects + "{", encoding="utf-8")
    if "metrics.jsonl" not in without:
        write_metrics(folder, metrics())
    return folder


def write_metrics(folder: Path, lines: list[dict[str, object]], end: str = "\n") -> None:
    text = "\n".join(json.dumps(line) for line in lines) + end
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


class Page(HTMLParser):
    """Text and tags of a page; asserts that its elements are correctly nested and closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)


def read_page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_run(tmp_path / "orders")


def test_the_page_shows_every_file_of_the_run_folder(run):
    text = read_page(run).text
    for expected in (
        "SmolLM2-135M-Instruct", "done", "node-17", "80 of 80", "3 min 41 s",  # headline
        "0 % → 98.3 %", "merged 96.7 %", "2.72 → 0.0874", "2.7193", "0.0876", "60 held-out rows",
        "636 tokens/s", "112,000 tokens, 37.1 % supervised",
        "4.88 M of 135 M parameters trained (3.6 %)", "2 x CPU",
        "41.2 s", "22.4 s", "15.9 s", "96 new tokens",
        "the largest up to 8 that fits", "another reason", "bfloat16",  # plan
        "0.251", "0.839", "1.317", "1.316", "1.330", "16.000", "is 1.1 % below",  # memory in GiB
        "cpu-bf16", "no bfloat16 units", "accelerator/cpu_accelerator.py",
        "642", "answer is empty", "112,233", "0.371", "175.4", "259", "10,517",  # audit
        "104 to 155 301", "data/alpaca.parquet 0.25", "100,001", "orders.jsonl:9",
        "formats · alpaca 40", "rows rejected 2 0",
        "all-linear", "data/held-out.jsonl", "reduce_bucket_size",
    ):  # fmt: skip
        assert expected in text, expected
    assert all(item["prompt"] in text for item in FILES["score.json"]["answers"])


def test_every_answer_is_marked_right_or_wrong(run):
    text = read_page(run).text
    assert text.count("✗ wrong") == 9 + 2  # every base answer; the fifth of adapter and merged
    assert text.count("✓ right") == 8 + 8


def test_the_page_has_no_external_resources(run):
    page = read_page(run)
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe", "object"} & set(names)
    for tag, attributes in page.tags:
        assert "src" not in attributes
        target = attributes.get("href") or attributes.get("xlink:href")
        assert target is None or target.startswith("#") or tag == "a"
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert html.count("http") == 2  # the link of a rule: its target and its text


def test_ids_are_unique_and_every_reference_has_one(run):
    html = write_report(run).read_text(encoding="utf-8")
    ids = [attributes["id"] for _, attributes in Page(html).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', html)) == set(ids)


def test_hostile_text_is_escaped(run):
    score = {"models": {}, "answers": [dict.fromkeys(("prompt", "expected", "base"), HOSTILE)]}
    (run / "score.json").write_text(json.dumps(score), encoding="utf-8")
    plan = {"rules": [{"id": "x", "level": "warn", "source": "javascript:alert(1)"}]}
    (run / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    page = read_page(run)
    assert page.text.count(HOSTILE) == 3
    assert not {"script", "a"} & {tag for tag, _ in page.tags}


@pytest.mark.parametrize("missing", [*sorted(set(FILES) - {"score.json"}), "metrics.jsonl"])
def test_a_missing_file_is_named_and_the_others_are_shown(tmp_path, missing):
    text = read_page(build_run(tmp_path, without=(missing,))).text
    assert f"{missing} is not in the run folder." in text
    assert "SmolLM2-135M-Instruct" in text


def test_a_run_without_score_json_is_shown_as_not_scored(tmp_path):
    text = read_page(build_run(tmp_path, without=("score.json",))).text
    assert "Not scored yet" in text
    assert "SmolLM2-135M-Instruct" in text


@pytest.mark.parametrize("broken", FILES)
def test_an_unreadable_file_is_named(run, broken):
    (run / broken).write_text('{"state": [', encoding="utf-8")
    assert f"{broken} cannot be read" in read_page(run).text


def test_values_of_unexpected_types_do_not_break_the_page(run):
    for name, content in FILES.items():
        odd = {key: [1, {"deep": None}] for key in content}
        (run / name).write_text(json.dumps(odd), encoding="utf-8")
    read_page(run)


def test_a_folder_with_only_status_json_has_a_page(tmp_path):
    status = {"state": "failed", "exit_code": 1, "reason": "rank 3: out of memory"}
    (tmp_path / "status.json").write_text(json.dumps(status), encoding="utf-8")
    assert "rank 3: out of memory (exit code 1)" in read_page(tmp_path).text


@pytest.mark.parametrize("files", [(), ("run.yaml",)])
def test_a_folder_that_is_not_a_run_folder_is_refused(tmp_path, files):
    for file in files:
        (tmp_path / file).write_text("lora_r: 8", encoding="utf-8")
    with refused("not a run folder"):
        write_report(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with refused("not a run folder"):
        write_report(tmp_path / "nowhere")


def test_an_incomplete_last_line_is_ignored(run):
    write_metrics(run, metrics(10), end='\n{"step": 11, "lo')
    assert [step for step, _ in read_run_folder(run).measured("loss")] == list(range(1, 11))
    read_page(run)


def test_after_a_resume_later_records_replace_earlier_ones(run):
    later = [{"step": step, "loss": 100.0 + step} for step in (6, 7)]
    first = [*metrics(10), {"step": 9, "eval_loss": 5.0}, {"step": 5, "eval_loss": 4.0}]
    write_metrics(run, [*first, *later])
    folder = read_run_folder(run)
    assert [step for step, _ in folder.measured("loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert folder.measured("loss")[-2:] == [(6, 106.0), (7, 107.0)]
    assert folder.held_out() == [(5, 4.0)]


def test_a_memory_prediction_that_is_off_by_10_percent_is_marked(run):
    assert "differ by more" not in read_page(run).text
    sizes = {"peak_bytes": 2 * GIB, "predicted_bytes": int(1.316 * GIB)}
    write_metrics(run, [{"step": 1, "loss": 1.0, **sizes}])
    assert (
        "Prediction and measurement differ by more than 10 %: the prediction is 34.2 % below"
        in read_page(run).text
    )


def test_writing_replaces_the_page_and_leaves_no_other_file(run):
    before = {path.name for path in run.iterdir()}
    (run / "report.html").write_text("old", encoding="utf-8")
    assert read_page(run).text.startswith("SmolLM2")
    assert {path.name for path in run.iterdir()} == before | {"report.html"}


def test_plots_accept_nan_infinity_and_long_runs():
    steps = list(range(30_000))
    losses = [math.nan if step % 1000 == 0 else 1 / (step + 1) for step in steps]
    assert len(loss_curve("a", (steps, losses), ([], []))) < 100_000
    assert "nan" not in loss_curve("a", ([1, 2], [math.inf, math.nan]), ([1], [math.nan]))
    assert line_curve("b", ([1], [0.0]), "one").startswith("<svg")


def test_smoothing_keeps_constants_and_straight_lines():
    assert smoothed([2.0] * 45) == pytest.approx([2.0] * 45)
    assert smoothed([float(i) for i in range(60)])[30] == pytest.approx(30)
    assert smoothed([]) == []


def test_the_report_is_written_without_torch(run):
    code = (
        "import sys; from pathlib import Path; from pipeline.report.page import write_report; "
        "write_report(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, timeout=60)
    script = [sys.executable, "launch/report.py"]
    done, failed = (
        subprocess.run(
            [*script, str(folder)], check=False, capture_output=True, text=True, timeout=60
        )
        for folder in (run, run.parent)
    )
    assert (done.returncode, done.stdout) == (0, f"{run / 'report.html'}\n"), done.stderr
    assert failed.returncode == 2
    assert_mentions(failed.stderr, "not a run folder")
    assert "Traceback" not in failed.stderr
