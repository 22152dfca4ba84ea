"""Preflight from start to verdict, on every rank; and the part of it that training makes itself."""

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.cluster.devices import detect_hardware, missing_gpus, set_environment
from pipeline.cluster.placement import from_environment
from pipeline.cluster.session import Session
from pipeline.errors import RankZeroError, UserError
from pipeline.files import dump_json
from pipeline.plan.plan import Plan
from pipeline.preflight.check import Finding, fail, spans
from pipeline.preflight.context import RankContext
from pipeline.preflight.limit import Limit
from pipeline.preflight.report import ERROR, PLANNED, Report, warnings
from pipeline.preflight.table import CHEAP, STAGES, Check

# A stage that works takes seconds; what hangs does so for ever.
_LIMIT_S = 60.0
# Checks without which a stage would not work, or hang.
_NEEDED: dict[str, tuple[str, ...]] = {
    "before torch": (),
    "together": PLANNED,
    "content": (*PLANNED, "versions", "model"),
    "device": (*PLANNED, "versions", "gpus"),
    "process group": (*PLANNED, "versions", "ranks", "gpus", "network", "libraries"),
    "links": (*PLANNED, "versions", "ranks", "gpus", "network", "libraries", "process group"),
}
_OF_SEVERAL = ("process group", "links")
_HOST = "host"


def preflight(
    run_file: Path, overrides: Sequence[str], *, as_json: bool = False, limit_s: float = _LIMIT_S
) -> None:
    """Check a run on every rank that a launcher has started, or on this machine alone.

    Rank 0 prints the report. Raises UserError on every rank where a check fails.
    """
    out, hardware = sys.stdout, detect_hardware()
    placement = from_environment(os.environ, may_be_alone=True)
    unseen = missing_gpus(placement, hardware)
    set_environment(placement, hardware)
    session, report, stage = Session(placement, hardware), Report(), _Stage()
    hosts = [socket.gethostname()] * placement.world_size

    def show() -> None:
        if session.is_rank_zero:
            text = dump_json(report.as_json(hosts)) if as_json else f"{report.text()}\n"
            out.write(text)
            out.flush()

    def end(where: str, behind: list[int]) -> None:
        if session.is_rank_zero:
            there: list[int] = []
            try:
                there = stage.add_to(report, session.gathered_so_far(), hosts)
            finally:
                # Last: rank 0 may have found the same check good.
                report.findings[where] = [_hangs(behind, hosts, there)]
                show()
        else:
            print(_not_over(session, where), file=sys.stderr, flush=True)  # noqa: T201 - last words

    # Libraries greet on the standard output, which is for the report.
    with redirect_stdout(sys.stderr), Limit(session, limit_s, end) as limit, session:
        context = RankContext.read(
            run_file,
            overrides,
            placement=placement,
            hardware=hardware,
            session=session,
            beat=limit.beat,
            missing_gpus=unseen,
        )
        try:
            failed = _examine(context, limit, report, hosts, stage)
        except UserError:
            show()
            raise
    show()
    if failed:
        raise UserError(f"preflight: {', '.join(failed)}: see the report")


@dataclass(kw_only=True)
class _Stage:
    """What rank 0 has found in the stage that is under way."""

    checks: Sequence[Check] = ()
    found: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    have_met: bool = False

    def add_to(self, report: Report, answers: Mapping[int, Any], hosts: list[str]) -> list[int]:
        """Judge what is there where the stage does not end; the ranks whose answers are.

        `answers`: of those that have given. `hosts` of ranks never heard of become `?`.
        """
        # A look may gather, too, and gives None.
        by_rank = [answers.get(rank) or {} for rank in range(len(hosts))]
        by_rank[0] = by_rank[0] or self.found
        if not self.have_met:
            hosts[1:] = ["?"] * (len(hosts) - 1)
        hosts[:] = [answer.get(_HOST, host) for answer, host in zip(by_rank, hosts, strict=True)]
        for check in self.checks:
            if any(check.name in found for found in by_rank):
                # A judge may need a rank that is not there.
                with suppress(KeyError, TypeError, AttributeError, ValueError, StopIteration):
                    report.add([check], by_rank, hosts, self.plan)
        return [rank for rank, answer in enumerate(by_rank) if answer]


