"""A run on two CPU ranks gives the same adapter, bit for bit, under every launcher."""

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from pipeline.train.metrics import read_metrics
from pipeline.train.status import read_status
from tests import ROOT
from tests.commands import Command, free_port, run
from tests.hosts import TwoHosts, reason_unavailable
from tests.messages import assert_mentions
from tests.tiny import make_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
BIN = Path(sys.executable).parent
TRAIN = "launch/train.py"
HANG_S = 15
# Both hosts must report the hang within this time after hang_timeout_s.
REPORT_S = 30
SETTINGS = {
    "lora_r": 4, "lora_dropout": 0.1, "lr": 5e-3, "epochs": 4, "global_batch_size": 4,
    "batch_size": 1, "max_length": 128, "save_steps": 3, "logging_steps": 1, "bf16": False,
    "fp16": False, "zero_stage": 2,
}  # fmt: skip
ADAPTER = "adapter/adapter_model.safetensors"
# The command `deepspeed`. A fork runs it; the processes that it starts are real.
DEEPSPEED = ("-m", "deepspeed.launcher.runner")
# Runs the script in its arguments in a forked process in which mpi4py cannot be imported.
WITHOUT_MPI = """
import runpy, sys
sys.modules["mpi4py"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NO_MPI4PY = "raise ModuleNotFoundError(\"No module named 'mpi4py'\", name='mpi4py')\n"

# Replaces pdsh and ssh: runs the command for each host with a minimal environment.
PDSH = """#!{python}
import os, subprocess, sys
at = sys.argv.index("-w") + 1
line = " ".join(sys.argv[at + 1:])
minimal = {{name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS")}}
hosts = [
    subprocess.Popen(["sh", "-c", line.replace("%n", str(number))], env=minimal)
    for number, _ in enumerate(sys.argv[at].split(","))
]
sys.exit(max(host.wait() for host in hosts))
"""


class Workspace:
    """A folder with the training data and the runs of all tests of this file."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        make_rows(folder / "train.jsonl")
        (folder / "without_mpi").mkdir()
        (folder / "without_mpi/mpi4py.py").write_text(NO_MPI4PY)
        # First on the path, so that mpi4py seems not to be installed.
        self.without_mpi = {"PYTHONPATH": f"{folder / 'without_mpi'}:{ROOT}"}

    def run_file(self, name: str, **settings) -> Path:
        """Write the run file of a run of 24 steps; `name` is also its run folder."""
        paths = {
            "model": str(self.model),
            "train_data": str(self.folder / "train.jsonl"),
            "output_dir": str(self.folder / name),
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(paths | SETTINGS | settings))
        return path

    def adapter(self, name: str) -> bytes:
        return (self.folder / name / ADAPTER).read_bytes()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_model) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("launchers"), tiny_model)


@pytest.fixture(scope="module")
def expected(workspace) -> bytes:
    """The adapter of two ranks without a launcher.

    tests/faults compares such ranks with those of DeepSpeed's launcher on one machine.
    """
    code, output = run(TRAIN, workspace.run_file("alone"), ranks=2)
    assert code == 0, output
    return workspace.adapter("alone")


def master_options() -> list[str]:
    return ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]


