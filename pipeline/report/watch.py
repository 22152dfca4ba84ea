"""Follow a run: write its report again while it trains."""

import time
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import UserError
from pipeline.report.folder import is_run_folder, read_state
from pipeline.report.page import write_report

INTERVAL_S = 5
_START_POLL_S = 1
_RESTART_POLLS = 60  # a stopped run that is started again imports and checks before it is running
_MAX_WRITING_SHARE = 0.05  # share of the time; the machine that writes the page may also train


def wait_for_run(run_folder: Path) -> None:
    """Wait until a folder has a run, for example while its job waits in a queue."""
    while not is_run_folder(run_folder):
        time.sleep(_START_POLL_S)


def watch_run(run_folder: Path, on_first_page: Callable[[Path], None]) -> str:
    """Write report.html every few seconds until the run ends, and return its last state.

    `on_first_page`: called once with the path of the page. The page reloads itself in the browser.
    A run that stopped or failed while it was followed may be started again within a minute. At the
    end, also after Ctrl-C, the page is written once more, and then does not reload itself.
    """
    is_first = True
    try:
        while _is_running(run_folder, may_restart=not is_first):
            start = time.perf_counter()
            try:
                path = write_report(run_folder, refresh_s=INTERVAL_S)
            except UserError:  # perhaps because a new run is replacing the earlier one
                time.sleep(_START_POLL_S)
                wait_for_run(run_folder)
                path = write_report(run_folder, refresh_s=INTERVAL_S)
            if is_first:
                on_first_page(path)
            is_first = False
            writing_s = time.perf_counter() - start
            time.sleep(max(INTERVAL_S, writing_s / _MAX_WRITING_SHARE))
    finally:
        path = write_report(run_folder)
    if is_first:
        on_first_page(path)
    return read_state(run_folder)


def _is_running(run_folder: Path, *, may_restart: bool) -> bool:
    """Whether the run is running. Another state counts only if it lasts.

    When a run has passed its checks, it removes the files of an earlier run, its own status.json
    too, and writes them again. `may_restart`: wait for a restart of a run that is not done.
    """
    for polls in range(_RESTART_POLLS):
        if (state := read_state(run_folder)) == "running":
            return True
        if polls and (state == "done" or not may_restart):
            return False
        time.sleep(_START_POLL_S)
        wait_for_run(run_folder)
    return False
