"""The project's commands in forks of a preloaded interpreter, for tests that are not about starts.

A `python launch/train.py RUN.yaml` of its own spends 5 CPU seconds on imports, and each rank as
many. A fork has them from the forkserver of tests/ranks.py, and calls the same script with its own
arguments, variables, working directory and output. What depends on a launcher, on PYTHONPATH or
on a fresh interpreter is tested with real processes (tests/cli/test_launchers.py, tests/faults).
"""

import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Self

from tests import ROOT
from tests.ranks import CONTEXT

_GRACE_S = 30.0  # from a launcher's SIGTERM to its SIGKILL, as with DeepSpeed


class Command:
    """A started command: one process, or several with the variables of ranks."""

    def __init__(
        self,
        *arguments: str | Path,
        ranks: int | None = None,
        variables: Sequence[dict[str, str]] = ({},),
        cwd: Path = ROOT,
    ) -> None:
        """Fork `python *arguments` once for each of `variables`, or for each rank."""
        if ranks is not None:
            variables = variables_of_ranks(ranks)
        self._folder = tempfile.TemporaryDirectory(prefix="rankzero-command-")
        folder = Path(self._folder.name)
        self._files = [(folder / f"{i}.out", folder / f"{i}.err") for i in range(len(variables))]
        self._processes = []
        for own, files in zip(variables, self._files, strict=True):
            environment = dict(os.environ) | {"DS_ACCELERATOR": "cpu"} | own
            line = [str(argument) for argument in arguments]
            process = CONTEXT.Process(target=_call, args=(line, environment, cwd, files))
            process.start()
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """The processes, by rank."""
        return [process.pid for process in self._processes]

    def is_running(self) -> bool:
        """Whether any process is alive."""
        return any(process.is_alive() for process in self._processes)

    @property
    def output(self) -> str:
        """Output and errors of all processes so far."""
        return "".join(out + err for out, err in self.outputs)

    @property
    def outputs(self) -> list[tuple[str, str]]:
        """Output and errors by rank."""
        return [(_read(out), _read(err)) for out, err in self._files]

    def end(self, within_s: float = 240.0) -> tuple[int, str]:
        """Wait like a launcher, which ends all ranks once one has failed.

        Returns the code of the first rank that failed, and the output.
        """
        deadline, first = time.monotonic() + within_s, 0
        waiting = {process.sentinel: process for process in self._processes}
        try:
            while waiting:
                ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
                assert ready, f"still running after {within_s:g} s:\n{self.output}"
                for sentinel in ready:
                    process = waiting.pop(sentinel)
                    process.join()
                    if process.exitcode and not first:
                        first = process.exitcode
                        deadline = min(deadline, time.monotonic() + _GRACE_S)
                        for other in waiting.values():
                            other.terminate()
        finally:
            self.kill()
        return first, self.output

    def kill(self) -> None:
        """SIGKILL to whatever is left."""
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
    """Exit code and output of a command."""
    own = {} if ranks is not None else {"variables": [variables]}
    with Command(*arguments, ranks=ranks, cwd=cwd, **own) as command:
        return command.end()


def variables_of_ranks(world_size: int) -> list[dict[str, str]]:
    """The variables by which the ranks of one machine find each other."""
    common = {
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return [common | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world_size)]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _call(
    arguments: list[str], environment: dict[str, str], cwd: Path, files: tuple[Path, Path]
) -> None:
    """In the fork: become `python *arguments`."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in enumerate(files, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - of the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    how, *rest = arguments
    if how == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<command>", "exec"), {"__name__": "__main__"})
    elif how == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str((cwd / how).parent))
        runpy.run_path(how, run_name="__main__")


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
