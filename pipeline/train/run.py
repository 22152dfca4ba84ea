"""One training run on every rank, from settings to a published adapter."""

import gc
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module
from pathlib import Path

from pipeline.cluster.devices import set_up_rank
from pipeline.cluster.launcher import watch_launchers
from pipeline.cluster.progress import show_progress
from pipeline.cluster.session import Session
from pipeline.cluster.stop import StopRequests, end_at_interrupt
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

# New objects after which Python searches for garbage, until all modules are imported. Their default
# number, 700, takes a seventh of the CPU time of the imports (docs/log.md).
_NEW_OBJECTS = 1_000_000


def run_training(settings: RunSettings, *, is_debug: bool = False) -> None:
    """Run the phases of a training run, from the placement of this rank to the published adapter.

    Collective. Everything that can be checked without torch is checked before torch is imported.
    Raises UserError for wrong input, Stopped after an agreed stop, RankZeroError for a failed run.
    """
    end_at_interrupt()  # until `stops` handles signals
    env = dict(os.environ)  # a copy, because `set_up_rank` adds variables of DeepSpeed's launcher
    settings = requeued_settings(settings, env)
    end_of_imports = collect_rarely()
    with ExitStack() as stack:
        placement, hardware, missing_gpus = set_up_rank(env)
        if placement.world_size > 1:  # the launcher has taken seconds without a message
            logger.info("starting %d ranks ...", placement.world_size)
        if is_debug:
            settings = debug_settings(settings, placement.world_size)
        stops = StopRequests(
            Path(settings.output_dir), settings.time_limit_s, reads_stop_file=placement.rank == 0
        )
        watch_launchers(env, stops.request)

        nodes, ranks = placement.nodes, placement.local_size
        plan = plan_run(settings, hardware, nodes=nodes, ranks_per_node=ranks)
        session = stack.enter_context(Session(placement, hardware))
        context = RunContext(plan=plan, session=session, stops=stops, is_debug=is_debug)
        folder = RunFolder(context)

        rank = RankContext(
            placement=placement, hardware=hardware, session=session, settings=settings, plan=plan,
            missing_gpus=missing_gpus, is_training=True,
        )  # fmt: skip
        # The first stage of the preflight checks; `session.start` below connects the ranks.
        probes = probe_first_stage(rank)
        trackers = stack.enter_context(TrackerProcesses())
        watchdog = Watchdog(
            session, context.heartbeat, settings.hang_timeout_s,
            stop_reason_before_loop=stops.stop_reason_before_loop, on_end=folder.end_by_watchdog,
        )  # fmt: skip
        stack.enter_context(watchdog)
        stops.install_handlers(folder.end_by_second_interrupt)
        with show_progress("waiting for the checks of all ranks"):
            assess_first_stage(rank, probes)

        stack.enter_context(folder.outcome_recorded())
        with show_progress("reading the run folder and the first rows"):
            folder.start = session.rank_zero_first(folder.begin)
        if folder.start == "done":
            logger.info("%s is done with these settings; nothing to do", folder.path)
            return
        # Rank 0 sends the index, because other machines may still read an earlier index.json.
        prepared = session.rank_zero_first(folder.prepare, meanwhile=partial(get_ready, context))
        index = DataIndex.from_json(prepared, folder.path / "data")
        folder.use_data(index)

        with show_progress("importing PyTorch and DeepSpeed"):
            session.start()
            from pipeline.train.assemble import assemble
            from pipeline.train.finish import finish
            from pipeline.train.loop import training_loop
        end_of_imports()

        state = assemble(context, folder, index)
        if session.is_rank_zero:
            trackers.start(folder.path, settings.trackers)
        with state.display:
            stop_reason = training_loop(state)
        finish(state, stop_reason)


def collect_rarely() -> Callable[[], None]:
    """Let Python search for garbage rarely while modules are imported.

    The returned function ends this. Later searches omit all objects that exist when it is called,
    such as the 400,000 objects of the modules.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(_NEW_OBJECTS)

    def end() -> None:
        gc.freeze()
        gc.set_threshold(*thresholds)

    return end


def get_ready(context: RunContext) -> None:
    """Import the modules of training and check the model class, while rank 0 prepares the data.

    The proof is written to the cache, where rank 0 finds it. Errors are ignored, because all ranks
    repeat the imports, and rank 0 the check, and then report them.
    """
    session = context.session
    with suppress(Exception):
        session.import_deepspeed()
        for name in ("assemble", "finish", "loop"):
            import_module(f"pipeline.train.{name}")
        if session.placement.rank == 1:
            from pipeline.model.proof import require_proof

            gc.freeze()  # so that the search below omits the modules, which would take 0.3 s
            require_proof(context.plan)
            # `join_lora` puts the layers of a copy of the model in reference cycles. Without this
            # search the end of `collect_rarely` would keep their weights until the process ends.
            gc.collect()
