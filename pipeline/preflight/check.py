"""`Check`: one check of a preflight, which is the test of a run before training.

A check has two functions. Its probe runs on the ranks and measures or reads something there. Its
assessment runs on rank 0, gets the results of all ranks, and returns findings for the report.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.plan.given.hardware import GIB
from pipeline.plan.plan import Plan
from pipeline.preflight.context import RankContext

Level = Literal["ok", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("ok", "warn", "fail")
UNKNOWN_HOST = "?"  # host name of a rank whose results have not arrived at rank 0
_MISSING_VALUE = "(missing)"  # shown for a rank whose result lacks a key that other ranks have
_MAX_SHOWN_DIFFERENCES = 12


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    `text`: the fact. `remedy`: an action that would solve the problem. `ranks`: the ranks that the
    finding concerns; empty if it concerns all ranks.
    """

    level: Level
    text: str
    remedy: str = ""
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ProbeResults:
    """Results of the probe of one check.

    `by_rank`: result of each rank that ran the probe. `hosts[rank]`: host name of the rank. `plan`:
    the plan that rank 0 computed, None if planning failed.
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
        """Number of different host names among the ranks whose results have arrived."""
        return len(set(self.hosts) - {UNKNOWN_HOST})

    def name_ranks(self, ranks: Iterable[int]) -> str:
        """Ranks with their host names as text, such as `ranks 0-3, 8 (node1, node2)`."""
        ordered = sorted(ranks)
        hosts = ", ".join(dict.fromkeys(self.hosts[rank] for rank in ordered))
        return f"rank{'s' if len(ordered) > 1 else ''} {format_ranges(ordered)} ({hosts})"


@dataclass(frozen=True)
class Check:
    """One check. checks.py lists all checks; docs/preflight.md explains them in the same order.

    `probe`: returns JSON values, or raises UserError for a failure that this rank detects alone.
    `runs_on`: which ranks run the probe: every rank, local rank 0 of each node, or rank 0.
    `assess`: returns the findings from the results of the ranks. It runs on rank 0 and has no side
    effects. `remedy`: shown if the probe raises an error whose message has no remedy. `needs`: the
    probe is skipped if the settings or the plan are needed and could not be computed.
    """

    name: str
    probe: Callable[[RankContext], Any]
    assess: Callable[[ProbeResults], Iterable[Finding]]
    remedy: str
    runs_on: Literal["rank", "node", "rank 0"] = "rank"
    needs: Literal["nothing", "settings", "plan"] = "plan"

    def applies_to(self, context: RankContext) -> bool:
        """Whether this rank runs the probe."""
        if self.runs_on == "node" and context.placement.local_rank != 0:
            return False
        if self.runs_on == "rank 0" and context.placement.rank != 0:
            return False
        if self.needs == "settings":
            return context.settings is not None
        return self.needs == "nothing" or context.plan is not None


def ok(text: str) -> Finding:
    """A finding that needs no action."""
    return Finding(level="ok", text=text)


def warn(text: str, remedy: str, ranks: Iterable[int] = ()) -> Finding:
    """A finding for a run that will work, but more slowly than possible or with little memory."""
    return Finding(level="warn", text=text, remedy=remedy, ranks=tuple(sorted(ranks)))


def fail(text: str, remedy: str, ranks: Iterable[int] = ()) -> Finding:
    """A finding for a run that will fail or give wrong results."""
    return Finding(level="fail", text=text, remedy=remedy, ranks=tuple(sorted(ranks)))


def format_ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as text with ranges, e.g. [0, 1, 2, 3, 8] -> `0-3, 8`."""
    ranges: list[tuple[int, int]] = []  # first and last number of each range
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def format_bytes(num_bytes: float) -> str:
    """A number of bytes as text, in GiB, MiB or KiB."""
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


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings for `compare`, e.g. {"a": {"b": 1}} -> {"a.b": "1"}."""
    if not isinstance(values, Mapping):
        return {prefix: str(values)}
    result: dict[str, str] = {}
    for key, value in values.items():
        result |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return result


def compare(results: ProbeResults, text: str, remedy: str) -> Iterable[Finding]:
    """An `ok` finding with `text` if all ranks have equal results, else a failure.

    The result of each rank is a mapping of keys to texts. The failure has a table of the keys whose
    values differ. It concerns the ranks that lack the most frequent value of a key.
    """
    keys = dict.fromkeys(key for result in results.by_rank.values() for key in result)
    lines, deviating_ranks, num_different = "", set[int](), 0
    for key in keys:
        values = {rank: result.get(key, _MISSING_VALUE) for rank, result in results.by_rank.items()}
        groups = ranks_by_value(values)
        if len(groups) == 1:
            continue
        num_different += 1
        for i, (value, ranks) in enumerate(groups.items()):
            if i > 0:  # the first group has the most frequent value
                deviating_ranks.update(ranks)
            if num_different <= _MAX_SHOWN_DIFFERENCES:
                lines += f"\n{'' if i else key:<34}  {value:<24} {results.name_ranks(ranks)}"
    if not num_different:
        yield ok(text)
        return
    if num_different > _MAX_SHOWN_DIFFERENCES:
        lines += f"\nand {num_different - _MAX_SHOWN_DIFFERENCES} more"
    yield fail(f"different on some ranks{lines}", remedy, deviating_ranks)