def _examine(
    context: RankContext, limit: Limit, report: Report, hosts: list[str], under_way: _Stage
) -> list[str]:
    """Stage after stage, as far as all ranks can go. Collective; the same result on all."""
    session = context.session
    for stage, checks in STAGES.items():
        is_first = stage == "before torch"  # ranks have not met, and nothing can rule it out
        why_not = partial(_why_not, context, report, stage, checks)
        if not is_first and session.rank_zero_first(why_not):
            continue
        found = dict[str, Any]()
        under_way.checks, under_way.found, under_way.plan = checks, found, context.plan
        for check in checks:
            context.beat(check.name)
            if _is_for(check, context):
                found[check.name] = _look(check, context)
        context.beat(f"after {checks[-1].name}")
        answers = _gather(context, report, found | {_HOST: socket.gethostname()}, checks)
        if is_first:
            limit.met()
            under_way.have_met = True
        if answers is not None:
            hosts[:] = [answer[_HOST] for answer in answers]
            report.add(checks, answers, hosts, context.plan)
    failed: list[str] = session.rank_zero_first(report.failed)
    return failed


def _gather(
    context: RankContext, report: Report, found: Mapping[str, Any], checks: Sequence[Check]
) -> list[Any] | None:
    """All ranks' answers on rank 0. Raises UserError where the ranks do not meet."""
    try:
        return context.session.gather_objects(found)
    except (RuntimeError, RankZeroError) as error:  # the port is taken, the host is not there
        place = context.placement
        report.add(checks, [found], [found[_HOST]] * place.world_size, context.plan)
        text = f"the ranks do not meet at {place.master_addr}:{place.master_port}"
        said = str(error).strip().partition("\n")[0]
        remedy = "look at the lines above, and at firewalls between the machines"
        report.findings["meeting"] = [fail(f"{text}: {said}", remedy)]
        raise UserError(f"rank {place.rank} on {found[_HOST]}: {text}; {remedy}") from None


def _why_not(context: RankContext, report: Report, stage: str, checks: Sequence[Check]) -> str:
    """Why a stage is left out; empty where it is not. On rank 0, which notes it."""
    failed = report.failed(_NEEDED[stage])
    reason = f"{', '.join(failed)} first" if failed else ""
    if stage in _OF_SEVERAL and context.placement.world_size == 1:
        reason = "one process; under `deepspeed`, torchrun or srun they are"
    if reason:
        report.left_out |= {check.name: reason for check in checks}
    return reason


def _is_for(check: Check, context: RankContext) -> bool:
    """Whether this rank looks."""
    place = context.placement
    is_asked = {"rank": True, "machine": place.local_rank == 0, "first": place.rank == 0}[check.by]
    there = {"nothing": True, "settings": context.settings, "plan": context.plan}[check.needs]
    return is_asked and bool(there)


def _look(check: Check, context: RankContext) -> Any:
    """The check's answer, or its error: what fails on one rank is told beside the others'."""
    try:
        return check.look(context)
    except UserError as error:
        return {ERROR: str(error)}
    except (RuntimeError, OSError, ImportError) as error:  # of a device, a disk, a library
        said = str(error).strip().partition("\n")[0]
        return {ERROR: f"{type(error).__name__}: {said}"}


def _hangs(behind: list[int], hosts: Sequence[str], there: Sequence[int]) -> Finding:
    """`there`: ranks whose answers are judged."""
    if not behind:
        return fail(
            f"not all ranks have come in time; here, and judged, are ranks {spans(there)}",
            "look at the output of each machine: which has started no rank, or cannot reach "
            "MASTER_ADDR (firewall, interface)",
        )
    names = ", ".join(dict.fromkeys(hosts[rank] for rank in behind))
    return fail(
        f"not over in time on ranks {spans(behind)} ({names})",
        "look there: a disk, a driver or a link does not answer (NCCL_DEBUG=INFO; dmesg)",
        behind,
    )


def _not_over(session: Session, where: str) -> str:
    place = session.placement
    return (
        f"preflight: rank {place.rank} on {socket.gethostname()} has not come further than "
        f"{where!r}; rank 0 at {place.master_addr}:{place.master_port} says why, if it can"
    )


def probe_before_torch(context: RankContext) -> dict[str, Any]:
    """This rank's answers and its machine; training gathers them when the ranks have met.

    Raises UserError where they could not meet; whatever else is wrong is told to all by rank 0.
    """
    found = {check.name: _look(check, context) for check in CHEAP if _is_for(check, context)}
    if isinstance(port := found.get("port"), dict):
        raise UserError(port[ERROR])
    return found | {_HOST: socket.gethostname()}


def require_fit(context: RankContext, found: Mapping[str, Any]) -> list[str]:
    """Judge what all ranks have found so: lines of warning. Collective.

    Raises UserError on every rank, with what fails.
    """
    answers = context.session.gather_objects(found)

    def judge() -> list[str]:
        assert answers is not None, "rank 0 has them"
        report = Report()
        report.add(CHEAP, answers, [answer[_HOST] for answer in answers], context.plan)
        if failed := report.failed():
            lines = "\n".join(warnings(report))
            raise UserError(f"{lines}\npreflight: {', '.join(failed)}")
        return warnings(report)

    lines: list[str] = context.session.rank_zero_first(judge)
    return lines
