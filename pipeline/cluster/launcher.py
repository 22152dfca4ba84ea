"""Watch on DeepSpeed's launchers: a rank stops if one of its launchers has died.

The `deepspeed` command starts a node launcher on each machine, and the node launcher starts the
ranks. If a signal kills the command or a node launcher, the ranks continue unnoticed. In DeepSpeed
0.19.8 any signal kills the command; SIGUSR1, SIGUSR2 and SIGKILL kill the node launcher. So each
rank watches its node launcher and, on a single machine, the command.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping

import psutil

_POLL_S = 0.5
_NODE_LAUNCHER = "deepspeed.launcher.launch"
# Argument that the deepspeed command passes to the node launchers that it starts.
_ARGUMENT_OF_COMMAND = "--log_level="
_MAX_ANCESTORS = 4  # to search, because shell scripts may be between a launcher and its ranks


def watch_launchers(env: Mapping[str, str], request_stop: Callable[[str], None]) -> None:
    """Start a thread that requests a stop of this rank if one of its launchers has ended.

    Does nothing if DeepSpeed's launcher did not start this rank.
    """
    if "CROSS_RANK" not in env:  # only DeepSpeed's launcher sets it
        return
    try:
        launchers = _launchers(is_one_machine=env.get("CROSS_SIZE") == "1")
    except psutil.AccessDenied:
        return  # this process may not inspect its ancestors
    threading.Thread(
        target=_watch, args=(launchers, request_stop), name="launchers", daemon=True
    ).start()


def _watch(launchers: list[psutil.Process], request_stop: Callable[[str], None]) -> None:
    """Wait until a launcher has ended, then request a stop; at once if the list is empty."""
    while launchers and not any(has_ended(process) for process in launchers):
        time.sleep(_POLL_S)
    request_stop("its launcher has ended")


def _launchers(*, is_one_machine: bool) -> list[psutil.Process]:
    """The node launcher, and the deepspeed command if it is the parent of the node launcher.

    Empty if one of them has ended already. On a single machine the parent of the node launcher is
    the command. With several machines the parent may be a remote shell instead.
    """
    ancestors = psutil.Process(os.getpid()).parents()[:_MAX_ANCESTORS]
    for i, process in enumerate(ancestors):
        command_line = _command_line(process)
        if _NODE_LAUNCHER in command_line:
            parent = ancestors[i + 1 : i + 2]
            if parent and "deepspeed" in _command_line(parent[0]):
                return [process, *parent]
            was_started_by_command = is_one_machine and _ARGUMENT_OF_COMMAND in command_line
            return [] if was_started_by_command else [process]
    return []


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended, even if its parent has not yet read its exit code."""
    try:  # is_running() is False if the process id now belongs to a later process
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:  # the process exists, but this user may not read its state
        return False
    except psutil.NoSuchProcess:
        return True
