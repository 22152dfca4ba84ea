"""A real Slurm of two nodes on this machine, and the jobs on it."""

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
DEADLINE_S = 420.0


def reason_unavailable() -> str | None:
    """Why Slurm cannot run here, or None; installs Debian's packages where they are missing.

    A policy-rc.d keeps apt from starting the packages' own services.
    """
    if os.geteuid() != 0:
        return "needs root, for namespaces and munge"
    spaces = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"]
    if subprocess.run(spaces, check=False, capture_output=True).returncode:
        return "needs namespaces, which this machine or container forbids"
    if all(shutil.which(name) for name in PROGRAMS):
        return None
    if shutil.which("apt-get") is None:
        return f"needs {', '.join(PROGRAMS)}, and there is no apt-get to install Debian's packages"
    policy = Path("/usr/sbin/policy-rc.d")
    is_ours = not policy.exists()
    if is_ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True}
        subprocess.run(["apt-get", "update", "-q"], check=False, **quiet)
        install = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *PACKAGES]
        done = subprocess.run(install, check=False, text=True, **quiet)
    finally:
        if is_ours:
            policy.unlink()
    return None if done.returncode == 0 else f"apt-get: {done.stderr.strip().splitlines()[-1]}"


@dataclass
class Cluster:
    """A Slurm in namespaces. `stop` ends all its processes, and so does any end of this process."""

    folder: Path
    process: subprocess.Popen = field(init=False)

    def start(self) -> None:
        """Start it; raises AssertionError with the logs where it does not answer."""
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
        """Kill process 1 of the login node, and with it all others."""
        self.process.kill()
        self.process.wait(10)

    def logs(self) -> str:
        """The ends of all its logs."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{file}\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def run(self, *command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
        """Run a command on the login node, with this Python's environment active."""
        (login,) = psutil.Process(self.process.pid).children()
        mine = {
            "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
            "PYTHONPATH": str(ROOT), "SLURM_CONF": str(self.folder / "slurm.conf"),
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run(
            ["nsenter", "--target", str(login.pid), "--all", f"--wd={cwd}", "--", *command],
            env=mine | environment, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def on_node(self, node: str, *command: str | Path) -> str:
        """Run a command on a node, outside Slurm."""
        pid = (self.folder / f"{node}.pid").read_text().strip()
        return self.run("nsenter", "--target", pid, "--all", "--", *command)

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL to the node's daemon; the processes that it started live on."""
        pid = (self.folder / f"spool/{node}/slurmd.pid").read_text().strip()
        self.on_node(node, "kill", "-KILL", pid)

    def reboot(self, node: str) -> None:
        """Kill all processes of a node and start its daemon.

        Without the kill, Slurm 22.05 ends the old ranks by the id of their step, which the job's
        next start on the node has too: it was seen to end that one.
        """
        self.on_node(node, "bash", "-c", "kill -KILL -1")  # all but process 1 and itself
        self.on_node(node, "slurmd", "-N", node, "-f", self.folder / "slurm.conf")

    def sbatch(self, folder: Path, *words: str | Path, **environment: str) -> "Job":
        """Submit from a folder; the words are sbatch's own flags, the script and its words."""
        number = self.run("sbatch", "--parsable", *words, cwd=folder, **environment)
        return Job(self, number, folder)


@dataclass
class Job:
    """A submitted job, or one task of an array."""

    cluster: Cluster
    number: str
    folder: Path  # where it was submitted
    held: float = 0.0  # start time of the run that `hold` stopped last

    def show(self, name: str) -> str:
        """A field of its record."""
        record = self.cluster.run("scontrol", "show", "job", self.number)
        found = re.search(rf"^.*\b{name}=(\S+)", record, re.MULTILINE)
        assert found is not None, record
        return found[1]

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
        """The ranks' processes, with the process ids of this machine."""
        found, mine = {}, self.show("JobId")
        for process in psutil.process_iter(["cmdline"]):
            if "pipeline.cli.train" not in (process.info["cmdline"] or []):
                continue
            try:
                seen = process.environ()
            except psutil.Error:
                continue
            is_python = "python" in Path(process.info["cmdline"][0]).name
            if is_python and seen.get("SLURM_JOB_ID") == mine and "SLURM_PROCID" in seen:
                found[int(seen["SLURM_PROCID"])] = process
        return found

    def hold(self, run: Path, rank: int, step: int) -> psutil.Process:
        """Stop a rank once this start has made a step: the others wait for it in the middle."""

        def is_there() -> bool:
            found = status(run)
            is_new = found.get("state") == "running" and found["started"] > self.held
            return is_new and found["step"] >= step

        wait_until(is_there, f"step {step}", self.tell, poll_s=0.01)
        process = self.ranks()[rank]
        process.send_signal(signal.SIGSTOP)
        self.held = status(run)["started"]
        return process

    def limit(self, minutes: int) -> None:
        """Change its time limit, which counts from when it started."""
        update = ["scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}"]
        self.cluster.run(*update)

    def end(self, state: str, within_s: float = DEADLINE_S) -> None:
        """Wait until it has ended, and require its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.show("JobState") in over, "end", self.tell, within_s)
        assert self.show("JobState") == state, self.tell()

    def tell(self) -> str:
        """Record, output and logs, for the message of a failure."""
        record = self.cluster.run("scontrol", "show", "job", self.number)
        logs = [
            f"{path}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob(f"**/logs/{self.number}/*/*.log"))
        ]
        return "\n".join([record, self.output, *logs])


def status(run: Path) -> dict[str, Any]:
    """status.json, or nothing where there is none."""
    try:
        return json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def wait_until(
    claim: Callable[[], object],
    what: str,
    tell: Callable[[], str],
    within_s: float = DEADLINE_S,
    *,
    poll_s: float = 0.5,
) -> None:
    """Poll until the claim holds; AssertionError with the text of `tell` where it never does."""
    deadline = time.monotonic() + within_s
    while not claim():
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what} in {within_s:.0f} s\n{tell()}")
        time.sleep(poll_s)
