"""RunFolder: the folder of a run, its owner, its status and its start. No torch."""

import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.adapter.initial import record_initial_adapter, require_startable
from pipeline.cluster.exits import is_lost_connection
from pipeline.config.load import dump_settings
from pipeline.data.dataset.reader import DataIndex
from pipeline.data.prepare.audit import audit_summary
from pipeline.data.prepare.prepare import check_first_rows, prepare_data, train_key
from pipeline.errors import RankZeroError, Stopped, UserError
from pipeline.files import dump_json, write_text
from pipeline.model.complete import require_complete
from pipeline.model.fingerprint import base_fingerprint, record_base_of_run, start_hashing
from pipeline.plan.plan import Plan
from pipeline.plan.render import plan_json, plan_overview, plan_text
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.context import RunContext
from pipeline.train.names import FILES, written_in
from pipeline.train.resume import checkpoint_to_resume, checkpoints_of
from pipeline.train.start import Start, decide_start, is_checkpoint_path, resolved_settings
from pipeline.train.status import RunStatus, end_for_dead_owner, is_done, read_status

logger = logging.getLogger(__name__)
_DEBUG_ROWS = 64  # rows that `--debug` prepares
_PENDING_WRITE_S = 15.0  # after a failure, the longest wait for a checkpoint write in flight


class RunFolder:
    """The folder of one run. Only rank 0 writes to it; on other ranks `status` is None.

    A start is one launch of the training program. If a check refuses it (UserError), the start has
    written only prepared data and its ownership of the folder; after all checks, `open` writes the
    other files. `start`: the result of `begin`. `checkpoints`: set on rank 0 if the run trains.
    `resumed`: on rank 0, the checkpoint to resume from. `wait_for_writes`: waits for checkpoint
    writes in flight, at most the given seconds.
    """

    def __init__(self, context: RunContext) -> None:
        self._context, self.path = context, context.folder
        is_writer = context.session.is_rank_zero
        self.status = RunStatus(self.path / "status.json") if is_writer else None
        self.start: Start = "new"
        self.checkpoints: Checkpoints | None = None
        self.resumed: Path | None = None
        self._earlier_status: dict[str, Any] | None = None  # of the run that is resumed
        self._is_open = False
        self.wait_for_writes: Callable[[float], None] = lambda seconds: None

    def begin(self) -> Start:
        """Decide the start, become the owner of the folder, select the checkpoint to resume from.

        On rank 0, before torch is imported and data is prepared.
        """
        context, status = self._context, self.status
        assert status is not None, "called on rank 0"
        with context.stops.interrupting():
            start = decide_start(self.path, context.plan, is_debug=context.is_debug)
            if start == "new":
                require_startable(context.plan)
            if start != "done":
                check_first_rows(context.settings)
                trust = context.settings.trust_remote_code
                require_complete(context.plan.shape, trust_remote_code=trust)
                status.take_ownership()
                # Decide again, because another start may have used the folder in the meantime.
                start = decide_start(self.path, context.plan, is_debug=context.is_debug)
            is_from_path = start == "new" and is_checkpoint_path(context.settings.resume)
            if start == "resume" or is_from_path:
                self._select_checkpoint(start)
        if start == "new" and not context.is_debug and (self.path / "plan.json").is_file():
            logger.info("this run replaces the earlier one in %s", self.path)
        if start != "done":
            self._earlier_status = read_status(status.path) if start == "resume" else None
            # The status of a finished run stays until `open`, because a check may refuse this
            # start.
            if not is_done(self.path):
                status.write_start(self._earlier_status)
        return start

    def _select_checkpoint(self, start: Start) -> None:
        """Set `checkpoints` and `resumed`. Raises UserError if the checkpoint cannot be used."""
        settings = self._context.settings
        key = train_key(settings)
        self.checkpoints = checkpoints_of(self.path, self._context.plan, start, key)
        self.resumed, notes = checkpoint_to_resume(self.checkpoints, settings.resume, start)
        for note in notes:
            logger.info(note)

    def prepare(self) -> dict[str, Any]:
        """Tokenise and pack the data, unless a start has done so, and return its index. On rank 0.

        Afterwards the number of steps is known. Raises UserError if the checkpoint to resume from
        has more steps.
        """
        context = self._context
        start_hashing(context.settings.model_folder)
        limit = _DEBUG_ROWS if context.is_debug else None
        with context.stops.interrupting():  # it may take hours
            index = prepare_data(context.settings, self.path / "data", limit)
            plan = context.plan.with_data(index.train.size)
            self.checkpoints = checkpoints_of(self.path, plan, self.start, index.train.key, index)
            if self.resumed is not None:
                self.checkpoints.require_resumable(self.resumed)
        return index.as_json()

    def use_data(self, index: DataIndex) -> None:
        """Complete the plan with the schedule for the prepared data, and log it. On every rank."""
        context = self._context
        context.plan = context.plan.with_data(index.train.size)
        logger.info(plan_overview(context.plan))
        logger.debug(plan_text(context.plan))
        if self.status is not None:
            logger.info(audit_summary(self.path / "data"))
            self.status.update(total_steps=context.plan.steps.total_steps)

    def open(self, step: int) -> None:
        """Write run.yaml, the plans, the fingerprint of the base, and the status.

        `step`: number of finished steps. Called on rank 0, after all checks that may refuse a run.
        """
        context, status = self._context, self.status
        assert status is not None, "called on rank 0"
        # First, because it may take long or fail, and `open_run` removes an earlier run.
        base_fingerprint(context.settings.model_folder)
        open_run(self.path, context.plan, self.start, is_debug=context.is_debug)
        base = record_base_of_run(self.path, context.settings.model_folder)
        if self.checkpoints is not None:
            self.checkpoints.identity = replace(self.checkpoints.identity, base=base)
        if self.resumed is None:
            record_initial_adapter(self.path, context.settings)
        status.write_start(self._earlier_status)
        total_steps = context.plan.steps.total_steps
        status.update(step=step, first_step=step, total_steps=total_steps)
        self._is_open = True

    def record_saved(self, step: int) -> None:
        """Record in status.json that the checkpoint of a step is on the disk. From any thread."""
        if self.status is not None:
            self.status.update(saved_step=step)

    @contextmanager
    def outcome_recorded(self) -> Iterator[None]:
        """Context manager that records how its body ended in status.json."""
        if self.status is None:
            yield
            return
        try:
            yield
        except Stopped as stop:
            self.status.end("stopped", stop.exit_code, str(stop))
            raise
        except RankZeroError as error:
            if isinstance(error, UserError) and not self._is_open:
                self.status.restore_earlier()
            self.wait_for_writes(_PENDING_WRITE_S)
            self.status.end("failed", error.exit_code, str(error))
            raise
        except BaseException as error:
            # If the connection was lost, the watchdog records which rank has died.
            if not is_lost_connection(error):
                self.wait_for_writes(_PENDING_WRITE_S)
                self.status.end("failed", 1, f"{type(error).__name__}: {error}")
            raise
        self.status.end("done", 0, None)

    def end_by_watchdog(self, reason: str, exit_code: int) -> None:
        """Write the final status. Called by the watchdog's thread, which then ends the process.

        On another rank than 0, the status is written only if rank 0 is dead.
        """
        self.wait_for_writes(_PENDING_WRITE_S)
        is_stop = exit_code == Stopped.exit_code
        if is_stop:
            self._context.stops.remove_stop_file()
        if self.status is not None:
            state = "stopped" if is_stop else "failed"
            self.status.end(state, exit_code, reason, is_final=True)
        elif not is_stop:
            end_for_dead_owner(self.path / "status.json", reason)

    def end_by_second_interrupt(self) -> None:
        """Write the final status at a second Ctrl-C, without waiting for a write in flight."""
        if self.status is not None:
            code = 128 + signal.SIGINT
            self.status.end("failed", code, "ended at once by a second Ctrl-C", is_final=True)


