"""Execution of a preflight, stage by stage, and of its first stage at the start of training.

In a stage each rank runs the probes of some checks, and rank 0 assesses the gathered results. The
result of a rank in a stage is a dictionary: check name -> result of the probe.
"""

import logging
import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from pipeline.cluster.devices import set_up_rank
from pipeline.cluster.exits import end_process
from pipeline.cluster.heartbeat import Heartbeat
from pipeline.cluster.progress import show_progress
from pipeline.cluster.session import Session
from pipeline.cluster.watchdog import Watchdog
from pipeline.errors import RankZeroError, UserError
from pipeline.files import dump_json
from pipeline.preflight.check import UNKNOWN_HOST, Check, fail, format_ranges
from pipeline.preflight.checks import BEFORE_TORCH, STAGES, Stage
from pipeline.preflight.context import RankContext
from pipeline.preflight.report import ERROR, Report

logger = logging.getLogger(__name__)

# Time limit of one check. Checks take seconds, but a broken disk, driver or link may never answer.
_LIMIT_S = 60.0
# The rendezvous must be complete after this many time limits. Before it all ranks import torch,
# perhaps from one slow shared disk.
_START_FACTOR = 3
# Rank 0 shows the report and ends first. The other ranks end this much later, because a launcher
# may kill all ranks when the first one ends.
_LATER_S = 15.0
_RENDEZVOUS = "rendezvous"  # name of a phase of the heartbeat, and of a line of the report
_HOST = "host"  # key of the host name in a rank's results


def check_run(
    run_file: Path, overrides: Sequence[str], *, as_json: bool = False, limit_s: float = _LIMIT_S
) -> None:
    """Check a run on all ranks that a launcher has started; without a launcher, on this node.

    Rank 0 shows the report. `limit_s`: time limit of one check. Raises UserError on all ranks if a
    check fails.
    """
    stdout, heartbeat = sys.stdout, Heartbeat()
    placement, hardware, missing = set_up_rank(os.environ, allow_single_process=True)
    # Libraries print to standard output. It is redirected, so that it has only the report.
    with redirect_stdout(sys.stderr), Session(placement, hardware) as session:
        context = RankContext(
            placement=placement, hardware=hardware, session=session, beat=heartbeat.beat,
            missing_gpus=missing,
        )  # fmt: skip
        run = _Preflight(context, stdout, as_json=as_json)
        start_s = _START_FACTOR * limit_s + (0.0 if session.is_rank_zero else _LATER_S)
        timer = threading.Timer(start_s, run.end_before_rendezvous, [heartbeat, start_s])
        timer.daemon = True
        timer.start()
        heartbeat.beat("settings")
        run.context = context.with_run(run_file, overrides)
        with show_progress("checking"):
            run.run_first_stage()
            timer.cancel()
            with Watchdog(
                session, heartbeat, limit_s, stop_reason_before_loop=lambda: None,
                on_end=run.end_by_watchdog,
            ):  # fmt: skip
                failed = run.run_other_stages()
    run.show()
    if failed:
        raise UserError(f"preflight: {', '.join(failed)}: see the report")


