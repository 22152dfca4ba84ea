"""Timeline of a run: starts, resumes, stops, failures and steps without an update."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

from pipeline.report import text
from pipeline.report.curves import Marks
from pipeline.report.folder import Record, RunRecords, dict_or_empty, float_or_none

# A range of steps is a pair of its first and last step.
_MAX_MARKED_RANGES = 500  # of skipped steps, in the charts
_MAX_LISTED_RANGES = 10  # in the text of an event, which also has the number of all steps
_ENDS = {  # final state of a start -> text
    "done": "finished", "stopped": "stopped", "failed": "failed", "killed": "killed",
    "dead": "ended without a last status",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event of a run.

    `text`: description for the reader. `kind`: CSS class, which sets the colour: done, stopped,
    failed or running.
    """

    time: str
    step: str
    text: str
    kind: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The events of a run, and the steps that charts mark."""

    events: list[Event]
    marks: Marks


def timeline_of(run: RunRecords) -> Timeline:
    """The timeline, as far as status.json and metrics.jsonl have it."""
    skipped = _ranges([line["step"] for line in run.steps if line.get("was_applied") is False])
    losses = zip(*run.measured("loss"), strict=True)
    not_finite = _ranges([step for step, loss in losses if not isfinite(loss)])
    starts = starts_of(run)
    resumed = [step for start in starts if (step := float_or_none(start.get("first_step")))]
    events = [event for start in starts for event in _events_of_start(start)]
    events += _event_of_steps("without an update: a gradient was not finite", "stopped", skipped)
    events += _event_of_steps("with a loss that is not finite", "failed", not_finite)
    marks = Marks(resumed=resumed, skipped=skipped[:_MAX_MARKED_RANGES])
    return Timeline(events=events, marks=marks)


def starts_of(run: RunRecords) -> list[Record]:
    """The starts of the run, oldest first.

    `earlier_starts` of status.json has all but the last; the status itself describes the last.
    """
    earlier = run.status.get("earlier_starts")
    starts = [dict_or_empty(start) for start in earlier] if isinstance(earlier, list) else []
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
    """The beginning of a start and, unless it is running, its end."""
    first_step, state = float_or_none(start.get("first_step")), str(start.get("state") or "")
    if "started" in start:
        description = f"resumed from step {first_step:,.0f}" if first_step else "started"
        step = f"{first_step:,.0f}" if first_step is not None else ""
        yield Event(time=text.moment(start["started"]), step=step, text=description, kind="running")
    if state in _ENDS:
        last_step = float_or_none(start.get("step"))
        code = start.get("exit_code")
        reason = str(start.get("reason") or "")
        yield Event(
            time=text.moment(start.get("ended") or start.get("heartbeat")),
            step="" if last_step is None else f"{last_step:,.0f}",
            text=_ENDS[state] + (f" (exit code {code})" if code else ""),
            kind="failed" if state in ("killed", "dead") else state,
            reason=reason,
        )


def _event_of_steps(
    description: str, kind: str, ranges: list[tuple[float, float]]
) -> Iterator[Event]:
    """One event for all steps of these ranges; no event without steps."""
    if not ranges:
        return
    count = sum(last - first + 1 for first, last in ranges)
    listed = [
        f"{first:,.0f}" if first == last else f"{first:,.0f} to {last:,.0f}"
        for first, last in ranges[:_MAX_LISTED_RANGES]
    ]
    num_more = len(ranges) - len(listed)
    more = f" and {num_more:,} more groups" if num_more else ""
    plural = "s" if count > 1 else ""
    yield Event(
        time="",
        step=f"{ranges[0][0]:,.0f}",
        text=f"{count:,.0f} step{plural} {description}",
        kind=kind,
        reason=f"step{plural} {', '.join(listed)}{more}",
    )


def _ranges(steps: list[float]) -> list[tuple[float, float]]:
    """First and last step of each range of consecutive steps; `steps` is sorted."""
    if not steps:
        return []
    gaps = [i + 1 for i, (step, following) in enumerate(pairwise(steps)) if following != step + 1]
    offsets = [0, *gaps, len(steps)]
    return [(steps[start], steps[end - 1]) for start, end in pairwise(offsets)]
