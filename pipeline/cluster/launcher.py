"""The processes that started this rank: when they are gone, nobody would see it run on.

DeepSpeed's outer command starts a launcher for each machine, and that starts the ranks. Neither
tells its children when a signal ends it (DeepSpeed 0.19.8: the outer one dies of any, the machine's
of SIGUSR1, SIGUSR2 and SIGKILL), and a rank's own parent does not change when the outer one dies.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping

import psutil

_POLL_S = 0.5
_NODE_LAUNCHER = "deepspeed.launcher.launch"
_BY_OUTER = "--log_level="  # what nobody gives who starts the machine's launcher by hand
_LEVELS = 4  # a shell script may stand between a launcher and its ranks


def watch_launchers(env: Mapping[str, str], ask_to_stop: Callable[[str], None]) -> None:
    """Start a thread that asks this rank to stop once one of its launchers is gone.

    Does nothing for a rank that DeepSpeed's launcher did not start.
    """
    if "CROSS_RANK" not in env:  # of all launchers only DeepSpeed's sets it
        return
    try:
        launchers = _launchers(is_one_machine=env.get("CROSS_SIZE") == "1")
    except psutil.AccessDenied:
        return  # nothing can be seen here
    threading.Thread(
        target=_watch, args=(launchers, ask_to_stop), name="launchers", daemon=True
    ).start()


def _watch(launchers: list[psutil.Process], ask_to_stop: Callable[[str], None]) -> None:
    while launchers and all(_is_there(process) for process in launchers):
        time.sleep(_POLL_S)
    ask_to_stop("its launcher is gone")


def _launchers(*, is_one_machine: bool) -> list[psutil.Process]:
    """The machine's launcher and what started that, if it is DeepSpeed too; none if one is gone.

    On one machine the outer command always started the launcher; elsewhere a remote shell did.
    """
    above = psutil.Process(os.getpid()).parents()[:_LEVELS]
    for place, process in enumerate(above):
        if _NODE_LAUNCHER in _command(process):
            outer = [p for p in above[place + 1 : place + 2] if "deepspeed" in _command(p)]
            is_gone = is_one_machine and not outer and _BY_OUTER in _command(process)
            return [] if is_gone else [process, *outer]
    return []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _is_there(process: psutil.Process) -> bool:
    try:  # is_running() knows a later process with the same number from it
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
