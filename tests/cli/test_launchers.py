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
BIN = Path(sys.executable).parent  # has the commands torchrun, accelerate and mpirun
TRAIN = "launch/train.py"
# In the test of a network failure: the setting hang_timeout_s, and the time after it in which both
# hosts must have ended with a report of the hang.
HANG_S = 15
REPORT_S = 30
SETTINGS = {
    "lora_r": 4, "lora_dropout": 0.1, "lr": 5e-3, "epochs": 4, "global_batch_size": 4,
    "batch_size": 1, "max_length": 128, "save_steps": 3, "logging_steps": 1, "bf16": False,
    "fp16": False, "zero_stage": 2,
}  # fmt: skip
ADAPTER = "adapter/adapter_model.safetensors"
# The command `deepspeed`. It runs in a forked process (tests/commands.py), but the training
# processes that it starts are new interpreters.
DEEPSPEED = ("-m", "deepspeed.launcher.runner")
# DeepSpeed takes ranks from mpi4py if it can be imported. In a fork, this code makes mpi4py
# unimportable and then runs the script that its arguments name.
RUN_WITHOUT_MPI4PY = """
import runpy, sys
sys.modules["mpi4py"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Content of a mpi4py.py that does the same for new interpreters, which find it on PYTHONPATH.
MISSING_MPI4PY = "raise ModuleNotFoundError(\"No module named 'mpi4py'\", name='mpi4py')\n"

# Replaces pdsh, which DeepSpeed calls as `pdsh -w HOST,HOST COMMAND`. For each host it runs COMMAND
# on this machine, with a minimal environment as after ssh, and with %n replaced by the host's
# number.
PDSH = """#!{python}
import os, subprocess, sys
hosts_index = sys.argv.index("-w") + 1
line = " ".join(sys.argv[hosts_index + 1:])
minimal = {{name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS")}}
hosts = [
    subprocess.Popen(["sh", "-c", line.replace("%n", str(number))], env=minimal)
    for number, _ in enumerate(sys.argv[hosts_index].split(","))
]
sys.exit(max(host.wait() for host in hosts))
"""


class Workspace:
    """A folder with the training data and the runs of all tests of this file.

    `without_mpi`: environment variables with which mpi4py cannot be imported.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        make_rows(folder / "train.jsonl")
        (folder / "without_mpi").mkdir()
        (folder / "without_mpi/mpi4py.py").write_text(MISSING_MPI4PY)
        self.without_mpi = {"PYTHONPATH": f"{folder / 'without_mpi'}:{ROOT}"}

    def run_file(self, name: str, **settings) -> Path:
        """Write NAME.yaml, the run file of a run of 24 steps in the folder NAME."""
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
    """The adapter of two forked ranks, with which the adapters of all launchers are compared.

    tests/faults compares forked ranks with those of DeepSpeed's launcher on one machine.
    """
    code, output = run(TRAIN, workspace.run_file("forked"), ranks=2)
    assert code == 0, output
    return workspace.adapter("forked")


def master_options() -> list[str]:
    return ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]


def start(
    command: Sequence[str], *arguments: str | Path, **environment: str
) -> subprocess.Popen[str]:
    """Start a launcher as a new process, without variables of another launcher."""
    launcher_names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in launcher_names and not name.startswith(("SLURM_", "OMPI_", "PMI"))
    }
    own = {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return subprocess.Popen(
        [*command, *(str(argument) for argument in arguments)],
        cwd=ROOT,
        env=inherited | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end_all(*processes: subprocess.Popen[str], within_s: float = 240) -> list[tuple[int, str]]:
    """Wait for all processes; return the exit code and output of each."""
    deadline = time.monotonic() + within_s
    try:
        outputs = [p.communicate(timeout=deadline - time.monotonic())[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def assert_succeeds(process: subprocess.Popen[str]) -> None:
    ((code, output),) = end_all(process)
    assert code == 0, output


def test_deepspeed_with_a_hostfile_gives_the_same_adapter(workspace, expected, tmp_path):
    pdsh = tmp_path / "pdsh"
    pdsh.write_text(PDSH.format(python=sys.executable))
    pdsh.chmod(pdsh.stat().st_mode | stat.S_IXUSR)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("host-a slots=1\nhost-b slots=1\n")
    command = (*DEEPSPEED, "--hostfile", hostfile, "--no_ssh_check", *master_options())
    path = f"{tmp_path}:{BIN}:{os.environ['PATH']}"  # finds the pdsh above
    code, output = run(*command, TRAIN, workspace.run_file("hostfile"), PATH=path)
    assert code == 0, output
    assert "2 nodes of 1 x" in output, output  # the plan's line about the run
    assert workspace.adapter("hostfile") == expected


def test_deepspeed_on_each_machine_without_ssh_gives_the_same_adapter(
    workspace, expected, tmp_path
):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("host-a slots=1\nhost-b slots=1\n")
    run_file = workspace.run_file("no_ssh")
    arguments = ("--no_ssh", *master_options(), "--module", "pipeline.cli.train", run_file)
    commands = [
        Command(*DEEPSPEED, "--hostfile", hostfile, "--node_rank", node_rank, *arguments,
                variables=[workspace.without_mpi])
        for node_rank in ("0", "1")
    ]  # fmt: skip
    for command in commands:
        with command:
            code, output = command.wait_for_end()
        assert code == 0, output
    assert workspace.adapter("no_ssh") == expected


def test_torchrun_gives_the_same_adapter(workspace, expected):
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    run_file = workspace.run_file("torchrun")
    assert_succeeds(start(command, TRAIN, run_file, **workspace.without_mpi))
    assert workspace.adapter("torchrun") == expected


def test_accelerate_gives_the_same_adapter(workspace, expected):
    command = [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", str(free_port())]
    # A user's configuration of accelerate would be in HF_HOME.
    without_config = {"HF_HOME": str(workspace.folder / "no_accelerate_config")}
    run_file = workspace.run_file("accelerate")
    assert_succeeds(start(command, TRAIN, run_file, **without_config))
    assert workspace.adapter("accelerate") == expected


def test_pods_of_a_pytorchjob_give_the_same_adapter(workspace, expected):
    """One process for each pod, with the variables that Kubeflow's training operator sets."""
    common = {
        "WORLD_SIZE": "2", "MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1",
        "KUBERNETES_SERVICE_HOST": "10.0.0.1", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto",
    }  # fmt: skip
    pods = [common | {"RANK": pod, "PET_NODE_RANK": pod} for pod in ("0", "1")]
    with Command(TRAIN, workspace.run_file("pods"), variables=pods) as command:
        code, output = command.wait_for_end()
    assert code == 0, output
    assert workspace.adapter("pods") == expected


def test_srun_gives_the_same_adapter(workspace, expected):
    """With Slurm's variables of two tasks on two nodes; tests/slurm has a real srun."""
    tasks = [variables_of_srun(task, str(os.getpid())) for task in (0, 1)]
    with Command(
        "-c", RUN_WITHOUT_MPI4PY, TRAIN, workspace.run_file("srun"), variables=tasks
    ) as command:
        code, output = command.wait_for_end()
    assert code == 0, output
    assert workspace.adapter("srun") == expected


def variables_of_srun(task: int, job: str) -> dict[str, str]:
    """Variables of one of two tasks, each on a node of its own."""
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
    assert_succeeds(start(command, TRAIN, workspace.run_file("mpirun"), **as_root))
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
        wait_for_step(folder, 5, running)  # after the checkpoint of step 3
        hosts.disconnect()
        (code_a, output_a), (code_b, output_b) = end_all(*running, within_s=HANG_S + REPORT_S)
    assert (code_a, code_b) == (1, 1), output_a + output_b  # torchrun's exit code
    assert_mentions(output_a, f"{HANG_S} s", "rank 1 on host-b hangs", "disconnected")
    assert_mentions(output_b, f"{HANG_S} s", "rank 0 on host-a does not answer", "rank 1")
    assert read_status(folder / "status.json")["state"] == "failed"
    assert not (folder / ADAPTER).exists()
    code, output = run(TRAIN, run_file, ranks=2)  # the same command again
    assert code == 0, output
    assert_mentions(output, "resuming from step")
    assert workspace.adapter("network") == expected


def wait_for_step(folder: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    """Wait until a run has recorded this step in metrics.jsonl."""
    deadline = time.monotonic() + 120
    while len(read_metrics(folder / "metrics.jsonl")) < step:
        assert all(process.poll() is None for process in processes), end_all(*processes)
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.005)