def open_run(folder: Path, plan: Plan, start: Start, *, is_debug: bool = False) -> None:
    """Write run.yaml and the plans. A new run first removes the earlier one (`clear_run`)."""
    try:
        if start == "new":
            clear_run(folder)
        if start != "done":
            write_run(folder, plan, is_debug=is_debug)
    except OSError as error:
        raise RankZeroError(
            f"output_dir: {folder}: {error.strerror} ({error.filename}); fix this and start again"
        ) from None


def write_run(folder: Path, plan: Plan, *, is_debug: bool) -> None:
    """Write run.yaml and the plans. They mark a folder as a run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "run.yaml", dump_settings(resolved_settings(plan)))
    write_plan(folder, plan, is_debug=is_debug)


def write_plan(folder: Path, plan: Plan, *, is_debug: bool) -> None:
    """Write plan.json and ds_config.json."""
    entries_of_run = {
        "steps": None if plan.schedule is None else dict(vars(plan.schedule)),
        "job": os.environ.get("SLURM_JOB_ID"),
        "version": __version__,
        "is_debug": is_debug,
    }
    write_text(folder / "plan.json", dump_json(plan_json(plan) | entries_of_run))
    write_text(folder / "ds_config.json", dump_json(plan.deepspeed))


def clear_run(folder: Path) -> None:
    """Remove the files that a run wrote, and no others. Raises OSError if that fails.

    If a folder such as `adapter` is a link to another disk, the link is kept and its target is
    removed. Prepared data is kept, because it can be reused. If the process is killed meanwhile,
    the folder is still a run folder, but its run no longer counts as finished.
    """
    if (status := read_status(folder / "status.json")) is not None:
        ended = {"state": "failed", "reason": "a new run was removing this run and was killed"}
        write_text(folder / "status.json", dump_json(status | ended))
    checkpoints = folder / "checkpoints"
    results = [(folder / name).resolve() for name in ("adapter", "merged", "tracking")]
    for path in (*written_in(checkpoints), *results):
        _remove(path)
    if checkpoints.is_dir() and not checkpoints.is_symlink() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
