"""Watch on DeepSpeed's launchers: a rank stops if one of its launchers has died.

DeepSpeed's `deepspeed` command starts a node launcher on each machine, which starts the ranks. If a
signal kills the command or a node launcher, its children continue unnoticed (DeepSpeed 0.19.8: any
signal kills the command; SIGUSR1, SIGUSR2 and SIGKILL kill the node launcher). So each rank watches
both processes, its parent and its grandparent.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping

import psutil

_POLL_S = 0.5
_NODE_LAUNCHER = "deepspeed.launcher.launch"
_SET_BY_COMMAND = "--log_level="  # argument of node launchers that the deepspeed command started
_LEVELS = 4  # number of ancestors to search: shell scripts may be between a launcher and its ranks


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
    while launchers and not any(has_ended(process) for process in launchers):
        time.sleep(_POLL_S)
    request_stop("its launcher has ended")


def _launchers(*, is_one_machine: bool) -> list[psutil.Process]:
    """The node launcher, and the deepspeed command if it is the parent of the node launcher.

    Empty if either has ended. On a single machine the parent of the node launcher is the command;
    with several machines it may be a remote shell.
    """
    ancestors = psutil.Process(os.getpid()).parents()[:_LEVELS]
    for i, process in enumerate(ancestors):
        if _NODE_LAUNCHER in _command_line(process):
            parent = [p for p in ancestors[i + 1 : i + 2] if "deepspeed" in _command_line(p)]
            command_has_ended = (
                is_one_machine and not parent and _SET_BY_COMMAND in _command_line(process)
            )
            return [] if command_has_ended else [process, *parent]
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
    except psutil.AccessDenied:  # it exists, and its state is hidden from this user
        return False
    except psutil.NoSuchProcess:
        return True