def start(
    command: Sequence[str], *arguments: str | Path, **environment: str
) -> subprocess.Popen[str]:
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in launchers and not name.startswith(("SLURM_", "OMPI_", "PMI"))
    }
    here = {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return subprocess.Popen(
        [*command, *(str(argument) for argument in arguments)],
        cwd=ROOT,
        env=clean | here | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end_all(*processes: subprocess.Popen[str], within_s: float = 240) -> list[tuple[int, str]]:
    """Wait for all; exit code and output of each."""
    deadline = time.monotonic() + within_s
    try:
        outputs = [p.communicate(timeout=deadline - time.monotonic())[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def finish(*processes: subprocess.Popen[str]) -> str:
    """Wait for all, assert that they succeeded, and return their output."""
    ended = end_all(*processes)
    assert [code for code, _ in ended] == [0] * len(processes), ended
    return "".join(output for _, output in ended)


def test_deepspeed_with_a_hostfile_gives_the_same_adapter(workspace, expected, tmp_path):
    pdsh = tmp_path / "pdsh"
    pdsh.write_text(PDSH.format(python=sys.executable))
    pdsh.chmod(pdsh.stat().st_mode | stat.S_IXUSR)
    hosts = tmp_path / "hosts"
    hosts.write_text("host-a slots=1\nhost-b slots=1\n")
    command = (*DEEPSPEED, "--hostfile", hosts, "--no_ssh_check", *master_options())
    path = f"{tmp_path}:{BIN}:{os.environ['PATH']}"
    code, output = run(*command, TRAIN, workspace.run_file("hostfile"), PATH=path)
    assert code == 0, output
    assert "2 nodes" in output or "2 x 1 x CPU" in output, output
    assert workspace.adapter("hostfile") == expected


def test_deepspeed_on_each_machine_without_ssh_gives_the_same_adapter(
    workspace, expected, tmp_path
):
    hosts = tmp_path / "hosts"
    hosts.write_text("host-a slots=1\nhost-b slots=1\n")
    run_file, where = workspace.run_file("no_ssh"), master_options()
    arguments = ("--no_ssh", *where, "--module", "pipeline.cli.train", run_file)
    nodes = [
        Command(*DEEPSPEED, "--hostfile", hosts, "--node_rank", node, *arguments,
                variables=[workspace.without_mpi])
        for node in ("0", "1")
    ]  # fmt: skip
    for node in nodes:
        with node:
            code, output = node.end()
        assert code == 0, output
    assert workspace.adapter("no_ssh") == expected


def test_torchrun_gives_the_same_adapter(workspace, expected):
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    finish(start(command, TRAIN, workspace.run_file("torchrun"), **workspace.without_mpi))
    assert workspace.adapter("torchrun") == expected


def test_accelerate_gives_the_same_adapter(workspace, expected):
    command = [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    config = {"HF_HOME": str(workspace.folder / "no_accelerate_config")}
    finish(start([*command, "--main_process_port", str(free_port())], TRAIN,
                 workspace.run_file("accelerate"), **config))  # fmt: skip
    assert workspace.adapter("accelerate") == expected


def test_pods_of_a_pytorchjob_give_the_same_adapter(workspace, expected):
    """One process for each pod, with the variables that the operator sets."""
    common = {
        "WORLD_SIZE": "2", "MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1",
        "KUBERNETES_SERVICE_HOST": "10.0.0.1", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto",
    }  # fmt: skip
    pods = [common | {"RANK": pod, "PET_NODE_RANK": pod} for pod in ("0", "1")]
    with Command(TRAIN, workspace.run_file("pods"), variables=pods) as command:
        code, output = command.end()
    assert code == 0, output
    assert workspace.adapter("pods") == expected


def test_srun_gives_the_same_adapter(workspace, expected):
    """With Slurm's variables of two tasks on two nodes; tests/slurm has a real srun."""
    tasks = [variables_of_srun(task, str(os.getpid())) for task in (0, 1)]
    with Command("-c", WITHOUT_MPI, TRAIN, workspace.run_file("srun"), variables=tasks) as command:
        code, output = command.end()
    assert code == 0, output
    assert workspace.adapter("srun") == expected


def variables_of_srun(task: int, job: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
        "SLURM_PROCID": str(task), "SLURM_NODEID": str(task), "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "localhost,elsewhere",
    }  # fmt: skip


MPIRUN = shutil.which("mpirun", path=f"{BIN}:{os.environ['PATH']}")


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun here: pip install 'rankzero[mpi]'")
def test_mpirun_gives_the_same_adapter(workspace, expected):
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [MPIRUN, "-np", "2", sys.executable]
    finish(start(command, TRAIN, workspace.run_file("mpirun"), **as_root))
    assert workspace.adapter("mpirun") == expected


@pytest.mark.skipif(
    (reason := reason_unavailable()) is not None,
    reason=f"two hosts cannot be emulated here: {reason}",
)
def test_a_run_with_a_network_failure_names_both_hosts_and_resumes_bitwise(workspace, expected):
    run_file = workspace.run_file("network", hang_timeout_s=HANG_S)
    folder = workspace.folder / "network"
    with TwoHosts() as hosts:
        options = ["--master_addr", hosts.names[0], "--master_port", "29500"]
        torchrun = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", *options]
        running = [
            start(hosts.command(n, *torchrun, "--node_rank", str(n)), TRAIN, run_file)
            for n in (0, 1)
        ]
        wait_for_step(folder, 5, running)
        hosts.disconnect()
        (code_a, output_a), (code_b, output_b) = end_all(*running, within_s=HANG_S + REPORT_S)
    assert (code_a, code_b) == (1, 1), output_a + output_b  # torchrun's exit code
    assert_mentions(output_a, f"{HANG_S} s", "rank 1 on host-b hangs", "disconnected")
    assert_mentions(output_b, f"{HANG_S} s", "rank 0 on host-a does not answer", "rank 1")
    assert read_status(folder / "status.json")["state"] == "failed"
    assert not (folder / ADAPTER).exists()
    code, output = run(TRAIN, run_file, ranks=2)
    assert code == 0, output
    assert_mentions(output, "resuming from step")
    assert workspace.adapter("network") == expected


def wait_for_step(folder: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(folder / "metrics.jsonl")) < step:
        assert all(process.poll() is None for process in processes), end_all(*processes)
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.005)
