"""A preflight on every rank, stage by stage; and its first stage, which training runs too."""

import logging
import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

from pipeline.cluster.devices import detect_hardware, missing_gpus, set_environment
from pipeline.cluster.exits import end_process
from pipeline.cluster.heartbeat import Heartbeat
from pipeline.cluster.placement import from_environment
from pipeline.cluster.session import Session
from pipeline.cluster.watchdog import Watchdog
from pipeline.errors import RankZeroError, UserError
from pipeline.files import dump_json
from pipeline.preflight.check import UNKNOWN_HOST, Check, fail, spans
from pipeline.preflight.checks import BEFORE_TORCH, STAGES, Stage
from pipeline.preflight.context import RankContext
from pipeline.preflight.report import ERROR, Report

logger = logging.getLogger(__name__)

# A check takes seconds; a disk, a driver or a link that does not answer never does.
_LIMIT_S = 60.0
# Until the rendezvous each rank imports torch, perhaps all of them from one slow shared disk.
_START_FACTOR = 3
_LATER_S = 15.0  # the other ranks end after rank 0, which has shown the report by then
_RENDEZVOUS, _HOST = "rendezvous", "host"


def preflight(
    run_file: Path, overrides: Sequence[str], *, as_json: bool = False, limit_s: float = _LIMIT_S
) -> None:
    """Check a run on every rank that a launcher has started, or on this node alone.

    Rank 0 shows the report. Raises UserError on every rank where a check fails.
    """
    stdout, hardware, heartbeat = sys.stdout, detect_hardware(), Heartbeat()
    placement = from_environment(os.environ, may_be_alone=True)
    missing = missing_gpus(placement, hardware)
    set_environment(placement, hardware)
    # Libraries print to standard output, which is for the report.
    with redirect_stdout(sys.stderr), Session(placement, hardware) as session:
        context = RankContext(
            placement=placement, hardware=hardware, session=session, beat=heartbeat.beat,
            missing_gpus=missing,
        )  # fmt: skip
        run = _Preflight(context, stdout, as_json=as_json)
        start_s = _START_FACTOR * limit_s + (0.0 if session.is_rank_zero else _LATER_S)
        timer = threading.Timer(start_s, run.end_at_start, [heartbeat, start_s])
        timer.daemon = True
        timer.start()
        heartbeat.beat("settings")
        run.context = context.with_run(run_file, overrides)
        run.meet()
        timer.cancel()
        with Watchdog(
            session, heartbeat, limit_s, reason_to_leave=lambda: None, on_end=run.end_by_watchdog
        ):
            failed = run.finish()
    run.show()
    if failed:
        raise UserError(f"preflight: {', '.join(failed)}: see the report")


