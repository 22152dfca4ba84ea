"""Run folders of version 0.1.0 are never retrained or cleared, and finished ones are still usable.

`run_folders_0.1.0/` was written by 0.1.0 (commit dd0e0d6) from the run files done.yaml and
unfinished.yaml in it. The unfinished run was stopped at step 5 of 240 by its file `stop`.
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


def run_command(name: str, *arguments: str, cwd: Path) -> tuple[int, str]:
    """Exit code and output of a command of this project, such as train."""
    return run("-m", f"pipeline.cli.{name}", *arguments, cwd=cwd)


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by its path there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_done_run_is_not_trained_again(workspace):
    before = content(workspace / "done")
    code, output = run_command("train", "done.yaml", cwd=workspace)
    assert code == 0, output
    assert_mentions(output, "done is done", "nothing to do")
    assert content(workspace / "done") == before


def test_a_done_run_with_other_settings_is_refused(workspace):
    before = content(workspace / "done")
    code, output = run_command("train", "done.yaml", "lr=0.5", cwd=workspace)
    assert code == 2, output
    assert_mentions(output, "lr: 0.005 -> 0.5", "overwrite: true")
    assert "Traceback" not in output
    assert content(workspace / "done") == before


def assert_not_continued(workspace, name, *changes):
    """Assert that a start with the changes is refused, and changes no file of the run `name`."""
    before = content(workspace / name)
    code, output = run_command("train", "done.yaml", f"output_dir={name}", *changes, cwd=workspace)
    assert code == 2, output
    assert_mentions(output, "output_dir", name, "RankZero 0.1.0")
    assert content(workspace / name) == before


def test_a_done_run_is_not_extended(workspace):
    shutil.copytree(workspace / "done", workspace / "longer")
    assert_not_continued(workspace, "longer", "epochs=3", "accept_changes=[total_steps]")


def test_a_done_run_without_its_adapter_is_not_trained_again(workspace):
    shutil.copytree(workspace / "done", workspace / "without_adapter")
    shutil.rmtree(workspace / "without_adapter/adapter")
    assert_not_continued(workspace, "without_adapter")


def test_an_unfinished_run_names_the_version_that_can_finish_it(workspace):
    """Documents are prepared differently since, so the position of the checkpoint is unknown."""
    before = content(workspace / "unfinished")
    code, output = run_command("train", "unfinished.yaml", cwd=workspace)
    assert code == 2, output
    assert_mentions(output, "output_dir", "unfinished", "finish it with RankZero 0.1.0")
    assert "Traceback" not in output
    assert content(workspace / "unfinished") == before


def test_a_done_run_can_be_merged_scored_and_reported(workspace):
    for name in ("merge", "score", "report"):
        code, output = run_command(name, "done", cwd=workspace)
        assert code == 0, output
    scores = json.loads((workspace / "done/score.json").read_text())["models"]
    assert scores.keys() == {"base", "adapter", "merged"}
    # The held-out loss that 0.1.0 measured at the end.
    lines = (workspace / "done/metrics.jsonl").read_text().splitlines()
    measured = [loss for line in lines if (loss := json.loads(line).get("eval_loss"))]
    for name in ("adapter", "merged"):
        assert scores[name]["loss"] == pytest.approx(measured[-1], rel=1e-5)
    assert (workspace / "done/report.html").stat().st_size > 10_000
