"""One training run on every rank, from settings to a published adapter."""

import logging
import os
import signal
from contextlib import ExitStack
from pathlib import Path

from pipeline.cluster.devices import detect_hardware, missing_gpus, set_environment
from pipeline.cluster.launcher import watch_launchers
from pipeline.cluster.placement import from_environment
from pipeline.cluster.session import Session
from pipeline.cluster.stop import StopRequests
from pipeline.cluster.watchdog import Watchdog
from pipeline.config.settings import RunSettings
from pipeline.data.dataset.reader import DataIndex
from pipeline.plan.plan import plan_run
from pipeline.preflight.context import RankContext
from pipeline.preflight.stages import assess_first_stage, probe_first_stage
from pipeline.track.process import TrackerProcesses
from pipeline.train.context import RunContext, debug_settings, requeued_settings
from pipeline.train.folder import RunFolder

logger = logging.getLogger(__name__)


def run_training(settings: RunSettings, *, is_debug: bool = False) -> None:
    """Run the phases: place, plan, session, preflight, start, prepare, assemble, train, finish.

    Collective. Everything that can be checked without torch is checked before torch is imported.
    Raises UserError for wrong input, Stopped after an agreed stop, RankZeroError for a failed run.
    """
    # Until the rendezvous is complete, Ctrl-C ends this process at once. Python's own handler would
    # not run while torch waits for other ranks. Shells ignore SIGINT in jobs started with `&`.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    settings = requeued_settings(settings, os.environ)
    settings = debug_settings(settings) if is_debug else settings
    with ExitStack() as stack:
        placement, hardware = from_environment(os.environ), detect_hardware()
        stops = StopRequests(
            Path(settings.output_dir), settings.time_limit_s, is_first=placement.rank == 0
        )
        watch_launchers(os.environ, stops.request)
        missing = missing_gpus(placement, hardware)
        set_environment(placement, hardware)

        plan = plan_run(
            settings, hardware, nodes=placement.nodes, ranks_per_node=placement.local_size
        )
        session = stack.enter_context(Session(placement, hardware))
        context = RunContext(plan=plan, session=session, stops=stops, is_debug=is_debug)
        folder = RunFolder(context)

        rank = RankContext(
            placement=placement, hardware=hardware, session=session, settings=settings, plan=plan,
            missing_gpus=missing, is_training=True,
        )  # fmt: skip
        probes = probe_first_stage(rank)
        trackers = stack.enter_context(TrackerProcesses())
        stack.enter_context(
            Watchdog(
                session, context.heartbeat, settings.hang_timeout_s,
                reason_to_leave=stops.reason_to_leave, on_end=folder.end_by_watchdog,
            )
        )  # fmt: skip
        stops.install_handlers(folder.end_by_second_interrupt)
        for line in assess_first_stage(rank, probes):
            logger.info(line)

        stack.enter_context(folder.outcome_recorded())
        folder.start = session.rank_zero_first(folder.begin)
        if folder.start == "done":
            logger.info("%s is done with these settings; nothing to do", folder.path)
            return
        # Rank 0 sends the index, because other machines may still read an earlier index.json.
        index = DataIndex.from_json(session.rank_zero_first(folder.prepare), folder.path / "data")
        folder.use_data(index)

        session.start()
        from pipeline.train.assemble import assemble  # imports torch
        from pipeline.train.finish import finish
        from pipeline.train.loop import training_loop

        state = assemble(context, folder, index)
        if session.is_rank_zero:
            trackers.start(folder.path, settings.trackers)
        stack.enter_context(state.display)
        finish(state, training_loop(state))
