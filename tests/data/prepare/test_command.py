"""launch/prepare.py shows documents and the audit, and refuses wrong input."""

import json
import os
import subprocess
import sys

import pytest

from pipeline.data.dataset.reader import open_split
from pipeline.train.status import RunStatus
from tests import ROOT
from tests.commands import Command
from tests.messages import assert_mentions

pytestmark = pytest.mark.tensor


def prepare(*arguments):
    """Exit code, standard output and standard error of launch/prepare.py."""
    with Command("launch/prepare.py", *arguments) as command:
        code, _ = command.wait_for_end()
        return code, *command.outputs[0]


def test_prepare_shows_documents_and_the_audit_and_refuses_bad_rows_and_folders(run):
    settings = run.settings().model_dump(include={"model", "train_data", "output_dir"})
    run_file = run.folder / "run.yaml"
    run_file.write_text(json.dumps(settings))

    code, printed, errors = prepare(run_file, "--show", "2")
    assert code == 0, errors
    assert "<|im_start|>assistant\n[[yes 0<|im_end|>]]\n" in printed
    assert printed.count("[[") == 3  # the second document has two answers
    assert "rows read" in printed
    assert "(max_length)" not in printed  # no document is longer
    code, printed, errors = prepare(run_file, "max_length=40", "max_rejected=1")
    assert code == 0, errors
    assert_mentions(printed, "more than 40 tokens", "truncated", "keeps 100 %", "GiB a rank")
    run.append("{")
    code, _, errors = prepare(run_file, "max_rejected=0")
    assert code == 2
    assert_mentions(errors, f"{run.train}:25", "max_rejected")
    assert "Traceback" not in errors
    for place in ("/proc/x", str(run.train), str(run.train / "below")):
        code, _, errors = prepare(run_file, f"output_dir={place}")
        assert code == 2
        assert_mentions(errors, "output_dir", place)


def test_preparing_data_does_not_import_torch(run):
    """The import takes seconds of CPU time, and minutes on an overloaded machine."""
    run_file = run.folder / "run.yaml"
    values = run.settings().model_dump(include={"model", "train_data", "output_dir"})
    run_file.write_text(json.dumps(values))
    command = [sys.executable, "-X", "importtime", ROOT / "launch/prepare.py", run_file]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": ROOT}
    )
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "transformers" in imported
    assert "torch" not in imported


def test_the_data_of_a_running_run_is_not_replaced(run):
    status = RunStatus(run.folder / "run" / "status.json")
    first = run.prepare()
    status.take_ownership()
    status.write_start()
    run_file = run.folder / "run.yaml"
    run_file.write_text(json.dumps(run.settings().model_dump(include={"model", "output_dir"})))
    changes = (f"train_data={run.train}", "max_length=99")
    code, _, errors = prepare(run_file, *changes)
    assert code == 2
    assert_mentions(errors, run.folder / "run", os.getpid())
    assert len(open_split(first.train)) == 24
    status.end("done", 0, None)
    code, _, errors = prepare(run_file, *changes)
    assert code == 0, errors
    assert not first.train.folder.exists()
