"""A real Slurm with two emulated nodes on this machine, and its jobs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests import ROOT

BIN = Path(sys.executable).parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
DEADLINE_S = 420.0  # for a state of a job


def reason_unavailable() -> str | None:
    """Reason why Slurm cannot run here, or None; installs Debian's packages if they are missing.

    A policy-rc.d keeps apt from starting the packages' own services.
    """
    if os.geteuid() != 0:
        return "needs root, for namespaces and munge"
    in_namespaces = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"]
    if subprocess.run(in_namespaces, check=False, capture_output=True).returncode:
        return "needs namespaces, which this machine or container forbids"
    if all(shutil.which(name) for name in PROGRAMS):
        return None
    if shutil.which("apt-get") is None:
        return f"needs {', '.join(PROGRAMS)}, and there is no apt-get to install Debian's packages"
    policy = Path("/usr/sbin/policy-rc.d")
    is_policy_added = not policy.exists()
    if is_policy_added:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True}
        subprocess.run(["apt-get", "update", "-q"], check=False, **quiet)
        install = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *PACKAGES]
        done = subprocess.run(install, check=False, text=True, **quiet)
    finally:
        if is_policy_added:
            policy.unlink()
    return None if done.returncode == 0 else f"apt-get: {done.stderr.strip().splitlines()[-1]}"


@dataclass
class Cluster:
    """A Slurm in namespaces; all its processes end with `stop` or with this process."""

    folder: Path
    process: subprocess.Popen = field(init=False)

    def start(self) -> None:
        """Start Slurm; raises AssertionError with the logs if it does not answer."""
        with (self.folder / "cluster.log").open("w") as log:
            self.process = subprocess.Popen(
                [
                    "setpriv", "--pdeathsig", "KILL",
                    "unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork",
                    "--kill-child", "--mount-proc",
                    "bash", ROOT / "tests/slurm/cluster.sh", self.folder,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        wait_until((self.folder / "ready").exists, "Slurm", self.logs, 60.0, poll_s=0.1)

    def stop(self) -> None:
        """Kill process 1 of the login node, and so all processes of its namespace."""
        self.process.kill()
        self.process.wait(10)

    def logs(self) -> str:
        """The last 2000 characters of each log."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{file}\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def run(self, *command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
        """Run a command on the login node, with this Python's environment active."""
        (login,) = psutil.Process(self.process.pid).children()
        login_environment = {
            "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
            "PYTHONPATH": str(ROOT), "SLURM_CONF": str(self.folder / "slurm.conf"),
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run(
            ["nsenter", "--target", str(login.pid), "--all", f"--wd={cwd}", "--", *command],
            env=login_environment | environment,
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def on_node(self, node: str, *command: str | Path) -> str:
        """Run a command on a node, outside Slurm."""
        pid = (self.folder / f"{node}.pid").read_text().strip()
        return self.run("nsenter", "--target", pid, "--all", "--", *command)

    def kill_slurmd(self, node: str) -> None:
        """Send SIGKILL to the node's slurmd; the processes that it started keep running."""
        pid = (self.folder / f"spool/{node}/slurmd.pid").read_text().strip()
        self.on_node(node, "kill", "-KILL", pid)

    def reboot(self, node: str) -> None:
        """Kill all processes of a node and start its daemon.

        Without the kill, Slurm 22.05 kills the old ranks later by their step id. By then the job
        may have started again on this node with the same step id, and Slurm would kill the new
        ranks.
        """
        self.on_node(node, "bash", "-c", "kill -KILL -1")  # all but process 1 and itself
        self.on_node(node, "slurmd", "-N", node, "-f", self.folder / "slurm.conf")

    def sbatch(self, folder: Path, *words: str | Path, **environment: str) -> "Job":
        """Submit from a folder; `words` are sbatch's options, the script and its arguments."""
        number = self.run("sbatch", "--parsable", *words, cwd=folder, **environment)
        return Job(self, number, folder)


@dataclass
class Job:
    """A submitted job, or one task of an array."""

    cluster: Cluster
    number: str
    folder: Path  # from which it was submitted
    last_started: float = 0.0  # `started` in status.json when `stop_rank` last stopped a rank

    def show(self, name: str) -> str:
        """A field of the job's record in Slurm."""
        record = self.cluster.run("scontrol", "show", "job", self.number)
        match = re.search(rf"^.*\b{name}=(\S+)", record, re.MULTILINE)
        assert match is not None, record
        return match[1]

    @property
    def output(self) -> str:
        """The text of the job's own output file."""
        record = self.cluster.run("scontrol", "show", "job", self.number)
        path = Path(record.split("StdOut=")[1].splitlines()[0])
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def restarts(self) -> int:
        return int(self.show("Restarts"))

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the ranks, as seen from this machine."""
        ranks, job_id = {}, self.show("JobId")
        for process in psutil.process_iter(["cmdline"]):
            if "pipeline.cli.train" not in (process.info["cmdline"] or []):
                continue
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            is_python = "python" in Path(process.info["cmdline"][0]).name
            if (
                is_python
                and environment.get("SLURM_JOB_ID") == job_id
                and "SLURM_PROCID" in environment
            ):
                ranks[int(environment["SLURM_PROCID"])] = process
        return ranks

    def stop_rank(self, run: Path, rank: int, step: int) -> psutil.Process:
        """Stop a rank with SIGSTOP when the run reaches a step; returns the process of the rank.

        The other ranks then wait for this rank. A second call waits until the run was started
        again.
        """

        def has_reached_step() -> bool:
            current = status(run)
            is_new = current.get("state") == "running" and current["started"] > self.last_started
            return is_new and current["step"] >= step

        wait_until(has_reached_step, f"step {step}", self.diagnosis, poll_s=0.01)
        process = self.ranks()[rank]
        process.send_signal(signal.SIGSTOP)
        self.last_started = status(run)["started"]
        return process

    def set_time_limit(self, minutes: int) -> None:
        """Change the time limit of the job, in minutes from its start."""
        update = ["scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}"]
        self.cluster.run(*update)

    def wait_for_end(self, state: str, within_s: float = DEADLINE_S) -> None:
        """Wait for the end of the job, and assert its state."""
        final_states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.show("JobState") in final_states, "end", self.diagnosis, within_s)
        assert self.show("JobState") == state, self.diagnosis()

    def diagnosis(self) -> str:
        """Record, output and logs of the job, for the message of a failed assertion."""
        record = self.cluster.run("scontrol", "show", "job", self.number)
        logs = [
            f"{path}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob(f"**/logs/{self.number}/*/*.log"))
        ]
        return "\n".join([record, self.output, *logs])


def status(run: Path) -> dict[str, Any]:
    """status.json; empty if it is missing or incomplete."""
    try:
        return json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def wait_until(
    condition: Callable[[], object],
    name: str,
    diagnosis: Callable[[], str],
    within_s: float = DEADLINE_S,
    *,
    poll_s: float = 0.5,
) -> None:
    """Poll until the condition holds; AssertionError with the diagnosis at the deadline."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"no {name} in {within_s:.0f} s\n{diagnosis()}")
        time.sleep(poll_s)
