"""Stop this rank when its launcher has died; otherwise it would keep running unnoticed.

DeepSpeed's `deepspeed` command starts one node launcher per machine, which starts the ranks.
Neither stops its children when a signal kills it (DeepSpeed 0.19.8: any signal kills the command;
SIGUSR1, SIGUSR2 and SIGKILL kill the node launcher). The command is the ranks' grandparent, so both
processes are watched.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping

import psutil

_POLL_S = 0.5
_NODE_LAUNCHER = "deepspeed.launcher.launch"
_BY_COMMAND = "--log_level="  # argument of a node launcher that the deepspeed command started
_LEVELS = 4  # ancestors to search: a shell script may be between a launcher and its ranks


def watch_launchers(env: Mapping[str, str], request_stop: Callable[[str], None]) -> None:
    """Start a thread that requests a stop of this rank once one of its launchers is gone.

    Does nothing for a rank that DeepSpeed's launcher did not start.
    """
    if "CROSS_RANK" not in env:  # only DeepSpeed's launcher sets it
        return
    try:
        launchers = _launchers(is_one_machine=env.get("CROSS_SIZE") == "1")
    except psutil.AccessDenied:
        return  # the processes above this one are hidden
    threading.Thread(
        target=_watch, args=(launchers, request_stop), name="launchers", daemon=True
    ).start()


def _watch(launchers: list[psutil.Process], request_stop: Callable[[str], None]) -> None:
    while launchers and all(_is_running(process) for process in launchers):
        time.sleep(_POLL_S)
    request_stop("its launcher is gone")


def _launchers(*, is_one_machine: bool) -> list[psutil.Process]:
    """The node launcher, and its parent if that is the deepspeed command; empty if one has ended.

    On a single machine the command is the parent; with several machines a remote shell may be.
    """
    above = psutil.Process(os.getpid()).parents()[:_LEVELS]
    for i, process in enumerate(above):
        if _NODE_LAUNCHER in _command_line(process):
            parent = [p for p in above[i + 1 : i + 2] if "deepspeed" in _command_line(p)]
            is_gone = is_one_machine and not parent and _BY_COMMAND in _command_line(process)
            return [] if is_gone else [process, *parent]
    return []


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _is_running(process: psutil.Process) -> bool:
    try:  # is_running() is false for a later process with the same number
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
