"""Check: a probe that runs on ranks, and an assessment of its results on rank 0. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.plan.given.hardware import GIB
from pipeline.plan.plan import Plan
from pipeline.preflight.context import RankContext

Level = Literal["ok", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("ok", "warn", "fail")
UNKNOWN_HOST = "?"  # host name of a rank that has not reported
_ABSENT = "(missing)"
_MAX_DIFFERENCES = 12


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    `text`: the fact. `ranks`: the ranks that it concerns; empty if it concerns all ranks.
    """

    level: Level
    text: str
    remedy: str = ""
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ProbeResults:
    """Results of the probe of one check.

    `by_rank`: result of each rank that ran the probe. `hosts`: host name of every rank.
    """

    by_rank: Mapping[int, Any]
    hosts: Sequence[str]
    plan: Plan | None = None

    @property
    def first(self) -> Any:
        """The result of the lowest rank that ran the probe."""
        return self.by_rank[min(self.by_rank)]

    @property
    def num_nodes(self) -> int:
        """Number of different host names among the ranks that have reported."""
        return len(set(self.hosts) - {UNKNOWN_HOST})

    def where(self, ranks: Iterable[int]) -> str:
        """Text that locates ranks, such as `ranks 0-3, 8 (node1, node2)`."""
        listed = sorted(ranks)
        names = ", ".join(dict.fromkeys(self.hosts[rank] for rank in listed))
        return f"rank{'s' if len(listed) > 1 else ''} {spans(listed)} ({names})"


@dataclass(frozen=True)
class Check:
    """One check. checks.py lists all checks; docs/preflight.md explains them in the same order.

    `probe`: returns JSON values. It raises UserError for a failure that does not depend on the
    results of other ranks. `runs_on`: where the probe runs: on every rank, on local rank 0 of each
    node, or on rank 0. `assess`: returns the findings; it is pure and runs on rank 0. `remedy`:
    shown with an error of the probe whose message has no remedy. `needs`: what must be available
    for the probe.
    """

    name: str
    probe: Callable[[RankContext], Any]
    assess: Callable[[ProbeResults], Iterable[Finding]]
    remedy: str
    runs_on: Literal["rank", "node", "rank 0"] = "rank"
    needs: Literal["nothing", "settings", "plan"] = "plan"

    def applies_to(self, context: RankContext) -> bool:
        """Whether this rank runs the probe."""
        place = context.placement
        runs_here = {"rank": True, "node": place.local_rank == 0, "rank 0": place.rank == 0}
        available = {"nothing": True, "settings": context.settings, "plan": context.plan}
        return runs_here[self.runs_on] and bool(available[self.needs])


def ok(text: str) -> Finding:
    """A finding that needs no action."""
    return Finding(level="ok", text=text)


def warn(text: str, remedy: str, ranks: Iterable[int] = ()) -> Finding:
    """A finding for a run that will work, but more slowly than possible or with little memory."""
    return Finding(level="warn", text=text, remedy=remedy, ranks=tuple(sorted(ranks)))


def fail(text: str, remedy: str, ranks: Iterable[int] = ()) -> Finding:
    """A finding for a run that will fail or give wrong results."""
    return Finding(level="fail", text=text, remedy=remedy, ranks=tuple(sorted(ranks)))


def spans(numbers: Sequence[int]) -> str:
    """Text for sorted numbers, with ranges: `0-3, 8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def in_units(num_bytes: float) -> str:
    """Text for a number of bytes, in GiB, MiB or KiB."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 2**10:,.0f} KiB"


def ranks_by_value(values: Mapping[int, str]) -> dict[str, list[int]]:
    """Value -> the ranks that have it, the most frequent value first."""
    groups: dict[str, list[int]] = {}
    for rank in sorted(values):
        groups.setdefault(values[rank], []).append(rank)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested JSON flattened to `{"a.b": text}`, the input of `compare`."""
    if not isinstance(values, Mapping):
        return {prefix: str(values)}
    result: dict[str, str] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return result


def compare(results: ProbeResults, text: str, remedy: str) -> Iterable[Finding]:
    """A finding with `text` if all ranks have equal results, else a table of the differences.

    The result of each rank is a mapping returned by `flat`.
    """
    keys = list(dict.fromkeys(key for result in results.by_rank.values() for key in result))
    lines, minority, num_different = "", set[int](), 0
    for key in keys:
        groups = ranks_by_value({r: v.get(key, _ABSENT) for r, v in results.by_rank.items()})
        if len(groups) == 1:
            continue
        num_different += 1
        for i, (value, ranks) in enumerate(groups.items()):
            minority |= set(ranks) if i else set()
            if num_different <= _MAX_DIFFERENCES:
                lines += f"\n{'' if i else key:<34}  {value:<24} {results.where(ranks)}"
    if not num_different:
        yield ok(text)
        return
    if num_different > _MAX_DIFFERENCES:
        lines += f"\nand {num_different - _MAX_DIFFERENCES} more"
    yield fail(f"different on some ranks{lines}", remedy, minority)
