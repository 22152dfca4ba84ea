"""`rankzero` starts deepspeed on several GPUs, and writes the batch scripts of the package."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pipeline.cli import rankzero
from pipeline.cli.slurm import slurm
from tests import ROOT
from tests.messages import refused
from tests.nvml import gpus as gpus_of
from tests.nvml import make_nvml

pytestmark = pytest.mark.unit


class ProcessReplacedError(Exception):
    """Raised by the fake os.execv: another program replaces the process."""


@pytest.fixture
def rankzero_on(monkeypatch):
    """A function that calls `rankzero` with arguments on a machine with `gpus` emulated GPUs.

    It returns the command line that replaces the process (os.execv), or None if the verb itself was
    run with these arguments.
    """

    def call(gpus: int, *words: str, **environment: str) -> list[str] | None:
        devices = gpus_of(gpus)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(sys.modules, "pynvml", make_nvml(devices))
        monkeypatch.setattr(sys, "argv", ["rankzero", *words])
        commands: list[list[str]] = []

        def execv(_: str, command: list[str]) -> None:
            commands.append(command)
            raise ProcessReplacedError

        monkeypatch.setattr(os, "execv", execv)
        argv_of_verb: list[list[str]] = []
        verb_module = SimpleNamespace(main=lambda: argv_of_verb.append(list(sys.argv)))
        monkeypatch.setattr(rankzero, "import_module", lambda _: verb_module)
        try:
            rankzero.main()
        except ProcessReplacedError:
            return commands[0]
        assert argv_of_verb == [[f"rankzero {words[0]}", *words[1:]]]
        return None

    return call


@pytest.mark.parametrize("verb", ["train", "preflight", "score"])
def test_several_gpus_without_a_launcher_are_all_used(rankzero_on, capsys, verb):
    command = rankzero_on(8, verb, "RUN.yaml", "lr=1e-4")
    assert command is not None
    assert command[:3] == [sys.executable, "-m", "pipeline.cluster.deepspeed_command"]
    assert command[3:] == ["--quiet", "--module", f"pipeline.cli.{verb}", "RUN.yaml", "lr=1e-4"]
    assert (
        f"deepspeed --quiet --module pipeline.cli.{verb} RUN.yaml lr=1e-4"
        in capsys.readouterr().out
    )


def test_with_verbose_the_launcher_is_not_quiet(rankzero_on):
    command = rankzero_on(8, "train", "RUN.yaml", "--verbose")
    assert command[3:] == ["--module", "pipeline.cli.train", "RUN.yaml", "--verbose"]


@pytest.mark.parametrize(
    ("gpus", "words", "environment"),
    [
        (1, ["train", "RUN.yaml"], {}),
        (8, ["train", "RUN.yaml"], {"CUDA_VISIBLE_DEVICES": "3"}),
        (8, ["train", "RUN.yaml"], {"DS_ACCELERATOR": "cpu"}),
        (8, ["train", "RUN.yaml", "--debug"], {}),
        (8, ["train", "--help"], {}),
        (8, ["score", "RUN", "--tasks=arc_easy"], {}),
        (8, ["plan", "RUN.yaml"], {}),
        (8, ["train", "RUN.yaml"], {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8",
                                    "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_SIZE": "8"}),
        (8, ["train", "RUN.yaml"], {"RANK": "0"}),  # incomplete: the verb refuses it
    ],
)  # fmt: skip
def test_deepspeed_is_not_started_for_one_device_under_a_launcher_or_for_a_single_process(
    rankzero_on, gpus, words, environment
):
    assert rankzero_on(gpus, *words, **environment) is None


def write_scripts(monkeypatch, folder):
    """Call `rankzero slurm FOLDER`."""
    monkeypatch.setattr(sys, "argv", ["rankzero slurm", str(folder)])
    slurm()


def test_the_batch_scripts_equal_those_of_the_clone(monkeypatch, tmp_path):
    write_scripts(monkeypatch, tmp_path / "new" / "folder")
    written = {path.name: path.read_bytes() for path in (tmp_path / "new/folder/slurm").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (ROOT / "slurm").iterdir()}
    write_scripts(monkeypatch, tmp_path / "new" / "folder")  # again: the files are equal


def test_a_changed_script_is_not_replaced(monkeypatch, tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/env.sh").write_text("module load cuda\n")
    with refused("env.sh", "differs"):
        write_scripts(monkeypatch, tmp_path)
    assert [path.name for path in (tmp_path / "slurm").iterdir()] == ["env.sh"]
    assert (tmp_path / "slurm/env.sh").read_text() == "module load cuda\n"


def test_a_folder_that_cannot_be_created_is_refused(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with refused("file", "slurm"):
        write_scripts(monkeypatch, tmp_path / "file")


@pytest.mark.parametrize(
    ("words", "code"), [(["--help"], 0), ([], 2), (["trian"], 2), (["--help", "train"], 0)]
)
def test_the_usage_is_shown_without_a_traceback_if_its_reader_has_ended(words, code):
    command = [sys.executable, "-m", "pipeline.cli.rankzero", *words]
    readable, writable = os.pipe()
    os.close(readable)
    result = subprocess.run(command, cwd=ROOT, stdout=writable, stderr=subprocess.PIPE, check=False)
    os.close(writable)
    assert (result.returncode, b"Traceback" in result.stderr) == (code, False)
    assert (b"usage: rankzero VERB" in result.stderr) == (code == 2)
