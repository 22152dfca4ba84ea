"""Run the project's commands in forks of a preloaded interpreter.

Each rank of `python launch/train.py RUN.yaml` spends 5 CPU seconds on imports. A fork of the
forkserver (tests/ranks.py) inherits the imported modules and runs the same script with its own
arguments, environment variables, working directory and output files. Tests that depend on a
launcher, PYTHONPATH or a fresh interpreter start real processes (tests/cli/test_launchers.py,
tests/faults).
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

_GRACE_S = 30.0  # between a launcher's SIGTERM and SIGKILL; DeepSpeed's value


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
        """Fork `python *arguments` for each dict of environment variables, or for each rank.

        All processes append their output to `log`; without it, each has files of its own.
        """
        if ranks is not None:
            variables = variables_of_ranks(ranks)
        self._folder = tempfile.TemporaryDirectory(prefix="rankzero-command-")
        folder = Path(self._folder.name)
        self._files = [
            (log, log) if log else (folder / f"{i}.out", folder / f"{i}.err")
            for i in range(len(variables))
        ]
        self._processes = []
        for added, files in zip(variables, self._files, strict=True):
            environment = dict(os.environ) | {"DS_ACCELERATOR": "cpu"} | added
            line = [str(argument) for argument in arguments]
            process = CONTEXT.Process(target=_run_python, args=(line, environment, cwd, files))
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

    def end(self, within_s: float = 240.0) -> tuple[int, str]:
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
    """Exit code and output of a command."""
    own = {} if ranks is not None else {"variables": [variables]}
    with Command(*arguments, ranks=ranks, cwd=cwd, **own) as command:
        return command.end()


def variables_of_ranks(world_size: int) -> list[dict[str, str]]:
    """Environment variables of torch's rendezvous for the ranks of one machine."""
    common = {
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return [common | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world_size)]


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_python(
    arguments: list[str], environment: dict[str, str], cwd: Path, files: tuple[Path, Path]
) -> None:
    """Run `python *arguments` in the forked process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in enumerate(files, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - open until exit
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    first, *rest = arguments
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<command>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str((cwd / first).parent))
        runpy.run_path(first, run_name="__main__")


def _text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
