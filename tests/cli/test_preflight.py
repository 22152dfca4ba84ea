"""Preflight on two ranks: processes with the environment variables of a launcher."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests import ROOT
from tests.commands import Command, free_port, variables_of_ranks
from tests.hosts import TwoHosts, reason_unavailable
from tests.messages import assert_mentions
from tests.tiny import make_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
# Runs the preflight of one rank. Arguments: the run file, the time limit of the preflight in
# seconds, and the fault of the rank, which happens at its first measured operation: hang, die or
# none.
FAULTY_PREFLIGHT = """
import os, signal, sys, time
from pathlib import Path
from pipeline.cluster.exits import run_main
from pipeline.preflight import rates, stages
if sys.argv[3] == "hang":
    rates._median_seconds = lambda work, device: time.sleep(600)
if sys.argv[3] == "die":
    rates._median_seconds = lambda work, device: os.kill(os.getpid(), signal.SIGKILL)
run_main(lambda: stages.check_run(Path(sys.argv[1]), [], limit_s=float(sys.argv[2])))
"""
# Runs the script in its arguments, so that a rank waits 1 s instead of 10 s for the file that a
# rank on another host writes to the shared disk.
WITH_SHORT_WAIT = """
import runpy, sys
from pipeline.preflight import host
host._VISIBLE_WITHIN_S = 1.0
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def run_file(tmp_path, tiny_model) -> Path:
    """The run file of a small run."""
    make_rows(tmp_path / "train.jsonl")
    values = {
        "model": str(tiny_model), "train_data": str(tmp_path / "train.jsonl"),
        "output_dir": str(tmp_path / "runs/first"), "lora_r": 4, "max_length": 128,
        "global_batch_size": 4, "batch_size": 1, "bf16": False, "fp16": False,
    }  # fmt: skip
    path = tmp_path / "RUN.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class Ranks:
    """Two ranks on one machine; the commands of the ranks may differ."""

    def __init__(self) -> None:
        self._variables = variables_of_ranks(2)
        self._commands: list[Command] = []

    def start(self, *command: str | Path) -> None:
        """Start the next rank."""
        variables = self._variables[len(self._commands)]
        self._commands.append(Command(*command, variables=[variables]))

    def wait_for_end(self) -> list[tuple[int, str, str]]:
        """Wait for the ranks; exit code, standard output and standard error of each."""
        try:
            return [
                (command.wait_for_end(within_s=200)[0], *command.outputs[0])
                for command in self._commands
            ]
        finally:
            for command in self._commands:
                command.kill()


