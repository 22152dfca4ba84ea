"""Time line of a run: starts, resumes, stops, failures and steps without an update."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

from pipeline.report import text
from pipeline.report.curves import Marks
from pipeline.report.folder import Record, RunRecords, mapping, number

_MAX_SPANS = 500  # ranges of skipped steps that charts mark; the time line has their total number
_SHOWN_SPANS = 10
_ENDS = {  # final state of a start -> text
    "done": "finished", "stopped": "stopped", "failed": "failed", "killed": "killed",
    "dead": "ended without a last status",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event of a run. `kind` is its CSS class: done, stopped, failed or running."""

    time: str
    step: str
    what: str
    kind: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The events of a run, and the steps that charts mark."""

    events: list[Event]
    marks: Marks


def timeline_of(run: RunRecords) -> Timeline:
    """The time line, as far as status.json and metrics.jsonl have it."""
    skipped = _spans([r["step"] for r in run.steps if r.get("was_applied") is False])
    infinite = _spans(
        [step for step, loss in zip(*run.measured("loss"), strict=True) if not isfinite(loss)]
    )
    starts = starts_of(run)
    resumed = [step for start in starts if (step := number(start.get("first_step")))]
    events = [event for start in starts for event in _events_of_start(start)]
    events += _event_of_steps("without an update: a gradient was not finite", "stopped", skipped)
    events += _event_of_steps("with a loss that is not finite", "failed", infinite)
    return Timeline(events=events, marks=Marks(resumed=resumed, skipped=skipped[:_MAX_SPANS]))


def starts_of(run: RunRecords) -> list[Record]:
    """The starts of the run, oldest first; the last one is described by the status itself."""
    earlier = run.status.get("earlier_starts")
    starts = [mapping(start) for start in earlier] if isinstance(earlier, list) else []
    present = {**run.status, "state": run.state}
    return [*starts, present] if run.status else []


def wall_seconds(run: RunRecords) -> float | None:
    """Seconds of all starts together; None if the times of a start are unknown."""
    total = 0.0
    for start in starts_of(run):
        end = start.get("ended") or start.get("heartbeat")
        if (seconds := text.seconds_between(start.get("started"), end)) is None:
            return None
        total += seconds
    return total or None


def _events_of_start(start: Record) -> Iterator[Event]:
    first, state = number(start.get("first_step")), str(start.get("state") or "")
    if "started" in start:
        what = f"resumed from step {first:,.0f}" if first else "started"
        step = f"{first:,.0f}" if first is not None else ""
        yield Event(time=text.moment(start["started"]), step=step, what=what, kind="running")
    if state in _ENDS:
        last = number(start.get("step"))
        code = start.get("exit_code")
        reason = str(start.get("reason") or "")
        yield Event(
            time=text.moment(start.get("ended") or start.get("heartbeat")),
            step="" if last is None else f"{last:,.0f}",
            what=_ENDS[state] + (f" (exit code {code})" if code else ""),
            kind="failed" if state in ("killed", "dead") else state,
            reason=reason,
        )


def _event_of_steps(what: str, kind: str, spans: list[tuple[float, float]]) -> Iterator[Event]:
    """One event for all these steps; none if there are no such steps."""
    if not spans:
        return
    count = sum(last - first + 1 for first, last in spans)
    listed = [f"{a:,.0f}" if a == b else f"{a:,.0f} to {b:,.0f}" for a, b in spans[:_SHOWN_SPANS]]
    more = f" and {len(spans) - _SHOWN_SPANS:,} more groups" if len(spans) > _SHOWN_SPANS else ""
    plural = "s" if count > 1 else ""
    yield Event(
        time="",
        step=f"{spans[0][0]:,.0f}",
        what=f"{count:,.0f} step{plural} {what}",
        kind=kind,
        reason=f"step{plural} {', '.join(listed)}{more}",
    )


def _spans(steps: list[float]) -> list[tuple[float, float]]:
    """Consecutive steps as (first, last)."""
    if not steps:
        return []
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(steps)) if b != a + 1]
    edges = [0, *breaks, len(steps)]
    return [(steps[a], steps[b - 1]) for a, b in pairwise(edges)]
