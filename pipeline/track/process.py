"""TrackerProcesses: one process for each tracker of a run, so that training waits for none."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.cluster.progress import show_progress
from pipeline.commands import command
from pipeline.track.follow import SentRecord, sent_path
from pipeline.track.lines import LineReader, parse_metrics

logger = logging.getLogger(__name__)
FINAL_SEND_S = 30.0  # time to send the remaining data at the end of a run
# Environment variables that every tracker process gets. The process also gets the variables of its
# tracker, which have one of the prefixes below. All others may be secrets of other programs.
_COMMON_VARIABLES = {
    "PATH", "HOME", "USER", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
    "http_proxy", "https_proxy", "no_proxy", "all_proxy", "PYTHONPATH", "VIRTUAL_ENV",
    "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "NETRC", "HF_HUB_CACHE",
}  # fmt: skip
_PREFIXES = {
    "wandb": ("WANDB_",),
    "tensorboard": (),
    "mlflow": ("MLFLOW_", "AWS_", "AZURE_", "GOOGLE_"),
    "trackio": ("TRACKIO_", "HF_"),
}


class TrackerProcesses:
    """The tracker processes of a run, as a context manager for rank 0.

    At the end of the context, the processes have 30 s (FINAL_SEND_S) to send the remaining data.
    Then they are killed.
    """

    def __init__(self) -> None:
        self._folder = Path()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def start(self, folder: Path, trackers: Sequence[str]) -> None:
        """Start one process for each tracker of the run in this folder."""
        self._folder = folder
        for name in trackers:
            # -P: the working directory is not searched for modules.
            program = [sys.executable, "-P", "-m", "pipeline.cli.track", str(folder)]
            self._processes[name] = subprocess.Popen(
                [*program, "--tracker", name, "--follow"],
                stdin=subprocess.PIPE,  # the process ends after training has closed this pipe
                env=tracker_environment(name, os.environ),
                start_new_session=True,  # so that Ctrl-C is not sent to the tracker process
            )

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._processes:
            with show_progress("sending the last metrics to the trackers"):
                self._end()

    def _end(self) -> None:
        """Let the processes send the remaining data, and kill those that take too long."""
        deadline = time.monotonic() + FINAL_SEND_S
        for process in self._processes.values():
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
        for name, process in self._processes.items():
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = -signal.SIGKILL
            if code:
                logger.warning(self._unsent_message(name))

    def _unsent_message(self, name: str) -> str:
        """Message about the steps that a tracker has not received, and how to send them."""
        sent = SentRecord.load(sent_path(self._folder, name))
        last_steps = {"train": 0, "eval": 0}
        for line in LineReader(self._folder / "metrics.jsonl").new_lines():
            kind, _ = parse_metrics(line)
            last_steps[kind] = line["step"]
        received = ", ".join(
            f"{kind} up to step {sent.steps.get(kind, 0)} of {step}"
            for kind, step in last_steps.items()
        )
        return (
            f"tracker {name} has not received all data ({received}); the run is not affected; "
            f"`{command('track')} {self._folder}` sends the rest"
        )


def tracker_environment(name: str, env: Mapping[str, str]) -> dict[str, str]:
    """Environment of a tracker process: the variables it needs, without other programs' secrets."""
    prefixes = ("LC_", *_PREFIXES[name])
    return {
        key: value
        for key, value in env.items()
        if key in _COMMON_VARIABLES or key.startswith(prefixes)
    }
