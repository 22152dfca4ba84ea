"""After Ctrl-C, the command that starts DeepSpeed's launcher waits for the ranks, silently."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import ROOT
from tests.commands import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200)]

# A rank that takes a second to stop, like one that writes a checkpoint.
RANK = """
import os, signal, sys, time
def stop(number, frame):
    time.sleep(1)
    print("rank", os.environ["RANK"], "stopped", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # DeepSpeed's launcher sends it a moment later
signal.signal(signal.SIGINT, stop)
print("rank", os.environ["RANK"], "runs", flush=True)
time.sleep(100)
"""


def test_ctrl_c_gives_no_traceback_and_the_command_ends_after_its_ranks(tmp_path):
    script, log = tmp_path / "rank.py", tmp_path / "log"
    script.write_text(RANK)
    with log.open("w") as output:
        command = subprocess.Popen(
            [
                sys.executable, "-m", "pipeline.cluster.deepspeed_command", "--quiet",
                "--num_accelerators", "2", "--master_port", str(free_port()), script,
            ],
            env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        while log.read_text().count("runs") < 2:
            assert command.poll() is None, log.read_text()
            time.sleep(0.05)
        os.killpg(command.pid, signal.SIGINT)  # as a terminal does
        assert command.wait(60) == 128 + signal.SIGINT, log.read_text()
    finally:
        command.kill()
    after_start = [line for line in log.read_text().splitlines() if "runs" not in line]
    assert sorted(after_start) == ["rank 0 stopped", "rank 1 stopped"]
