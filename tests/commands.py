"""Run the project's commands in forks of a preloaded interpreter.

Each rank of `python launch/train.py RUN.yaml` spends 5 CPU seconds on imports. A fork of the
forkserver (tests/ranks.py) inherits the imported modules and runs the same script with its own
arguments, environment variables, working directory and output files. A second forkserver has no
torch, for commands that must not import it. Tests that depend on a launcher, PYTHONPATH or a fresh
interpreter start real processes (tests/cli/test_launchers.py, tests/faults).
"""

import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Self
from unittest.mock import patch

from tests import ROOT
from tests.ranks import CONTEXT

# DeepSpeed's launcher and Command.wait_for_end wait this long between SIGTERM and SIGKILL.
_GRACE_S = 30.0
_SERVER_WITHOUT_TORCH = forkserver.ForkServer()
_SERVER_WITHOUT_TORCH.set_forkserver_preload(["tests.preload_without_torch"])


class Command:
    """A started command: one process, or one process per rank."""

    def __init__(
        self,
        *arguments: str | Path,
        ranks: int | None = None,
        variables: Sequence[dict[str, str]] = ({},),
        cwd: Path = ROOT,
        log: Path | None = None,
    ) -> None:
        """Fork `python *arguments` once for each dict of environment variables in `variables`.

        With `ranks`, start that number of processes, which rendezvous as the ranks of one run. All
        processes append their output to `log`; without `log`, each writes to files of its own.
        """
        if ranks is not None:
            variables = variables_of_ranks(ranks)
        self._folder = tempfile.TemporaryDirectory(prefix="rankzero-command-")
        folder = Path(self._folder.name)
        self._files = [  # standard output and standard error of each process
            (log, log) if log else (folder / f"{i}.out", folder / f"{i}.err")
            for i in range(len(variables))
        ]
        self._processes = []
        for variables_of_process, files in zip(variables, self._files, strict=True):
            environment = dict(os.environ) | {"DS_ACCELERATOR": "cpu"} | variables_of_process
            python_arguments = [str(argument) for argument in arguments]
            process = CONTEXT.Process(
                target=_run_python, args=(python_arguments, environment, cwd, files)
            )
            process.start()
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid for process in self._processes]

    def is_running(self) -> bool:
        """Whether any process is alive."""
        return any(process.is_alive() for process in self._processes)

    @property
    def output(self) -> str:
        """Standard output and standard error of all processes so far."""
        return "".join(out + err for out, err in self.outputs)

    @property
    def outputs(self) -> list[tuple[str, str]]:
        """Standard output and standard error so far, by rank."""
        return [(_text_of(out), _text_of(err)) for out, err in self._files]

    def wait_for_end(self, within_s: float = 240.0) -> tuple[int, str]:
        """Wait for all ranks; when one fails, terminate the others, as a launcher does.

        Returns the exit code of the first rank that failed, or 0, and the output.
        """
        deadline, exit_code = time.monotonic() + within_s, 0
        waiting = {process.sentinel: process for process in self._processes}
        try:
            while waiting:
                ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
                assert ready, f"still running after {within_s:g} s:\n{self.output}"
                for sentinel in ready:
                    process = waiting.pop(sentinel)
                    process.join()
                    if process.exitcode and not exit_code:
                        exit_code = process.exitcode
                        deadline = min(deadline, time.monotonic() + _GRACE_S)
                        for other in waiting.values():
                            other.terminate()
        finally:
            self.kill()
        return exit_code, self.output

    def exit_codes(self, within_s: float) -> list[int]:
        """Exit codes by rank, after every process has ended by itself."""
        deadline = time.monotonic() + within_s
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self._processes]
        self.kill()
        assert None not in codes, f"still running after {within_s:g} s: {codes}"
        return codes

    def kill(self) -> None:
        """Send SIGKILL to all processes that still run."""
        for process in self._processes:
            process.kill()
            process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()


def run(
    *arguments: str | Path, ranks: int | None = None, cwd: Path = ROOT, **variables: str
) -> tuple[int, str]:
    """Run `python *arguments` and return its exit code and output.

    `ranks`: number of processes; without it, one process with the environment variables given.
    """
    processes = {"variables": [variables]} if ranks is None else {"ranks": ranks}
    with Command(*arguments, cwd=cwd, **processes) as command:
        return command.wait_for_end()


def run_without_torch(
    *arguments: str | Path, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a fork of an interpreter that has imported the commands, but not torch."""
    connect = _SERVER_WITHOUT_TORCH.connect_to_new_process
    with patch.object(forkserver, "connect_to_new_process", connect):
        command = Command(*arguments, variables=[variables], cwd=cwd)
    with command:
        code, _ = command.wait_for_end()
        return subprocess.CompletedProcess(arguments, code, *command.outputs[0])


def variables_of_ranks(world_size: int) -> list[dict[str, str]]:
    """Environment variables of torch's rendezvous for each rank; all ranks are on this machine."""
    common = {
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_python(
    arguments: list[str], environment: dict[str, str], cwd: Path, files: tuple[Path, Path]
) -> None:
    """Do in the forked process what `python *arguments` does.

    `files`: the files to which standard output and standard error are appended.
    """
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for standard_descriptor, path in zip((1, 2), files, strict=True):
        opened_descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened_descriptor, standard_descriptor)
        os.close(opened_descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - open until exit
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if arguments[0] == "-c":
        code = arguments[1]
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(code, "<command>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        module = arguments[1]
        sys.argv = arguments[1:]
        sys.modules.pop(module, None)  # runpy warns of a module that is imported already
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        script = arguments[0]
        sys.argv = arguments
        sys.path.insert(0, str((cwd / script).parent))
        runpy.run_path(script, run_name="__main__")


def _text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