class _Preflight:
    """The preflight of this rank. A timer or the watchdog ends it if a rank hangs or has died."""

    def __init__(self, context: RankContext, stdout: TextIO, *, as_json: bool) -> None:
        self.context, self._stdout, self._as_json = context, stdout, as_json
        self._report = Report()
        self._hosts = [UNKNOWN_HOST] * context.placement.world_size
        self._current_checks: Sequence[Check] = ()  # checks of the stage in progress
        self._current_results: dict[str, Any] = {}  # this rank's results in that stage

    def run_first_stage(self) -> None:
        """Run the first stage. Gathering its results is the rendezvous of the ranks.

        Raises UserError if the rendezvous fails.
        """
        try:
            self._run_stage(BEFORE_TORCH)
        except (RuntimeError, RankZeroError) as error:  # port taken, or host unreachable
            placement = self.context.placement
            text = f"no rendezvous at {placement.master_addr}:{placement.master_port}"
            remedy = "see the findings above, and check firewalls between the nodes"
            self._assess_arrived_results()
            self._report.findings[_RENDEZVOUS] = [fail(f"{text}: {_first_line(error)}", remedy)]
            self.show()
            raise UserError(
                f"rank {placement.rank} on {socket.gethostname()}: {text}; {remedy}"
            ) from None

    def run_other_stages(self) -> list[str]:
        """Run the other stages unless they are skipped, and return the names of failed checks.

        The names are the same on all ranks. Collective.
        """
        session = self.context.session
        for stage in STAGES[1:]:
            if not session.rank_zero_first(partial(self._reason_to_skip, stage)):
                self._run_stage(stage)
        failed: list[str] = session.rank_zero_first(self._report.failed)
        return failed

    def show(self) -> None:
        """Show the report on rank 0."""
        if self.context.session.is_rank_zero:
            if self._as_json:
                text = dump_json(self._report.as_json(self._hosts)).rstrip()
            else:
                text = self._report.text()
            with redirect_stdout(self._stdout):
                logger.info("%s", text)

    def end_by_watchdog(self, reason: str, exit_code: int) -> None:
        """Show the incomplete report on rank 0, before the watchdog ends this process."""
        del exit_code
        if self.context.session.is_rank_zero:
            remedy = "check the disk, driver and links of this node (NCCL_DEBUG=INFO; dmesg)"
            try:
                self._assess_arrived_results()
            finally:
                self._report.findings["watchdog"] = [fail(reason, remedy)]
                self.show()

    def end_before_rendezvous(self, heartbeat: Heartbeat, seconds: float) -> None:
        """End this process, because the rendezvous was not complete after `seconds` seconds."""
        placement, phase = self.context.placement, heartbeat.phase
        try:
            arrived = self._assess_arrived_results() if placement.rank == 0 else []
            if phase == _RENDEZVOUS:
                text = f"not all ranks arrived within {seconds:.0f} s"
                text += f"; this report covers ranks {format_ranges(arrived)}" if arrived else ""
                remedy = (
                    "check the output of each node: did it start its ranks, and can they reach "
                    f"MASTER_ADDR={placement.master_addr} (firewall, interface)?"
                )
            else:
                text = f"rank {placement.rank} on {socket.gethostname()} hangs in {phase!r}"
                remedy = "check the disk and driver of this node (dmesg)"
            self._report.findings[_RENDEZVOUS] = [fail(text, remedy)]
            self.show()
            logger.warning("preflight: %s; %s", text, remedy)
        finally:
            end_process(RankZeroError.exit_code)

    def _run_stage(self, stage: Stage) -> None:
        """Run the probes of a stage, gather the results on rank 0 and assess them. Collective."""
        session, results = self.context.session, dict[str, Any]()
        self._current_checks, self._current_results = stage.checks, results
        probe_all(self.context, stage.checks, results)
        self.context.beat(
            _RENDEZVOUS if stage is BEFORE_TORCH else f"after {stage.checks[-1].name}"
        )
        gathered = session.gather_objects(results)
        if gathered is not None:
            self._hosts = [rank_results[_HOST] for rank_results in gathered]
            self._report.add(stage.checks, gathered, self._hosts, self.context.plan)

    def _reason_to_skip(self, stage: Stage) -> str:
        """Return why this stage is skipped, and add it to the report; empty if it is to run."""
        failed = [
            check.name for check in stage.requires if self._report.level_of(check.name) == "fail"
        ]
        reason = f"{' and '.join(failed)} failed" if failed else ""
        if stage.needs_several_ranks and self.context.placement.world_size == 1:
            reason = "there is only one process; start it with `deepspeed`, torchrun or srun"
        if reason:
            self._report.skipped |= {check.name: reason for check in stage.checks}
        return reason

    def _assess_arrived_results(self) -> list[int]:
        """Assess the stage in progress with the results that have arrived, and return their ranks.

        If rank 0 has gathered nothing yet, its own results are used.
        """
        gathered = self.context.session.gathered_so_far()
        # A probe may itself gather, as the clock's does; the gathered values are then None.
        by_rank = [gathered.get(rank) or {} for rank in range(self.context.placement.world_size)]
        by_rank[0] = by_rank[0] or self._current_results
        for rank, rank_results in enumerate(by_rank):
            self._hosts[rank] = rank_results.get(_HOST, self._hosts[rank])
        for check in self._current_checks:
            if any(check.name in rank_results for rank_results in by_rank):
                # An assessment that needs the result of a missing rank raises one of these errors.
                with suppress(KeyError, TypeError, AttributeError, ValueError):
                    self._report.add([check], by_rank, self._hosts, self.context.plan)
        return [rank for rank, rank_results in enumerate(by_rank) if rank_results]


def probe_all(context: RankContext, checks: Sequence[Check], results: dict[str, Any]) -> None:
    """Run the probes of this rank, and add its host name and their results to `results`.

    The results are added one by one, so that the report has them even if a probe hangs. The result
    of a probe that raised is {ERROR: message}.
    """
    results[_HOST] = socket.gethostname()
    for check in checks:
        # A check that does not run here also counts as a heartbeat. The watchdog compares the
        # numbers of heartbeats of the ranks, which must be equal in the same phase.
        context.beat(check.name)
        if not check.applies_to(context):
            continue
        try:
            results[check.name] = check.probe(context)
        except UserError as error:
            results[check.name] = {ERROR: str(error)}
        except (RuntimeError, OSError, ImportError) as error:  # from a device, a disk or a library
            results[check.name] = {ERROR: f"{type(error).__name__}: {_first_line(error)}"}


def probe_first_stage(context: RankContext) -> dict[str, Any]:
    """This rank's results of the first stage, for `assess_first_stage` after the rendezvous.

    Raises UserError if the rendezvous port is in use. `assess_first_stage` reports other errors.
    """
    results = dict[str, Any]()
    probe_all(context, BEFORE_TORCH.checks, results)
    if isinstance(port := results.get("port"), dict):
        raise UserError(port[ERROR])
    return results


def assess_first_stage(context: RankContext, results: Mapping[str, Any]) -> None:
    """Gather and assess the results of `probe_first_stage`, and log warnings. Collective.

    Raises UserError on all ranks if a check fails.
    """
    gathered = context.session.gather_objects(results)

    def assess() -> list[str]:
        assert gathered is not None, "rank 0 has the results"
        report, hosts = Report(), [rank_results[_HOST] for rank_results in gathered]
        report.add(BEFORE_TORCH.checks, gathered, hosts, context.plan)
        if failed := report.failed():
            lines = "\n".join(report.warnings())
            raise UserError(f"{lines}\npreflight: {', '.join(failed)}")
        return report.warnings()

    for line in context.session.rank_zero_first(assess):
        logger.info(line)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