class RanksOnHosts:
    """Two ranks, each on its own emulated host."""

    def __init__(self, hosts: TwoHosts) -> None:
        self._hosts, self._port = hosts, free_port()
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, *command: str | Path, through: Sequence[str] = ()) -> None:
        """Start the next rank; `through`: words before its command, such as `unshare ...`."""
        rank = len(self._processes)
        placement = {
            "RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_SIZE": 1,
            "MASTER_ADDR": self._hosts.addresses[0], "MASTER_PORT": self._port,
            "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        command_line = [*through, sys.executable, *map(str, command)]
        process = subprocess.Popen(
            self._hosts.command(rank, *command_line),
            cwd=ROOT, env=os.environ | {key: str(value) for key, value in placement.items()},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._processes.append(process)

    def wait_for_end(self) -> list[tuple[int, str, str]]:
        """Wait for the ranks; exit code, standard output and standard error of each."""
        try:
            outputs = [process.communicate(timeout=200) for process in self._processes]
        finally:
            for process in self._processes:
                process.kill()
        return [
            (process.returncode, *output)
            for process, output in zip(self._processes, outputs, strict=True)
        ]


def test_two_ranks_of_a_valid_run_pass_and_leave_no_files(run_file, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    ranks = Ranks()
    # DeepSpeed's launcher adds --local_rank.
    command = ["launch/preflight.py", "--local_rank=0", run_file, "load_in_4bit=true", "--json"]
    ranks.start(*command)
    ranks.start(*command)
    (code, out, errors), (code_1, out_1, _) = ranks.wait_for_end()
    assert (code, code_1, out_1) == (0, 0, ""), errors
    report = json.loads(out)
    levels = {finding["check"]: finding["level"] for finding in report["findings"]}
    assert "fail" not in levels.values(), out
    for name in ("4 bits", "rows", "run folder", "process group", "all-reduce", "links"):
        assert name in levels
    assert set(report["not_checked"]) == {"drivers", "gpu memory"}
    assert len(report["hosts"]) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_rank_with_other_settings_is_reported(run_file):
    ranks = Ranks()
    ranks.start("launch/preflight.py", run_file)
    ranks.start("launch/preflight.py", run_file, "seed=7", "lora_r=nine")
    (code, out, _), (code_1, *_) = ranks.wait_for_end()
    assert (code, code_1) == (2, 2)
    assert_mentions(out, "rank 1", "found 'nine'")
    # One line lists the checks, such as that of the clocks, that rank 1 cannot run without
    # settings.
    (skipped,) = [line for line in out.splitlines() if line.endswith("settings failed")]
    assert "clock" in skipped


def preflight_with_fault(run_file, fault, limit_s):
    """Run the preflight with a fault of rank 1.

    Returns the exit codes of both ranks, the line of the failed check, and the whole report.
    """
    ranks = Ranks()
    ranks.start("-c", FAULTY_PREFLIGHT, run_file, limit_s, "none")
    ranks.start("-c", FAULTY_PREFLIGHT, run_file, limit_s, fault)
    (code, out, _), (code_1, *_) = ranks.wait_for_end()
    (line,) = [line for line in out.splitlines() if line.startswith("fail")]
    return code, code_1, line, out


def test_a_rank_that_hangs_is_reported_with_its_check_and_earlier_results(run_file):
    code, code_1, line, out = preflight_with_fault(run_file, "hang", "12")
    assert (code, code_1) == (1, 1), out
    assert_mentions(line, "watchdog", "rank 1", "matrix product", socket.gethostname())
    assert "ok    libraries " in out


def test_a_rank_that_dies_is_reported_with_earlier_results(run_file):
    code, code_1, line, out = preflight_with_fault(run_file, "die", "100")
    assert (code, code_1) == (1, -signal.SIGKILL), out
    assert_mentions(line, "watchdog", "rank 1")
    assert "ok    libraries " in out


def test_a_missing_rank_is_reported_at_the_rendezvous(run_file):
    ranks = Ranks()
    ranks.start("-c", FAULTY_PREFLIGHT, run_file, "2", "none")  # rank 1 is never started
    ((code, out, errors),) = ranks.wait_for_end()
    assert code == 1, errors
    (line,) = [line for line in out.splitlines() if line.startswith("fail")]
    assert_mentions(line, "rendezvous", "not all ranks", "ranks 0")
    assert "ok    model " in out  # results of rank 0 itself


def test_a_host_without_the_shared_disk_is_reported(run_file, tmp_path):
    if (reason := reason_unavailable()) is not None:
        pytest.skip(reason)
    shared = tmp_path / "runs"
    shared.mkdir()
    # In its own mount namespace, rank 1 has another, empty file system at `shared`.
    mount_and_run = 'mount -t tmpfs none "$0" && exec "$@"'
    separate_disk = ["unshare", "--mount", "sh", "-c", mount_and_run, str(shared)]
    with TwoHosts() as hosts:
        ranks = RanksOnHosts(hosts)
        command = ["-c", WITH_SHORT_WAIT, "launch/preflight.py", run_file]
        ranks.start(*command, "--json")
        ranks.start(*command, through=separate_disk)
        (code, out, errors), (code_1, *_) = ranks.wait_for_end()
    assert (code, code_1) == (2, 2), errors
    findings = {finding["check"]: finding for finding in json.loads(out)["findings"]}
    failed = [name for name, finding in findings.items() if finding["level"] == "fail"]
    assert failed == ["run folder"]
    assert findings["run folder"]["ranks"] == [1]
    assert_mentions(findings["run folder"]["text"], "host-b")
    assert_mentions(findings["ranks"]["text"], "2 ranks", "host-a", "host-b")
    assert_mentions(findings["network"]["text"], "cable")  # the interface between the two hosts
    assert_mentions(findings["links"]["text"], "between nodes")


def test_training_refuses_ranks_that_differ_before_it_loads_a_model(run_file, tmp_path):
    ranks = Ranks()
    ranks.start("launch/train.py", run_file)
    ranks.start("launch/train.py", run_file, "seed=7")  # the default is 42
    (code, out, errors), (code_1, *_) = ranks.wait_for_end()
    assert (code, code_1) == (2, 2)
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if " seed " in line]
    assert "42" in line
    assert_mentions(errors, "rank 0", "rank 1")
    assert len(out.splitlines()) == 1  # only the progress of the comparison
    assert not (tmp_path / "runs").exists()
