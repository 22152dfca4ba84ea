"""`make bench`: continued runs, rates over the ranks, and the tables of docs/benchmarks.md."""

import json
import runpy
from pathlib import Path

import pytest

from tests import ROOT
from tests.bench import speed, speed_run
from tests.bench.speed_cells import BASE, CELLS, QUICK_CELLS

pytestmark = pytest.mark.unit

COMMON = {"commit": "abc", "quick": False}
CELL = CELLS[0]


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def missing(results: Path, repeat=0, common=COMMON) -> list[str]:
    tools = speed.missing_runs(results, CELL, None, repeat, common)
    return [tool.name for tool in tools]


def test_only_successful_runs_of_the_same_commit_and_round_are_skipped(tmp_path):
    run = COMMON | {"cell": CELL.name, "repeat": 0}
    lines = [run | {"tool": "TRL"}, run | {"tool": "HF Trainer", "error": "killed"}]
    results = write(tmp_path / "speed.jsonl", lines)
    everything = [tool.name for tool in CELL.tools]
    assert missing(tmp_path / "none.jsonl") == everything
    assert missing(results) == [name for name in everything if name != "TRL"]
    assert sorted(missing(results, repeat=1)) == sorted(everything)
    assert missing(results, common=COMMON | {"commit": "def"}) == everything


def test_each_round_starts_with_another_tool(tmp_path):
    first = [missing(tmp_path / "none", repeat)[0] for repeat in range(len(CELL.tools))]
    assert sorted(first) == sorted(tool.name for tool in CELL.tools)


def test_every_cell_changes_the_base_case_once():
    assert [cell.name for cell in CELLS if not cell.changes] == [CELL.name]
    for cell in [*CELLS, *QUICK_CELLS]:
        assert cell.changes.keys() <= BASE.keys()
        assert "RankZero" in [tool.name for tool in cell.tools] or cell in QUICK_CELLS
        assert all(tool.script is None or tool.script.is_file() for tool in cell.tools)


def test_rates_are_sums_over_ranks_from_the_third_step_on(tmp_path):
    counts = {"tokens": 30, "supervised_tokens": 10, "computed_tokens": 40}
    early = {"tokens": 999, "supervised_tokens": 999, "computed_tokens": 999}
    for rank in (0, 1):
        times = [10.0, 20.0, 21.0, 24.0]
        lines = [{"time": t} | (early if i < 2 else counts) for i, t in enumerate(times)]
        write(tmp_path / f"steps-{rank}.jsonl", lines)
    rates = speed_run._peer_steps(tmp_path, 3)
    assert rates["useful_per_s"] == 2 * 2 * 30 / 4.0
    assert rates["supervised_per_s"] == 2 * 2 * 10 / 4.0
    assert rates["padding_share"] == pytest.approx(0.25)
    assert rates["step_s"] == 2.0


def line(tool, rate, **others):
    return others | COMMON | {
        "cell": "base case", "tool": tool, "repeat": 0, "useful_per_s": rate, "cpu": "2 x CPU",
        "supervised_per_s": rate / 2, "first_step_s": 20.0, "wall_s": 60.0, "pss_bytes": 2e9,
        "bare_flops": 1e11, "flops_per_token": 1e8, "date": "2026-01-01", "memory_gib": 24,
        "python": "3.11", "ranks": 2, "rows": "rows", "settings": BASE, "load": 0.1,
    }  # fmt: skip


def test_the_table_has_medians_ratios_and_failures(tmp_path):
    lines = [line("RankZero", rate) for rate in (300, 100, 310)]
    lines += [line("TRL", rate) for rate in (150, 140, 160)]
    lines += [COMMON | {"cell": "base case", "tool": "HF Trainer", "error": "x"}, line("TRL", 150)]
    old = line("RankZero", 9000) | {"commit": "older"}
    tables = runpy.run_path(str(ROOT / "docs/speed_tables.py"))["tables"]
    text = tables(write(tmp_path / "speed.jsonl", [old, *lines]))
    assert "| RankZero | 3 | 300 (100 to 310) |" in text
    assert "| TRL | 4 | 150 (140 to 160) | 2.00 | 75 |" in text
    assert "| HF Trainer | 0 | failed |" in text
    assert "2.00 times" in text
    assert "9000" not in text


def test_rows_without_gsm8k_are_as_long_as_its_rows(tmp_path):
    path, name = speed.write_rows(tmp_path / "missing.jsonl", tmp_path)
    rows = speed_run.json_lines(path)
    assert len(rows) == speed.NUM_ROWS
    assert "random words" in name
    assert {message["role"] for row in rows for message in row["messages"]} == {"user", "assistant"}
