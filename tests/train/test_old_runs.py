"""Run folders that version 0.1.0 wrote: never retrained or cleared unasked, and still usable.

`run_folders_0.1.0/` was written by 0.1.0 (commit dd0e0d6) from its two run files; the unfinished
run was stopped by its stop file at step 5 of 240.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.commands import run
from tests.messages import assert_mentions

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "runs"
    shutil.copytree(Path(__file__).with_name("run_folders_0.1.0"), folder)
    return folder


def verb(name: str, *arguments: str, cwd: Path) -> tuple[int, str]:
    return run("-m", f"pipeline.cli.{name}", *arguments, cwd=cwd)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_done_run_stays_done(workspace):
    before = content(workspace / "done")
    code, output = verb("train", "done.yaml", cwd=workspace)
    assert code == 0, output
    assert_mentions(output, "done is done", "nothing to do")
    assert content(workspace / "done") == before


def test_a_done_run_with_other_settings_is_refused(workspace):
    before = content(workspace / "done")
    code, output = verb("train", "done.yaml", "lr=0.5", cwd=workspace)
    assert code == 2, output
    assert_mentions(output, "lr: 0.005 -> 0.5", "overwrite: true")
    assert "Traceback" not in output
    assert content(workspace / "done") == before


@pytest.mark.parametrize("change", [["epochs=3", "accept_changes=[total_steps]"], []])
def test_a_done_run_that_cannot_be_extended_stays_as_it_is(workspace, change):
    """Neither with more epochs nor, where its adapter is gone, with the same settings."""
    shutil.copytree(workspace / "done", workspace / "copy", dirs_exist_ok=True)
    if not change:
        shutil.rmtree(workspace / "copy/adapter")
    before = content(workspace / "copy")
    code, output = verb("train", "done.yaml", "output_dir=copy", *change, cwd=workspace)
    assert code == 2, output
    assert_mentions(output, "output_dir", "copy", "RankZero 0.1.0")
    assert content(workspace / "copy") == before


def test_an_unfinished_run_names_the_version_that_can_finish_it(workspace):
    """The documents are prepared in another way since, so the checkpoint's place is not found."""
    before = content(workspace / "unfinished")
    code, output = verb("train", "unfinished.yaml", cwd=workspace)
    assert code == 2, output
    assert_mentions(output, "output_dir", "unfinished", "finish it with RankZero 0.1.0")
    assert "Traceback" not in output
    assert content(workspace / "unfinished") == before


def test_a_done_run_can_be_merged_scored_and_reported(workspace):
    for name in ("merge", "score", "report"):
        code, output = verb(name, "done", cwd=workspace)
        assert code == 0, output
    scores = json.loads((workspace / "done/score.json").read_text())["models"]
    assert scores.keys() == {"base", "adapter", "merged"}
    # The held-out loss that 0.1.0 measured at the end.
    lines = (workspace / "done/metrics.jsonl").read_text().splitlines()
    measured = [loss for line in lines if (loss := json.loads(line).get("eval_loss"))]
    for name in ("adapter", "merged"):
        assert scores[name]["loss"] == pytest.approx(measured[-1], rel=1e-5)
    assert (workspace / "done/report.html").stat().st_size > 10_000
