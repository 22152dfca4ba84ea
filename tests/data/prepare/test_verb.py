"""launch/prepare.py shows documents and the audit, and refuses wrong input."""

import json
import os
import subprocess
import sys

import pytest

from pipeline.data.dataset.reader import open_split
from pipeline.train.status import RunStatus
from tests import ROOT
from tests.messages import assert_mentions

pytestmark = pytest.mark.tensor


def test_prepare_shows_documents_and_the_audit_and_refuses_bad_rows_and_places(run):
    settings = run.settings().model_dump(include={"model", "train_data", "output_dir"})
    run_file = run.folder / "run.yaml"
    run_file.write_text(json.dumps(settings))

    def script(*arguments):
        command = [sys.executable, "launch/prepare.py", str(run_file), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    result = script("--show", "2")
    assert result.returncode == 0, result.stderr
    assert "<|im_start|>assistant\n[[yes 0<|im_end|>]]\n" in result.stdout
    assert result.stdout.count("[[") == 3  # the second document has two answers
    assert "rows read" in result.stdout
    run.append("{")
    refused = script("max_rejected=0")
    assert refused.returncode == 2
    assert_mentions(refused.stderr, f"{run.train}:25", "max_rejected")
    assert "Traceback" not in refused.stderr
    for place in ("/proc/x", str(run.train), str(run.train / "below")):
        refused = script(f"output_dir={place}")
        assert refused.returncode == 2
        assert_mentions(refused.stderr, "output_dir", place)


def test_the_data_of_a_running_run_is_not_replaced(run):
    status = RunStatus(run.folder / "run" / "status.json")
    first = run.prepare()
    status.own()
    status.claim()
    run_file = run.folder / "run.yaml"
    run_file.write_text(json.dumps(run.settings().model_dump(include={"model", "output_dir"})))
    command = [sys.executable, "launch/prepare.py", run_file, f"train_data={run.train}"]
    command.append("max_length=99")
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert_mentions(refused.stderr, run.folder / "run", os.getpid())
    assert len(open_split(first.train)) == 24
    status.end("done", 0, None)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not first.train.folder.exists()
