"""A run in a terminal that closes stops with a checkpoint."""

import json
import os
import pty
import select
import signal
import sys
import time

import pytest
import yaml

from tests.commands import ROOT
from tests.tiny import make_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200)]


def read_until(terminal: int, text: bytes) -> bytes:
    """Output of a terminal until it contains `text`."""
    output, deadline = b"", time.monotonic() + 120
    while text not in output:
        assert time.monotonic() < deadline, output
        if select.select([terminal], [], [], 1)[0]:
            output += os.read(terminal, 2**16)
    return output


def test_a_run_stops_with_a_checkpoint_when_its_terminal_closes(tmp_path, tiny_model):
    run_file, folder = tmp_path / "RUN.yaml", tmp_path / "run"
    settings = {
        "model": str(tiny_model), "train_data": str(make_rows(tmp_path / "train.jsonl")),
        "output_dir": str(folder), "max_length": 128, "lora_r": 4,
        "max_steps": 100_000,  # more than the test lasts
    }  # fmt: skip
    run_file.write_text(yaml.safe_dump(settings))
    pid, terminal = pty.fork()
    if pid == 0:
        # If this test runs under nohup, the process would inherit that SIGHUP is ignored.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "launch/train.py", str(run_file)])
    read_until(terminal, b"tokens/s")  # the display of progress, so training has begun
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75  # stopped, may be resumed
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert status["saved_step"] == status["step"]
    assert "SIGHUP" in status["reason"]
    assert (folder / f"checkpoints/step-{status['step']:08d}").is_dir()