class _Preflight:
    """One preflight on this rank; another thread ends it where a rank hangs or is dead."""

    def __init__(self, context: RankContext, stdout: TextIO, *, as_json: bool) -> None:
        self.context, self._stdout, self._as_json = context, stdout, as_json
        self._report = Report()
        self._hosts = [UNKNOWN_HOST] * context.placement.world_size
        self._checks: Sequence[Check] = ()  # of the stage in progress
        self._results: dict[str, Any] = {}  # of this rank in that stage

    def meet(self) -> None:
        """Run the first stage; gathering its results is the rendezvous.

        Raises UserError where the rendezvous fails.
        """
        try:
            self._run_stage(BEFORE_TORCH)
        except (RuntimeError, RankZeroError) as error:  # port taken, or host unreachable
            place = self.context.placement
            text = f"no rendezvous at {place.master_addr}:{place.master_port}"
            remedy = "see the lines above, and check firewalls between the nodes"
            self._assess_so_far()
            self._report.findings[_RENDEZVOUS] = [fail(f"{text}: {_first_line(error)}", remedy)]
            self.show()
            raise UserError(
                f"rank {place.rank} on {socket.gethostname()}: {text}; {remedy}"
            ) from None

    def finish(self) -> list[str]:
        """Run the other stages whose requirements hold; the failed checks, equal on all ranks."""
        session = self.context.session
        for stage in STAGES[1:]:

            def skip(stage: Stage = stage) -> str:
                return self._reason_to_skip(stage)

            if not session.rank_zero_first(skip):
                self._run_stage(stage)
        failed: list[str] = session.rank_zero_first(self._report.failed)
        return failed

    def show(self) -> None:
        """Show the report on rank 0."""
        if self.context.session.is_rank_zero:
            report = self._report
            text = (
                dump_json(report.as_json(self._hosts)).rstrip() if self._as_json else report.text()
            )
            with redirect_stdout(self._stdout):
                logger.info("%s", text)

    def end_by_watchdog(self, reason: str, exit_code: int) -> None:
        """Show what is known before the watchdog ends this process."""
        del exit_code
        if self.context.session.is_rank_zero:
            remedy = "check that node's disk, driver and links (NCCL_DEBUG=INFO; dmesg)"
            try:
                self._assess_so_far()
            finally:
                self._report.findings["watchdog"] = [fail(reason, remedy)]
                self.show()

    def end_at_start(self, heartbeat: Heartbeat, seconds: float) -> None:
        """End this process, which has not reached the rendezvous with all ranks in time."""
        place, phase, text = self.context.placement, heartbeat.phase, ""
        try:
            present = self._assess_so_far() if place.rank == 0 else []
            if phase == _RENDEZVOUS:
                text = f"not all ranks have arrived within {seconds:.0f} s"
                text += f"; results of ranks {spans(present)} are assessed" if present else ""
                remedy = (
                    "check the output of each node: which has started no rank, or cannot reach "
                    f"MASTER_ADDR={place.master_addr} (firewall, interface)"
                )
            else:
                text = f"rank {place.rank} on {socket.gethostname()} hangs in {phase!r}"
                remedy = "check that node's disk and driver (dmesg)"
            self._report.findings[_RENDEZVOUS] = [fail(text, remedy, present[:0])]
            self.show()
            logger.warning("preflight: %s; %s", text, remedy)
        finally:
            end_process(RankZeroError.exit_code)

    def _run_stage(self, stage: Stage) -> None:
        """Probe, and gather the results of all ranks. Collective."""
        session, results = self.context.session, dict[str, Any]()
        self._checks, self._results = stage.checks, results
        probe_all(self.context, stage.checks, results)
        self.context.beat(
            _RENDEZVOUS if stage is BEFORE_TORCH else f"after {stage.checks[-1].name}"
        )
        gathered = session.gather_objects(results)
        if gathered is not None:
            self._hosts = [named[_HOST] for named in gathered]
            self._report.add(stage.checks, gathered, self._hosts, self.context.plan)

    def _reason_to_skip(self, stage: Stage) -> str:
        """Why a stage is skipped, which the report shows; empty if it is not."""
        levels = {check.name: self._report.level_of(check.name) for check in stage.requires}
        failed = [name for name, level in levels.items() if level == "fail"]
        reason = f"{' and '.join(failed)} failed" if failed else ""
        if stage.needs_several_ranks and self.context.placement.world_size == 1:
            reason = "one process; under `deepspeed`, torchrun or srun they are"
        if reason:
            self._report.skipped |= {check.name: reason for check in stage.checks}
        return reason

    def _assess_so_far(self) -> list[int]:
        """Assess the stage in progress from the ranks that have results, and return these ranks."""
        gathered = self.context.session.gathered_so_far()
        # A probe may gather as well, and then the value is None.
        by_rank = [gathered.get(rank) or {} for rank in range(self.context.placement.world_size)]
        by_rank[0] = by_rank[0] or self._results
        self._hosts = [
            named.get(_HOST, host) for named, host in zip(by_rank, self._hosts, strict=True)
        ]
        for check in self._checks:
            if any(check.name in named for named in by_rank):
                # An assessment may need a rank that is not there.
                with suppress(KeyError, TypeError, AttributeError, ValueError):
                    self._report.add([check], by_rank, self._hosts, self.context.plan)
        return [rank for rank, named in enumerate(by_rank) if named]


def probe_all(context: RankContext, checks: Sequence[Check], results: dict[str, Any]) -> None:
    """Add this rank's host name and its result of each check, or the error, to `results`."""
    results[_HOST] = socket.gethostname()
    for check in checks:
        context.beat(check.name)  # on every rank, so that the number of beats can be compared
        if not check.applies_to(context):
            continue
        try:
            results[check.name] = check.probe(context)
        except UserError as error:
            results[check.name] = {ERROR: str(error)}
        except (RuntimeError, OSError, ImportError) as error:  # of a device, a disk, a library
            results[check.name] = {ERROR: f"{type(error).__name__}: {_first_line(error)}"}


def probe_before_torch(context: RankContext) -> dict[str, Any]:
    """This rank's results of the first stage, which training gathers after the rendezvous.

    Raises UserError where there can be no rendezvous; other errors are reported by rank 0.
    """
    results = dict[str, Any]()
    probe_all(context, BEFORE_TORCH.checks, results)
    if isinstance(port := results.get("port"), dict):
        raise UserError(port[ERROR])
    return results


def require_fit(context: RankContext, results: Mapping[str, Any]) -> list[str]:
    """Assess the results of `probe_before_torch` of all ranks: the lines of warnings. Collective.

    Raises UserError on every rank where a check fails.
    """
    gathered = context.session.gather_objects(results)

    def assess() -> list[str]:
        assert gathered is not None, "rank 0 has the results"
        report, hosts = Report(), [named[_HOST] for named in gathered]
        report.add(BEFORE_TORCH.checks, gathered, hosts, context.plan)
        if failed := report.failed():
            lines = "\n".join(report.warnings())
            raise UserError(f"{lines}\npreflight: {', '.join(failed)}")
        return report.warnings()

    lines: list[str] = context.session.rank_zero_first(assess)
    return lines


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
