"""From settings to a published adapter: the road of one training run, on every rank."""

import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.devices import detect_hardware, missing_gpus, set_environment
from pipeline.cluster.exits import forgive_output, is_lost_connection
from pipeline.cluster.heartbeat import Pulse
from pipeline.cluster.launcher import watch_launchers
from pipeline.cluster.placement import from_environment
from pipeline.cluster.session import Session
from pipeline.cluster.stop import StopRequests
from pipeline.cluster.watchdog import Watchdog
from pipeline.config.settings import RunSettings
from pipeline.data.dataset.reader import DataIndex, open_split
from pipeline.data.prepare.audit import audit_summary
from pipeline.data.prepare.prepare import check_first_rows, prepare
from pipeline.errors import RankZeroError, Stopped
from pipeline.model.fingerprint import base_fingerprint, require_base_of_run
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import Plan, make_plan
from pipeline.plan.render import plan_text
from pipeline.preflight.context import RankContext
from pipeline.preflight.stages import probe_before_torch, require_fit
from pipeline.train.start import as_requeued, look, open_run, write_plan
from pipeline.train.status import RunStatus, end_for_dead_owner, is_done, read_status

logger = logging.getLogger(__name__)
_DEBUG_ROWS, _DEBUG_STEPS = 64, 4
_LAST_WRITE_S = 15.0  # for a checkpoint in flight when a rank has died or the run has failed


def run_training(settings: RunSettings, *, is_debug: bool = False) -> None:
    """Train, verify and publish. Collective: every rank of the launcher calls it.

    All that can be known without torch is checked before torch is imported. Raises UserError for
    wrong input, Stopped after an agreed stop, RankZeroError for a failed run.
    """
    # Until all have met a signal just ends the process: another rank may never come, and there is
    # nothing to save. Python only notes an interrupt while torch waits, and a shell's `&` has
    # switched it off.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    forgive_output()
    settings = as_requeued(settings, os.environ)
    if is_debug:
        settings = _debug_settings(settings)
    placement, folder = from_environment(os.environ), Path(settings.output_dir)
    stops = StopRequests(folder, settings.time_limit_s, is_first=placement.rank == 0)
    watch_launchers(os.environ, stops.ask)
    hardware = detect_hardware()
    unseen = missing_gpus(placement, hardware)
    set_environment(placement, hardware)
    plan = make_plan(
        settings,
        read_shape(str(settings.model_folder)),
        hardware,
        nodes=placement.nodes,
        ranks_per_node=placement.local_size,
    )
    with Session(placement, hardware) as session:
        context = RankContext(
            placement=placement, hardware=hardware, session=session, settings=settings, plan=plan,
            missing_gpus=unseen, is_training=True,
        )  # fmt: skip
        looked = probe_before_torch(context)
        pulse, last_word = Pulse(), _LastWord(folder, stops)
        with Watchdog(
            placement,
            session.open_channel(),
            pulse,
            settings.hang_timeout_s,
            reason_to_leave=stops.reason_to_leave,
            on_end=last_word,
        ):
            stops.listen(last_word.after_a_second_interrupt)
            _run_together(plan, context, looked, stops, pulse, last_word, is_debug=is_debug)


@dataclass
class _LastWord:
    """For the watchdog, whose thread ends this process next: status.json gets the reason."""

    folder: Path
    stops: StopRequests
    status: RunStatus | None = None
    wait_for_writes: Callable[[float], None] = lambda seconds: None

    def __call__(self, reason: str, exit_code: int) -> None:
        self.wait_for_writes(_LAST_WRITE_S)
        is_stop = exit_code == Stopped.exit_code
        if is_stop:
            self.stops.clear()
        if self.status is not None:
            state = "stopped" if is_stop else "failed"
            self.status.end(state, exit_code, reason, is_last=True)
        elif not is_stop:
            end_for_dead_owner(self.folder / "status.json", reason)

    def after_a_second_interrupt(self) -> None:
        """Of a person who will not wait: not for a write in flight either."""
        if self.status is not None:
            code = 128 + signal.SIGINT
            self.status.end("failed", code, "a second Ctrl-C ended it at once", is_last=True)


def _run_together(
    plan: Plan,
    context: RankContext,
    looked: dict[str, Any],
    stops: StopRequests,
    pulse: Pulse,
    last_word: _LastWord,
    *,
    is_debug: bool,
) -> None:
    """The road from where all ranks have met."""
    settings, folder, session = plan.settings, Path(plan.settings.output_dir), context.session

    def say(text: str) -> None:
        if session.is_rank_zero:
            logger.info(text)

    for line in require_fit(context, looked):
        say(line)

    status = RunStatus(folder / "status.json") if session.is_rank_zero else None
    last_word.status = status

    def begin() -> dict[str, Any]:
        assert status is not None, "called on rank 0"
        with stops.raising():  # it may take hours, and does nothing twice
            found = look(folder, plan, is_debug=is_debug)
            if found == "done":
                return {"start": found}
            check_first_rows(settings)
            status.own()
            found = look(folder, plan, is_debug=is_debug)  # another start may have been quicker
            if found == "done":
                return {"start": found}
            earlier = read_status(status.path) if found == "resume" else None
            if not is_done(folder):  # else it stays the word on what would be replaced
                status.claim(earlier)
            limit = _DEBUG_ROWS if is_debug else None
            data = prepare(settings, folder / "data", limit).as_json()
        open_run(folder, plan, found)
        status.claim(earlier)
        return {"start": found, "data": data}

    def work() -> None:
        begun = session.rank_zero_first(begin)
        if begun["start"] == "done":
            say(f"{folder} is done with these settings; nothing to do")
            return
        # Not what index.json says: another machine may still see the one before, or one that
        # somebody has prepared since.
        index = DataIndex.from_json(begun["data"], folder / "data")
        _train(plan, index, session, status, stops, pulse, last_word, say, is_debug=is_debug)

    _owned(status, last_word, work)


def _owned(status: RunStatus | None, last_word: _LastWord, work: Callable[[], None]) -> None:
    """However the work ends, status.json tells, once it is claimed for this start.

    A checkpoint in flight is waited for after an error as well: the process ends without that.
    """
    if status is None:
        work()
        return
    try:
        work()
    except Stopped as stop:
        status.end("stopped", stop.exit_code, str(stop))
        raise
    except RankZeroError as error:
        last_word.wait_for_writes(_LAST_WRITE_S)
        status.end("failed", error.exit_code, str(error))
        raise
    except BaseException as error:
        if not is_lost_connection(error):  # else the watchdog finds out whose fault it is
            last_word.wait_for_writes(_LAST_WRITE_S)
            status.end("failed", 1, f"{type(error).__name__}: {error}")
        raise
    status.end("done", 0, None)


def _train(
    plan: Plan,
    index: DataIndex,
    session: Session,
    status: RunStatus | None,
    stops: StopRequests,
    pulse: Pulse,
    last_word: _LastWord,
    say: Callable[[str], None],
    *,
    is_debug: bool,
) -> None:
    settings, folder = plan.settings, Path(plan.settings.output_dir)
    plan = plan.with_data(index.train.size)
    say(plan_text(plan))
    if status is not None:
        say(audit_summary(folder / "data"))
        write_plan(folder, plan)
        status.update(total_steps=plan.steps.total_steps)

    from pipeline.train.assemble import assemble  # torch from here on
    from pipeline.train.finish import finish
    from pipeline.train.loop import train

    def fingerprint() -> str:
        with stops.raising():
            if "base" in settings.accept_changes:
                return base_fingerprint(settings.model_folder).digest
            return require_base_of_run(folder, settings.model_folder)

    session.start()
    run = assemble(
        plan,
        session,
        status,
        stops,
        pulse,
        train_split=open_split(index.train),
        eval_split=None if index.eval is None else open_split(index.eval),
        data_key=index.train.key,
        base_fingerprint=session.rank_zero_first(fingerprint),
        is_debug=is_debug,
    )
    if run.saver is not None:
        last_word.wait_for_writes = run.saver.wait_at_most
    with run.display:
        finish(run, train(run))


def _debug_settings(settings: RunSettings) -> RunSettings:
    """The same run, short and with everything looked at, beside the real one."""
    steps = min(settings.max_steps or _DEBUG_STEPS, _DEBUG_STEPS)
    return settings.model_copy(
        update={
            "output_dir": f"{settings.output_dir.rstrip('/')}-debug",
            "max_steps": steps,
            "logging_steps": 1,
            "resume": "never",
            # one process makes up for the ranks that are not there
            "gradient_accumulation_steps": "auto"
            if settings.global_batch_size != "auto"
            else settings.gradient_accumulation_steps,
        }
    )
