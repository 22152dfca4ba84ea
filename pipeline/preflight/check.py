"""What a check says, and how what ranks have answered is told in few lines. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.plan.given.hardware import GIB
from pipeline.plan.plan import Plan

Level = Literal["ok", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("ok", "warn", "fail")
_ABSENT = "(not there)"
_MOST_DIFFERENCES = 12


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: what was found, what would work, and whom it concerns (nobody named: all)."""

    level: Level
    text: str
    remedy: str = ""
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ProbeResults:
    """What a check found on each rank that looked; `hosts`: every rank's machine, by rank."""

    answers: Mapping[int, Any]
    hosts: Sequence[str]
    plan: Plan | None = None

    @property
    def num_machines(self) -> int:
        """Machines by their names."""
        return len(set(self.hosts))

    def where(self, ranks: Iterable[int]) -> str:
        """`ranks 0-3, 8 (node1, node2)`."""
        listed = sorted(ranks)
        names = ", ".join(dict.fromkeys(self.hosts[rank] for rank in listed))
        return f"rank{'s' if len(listed) > 1 else ''} {spans(listed)} ({names})"


def ok(text: str) -> Finding:
    """All is well."""
    return Finding(level="ok", text=text)


def warn(text: str, remedy: str, ranks: Iterable[int] = ()) -> Finding:
    """It will run, worse than it could."""
    return Finding(level="warn", text=text, remedy=remedy, ranks=tuple(sorted(ranks)))


def fail(text: str, remedy: str, ranks: Iterable[int] = ()) -> Finding:
    """It will not run, or not right."""
    return Finding(level="fail", text=text, remedy=remedy, ranks=tuple(sorted(ranks)))


def spans(numbers: Sequence[int]) -> str:
    """Sorted numbers, neighbours drawn together: `0-3, 8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def in_units(num_bytes: float) -> str:
    """Bytes as a person reads them."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 2**10:,.0f} KiB"


def by_answer(answers: Mapping[int, str]) -> dict[str, list[int]]:
    """Ranks that gave each answer, the answer of most ranks first."""
    groups: dict[str, list[int]] = {}
    for rank in sorted(answers):
        groups.setdefault(answers[rank], []).append(rank)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested JSON as `a.b: text`, so that two of them can be compared line by line."""
    if not isinstance(values, Mapping):
        return {prefix: str(values)}
    found: dict[str, str] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def compare(seen: ProbeResults, same: str, remedy: str) -> Iterable[Finding]:
    """`same` where every rank answered alike, else a failure with a table of what differs.

    Answers are mappings of text, as `flat` gives them.
    """
    keys = list(dict.fromkeys(key for answer in seen.answers.values() for key in answer))
    rows, strangers = [], set[int]()
    for key in keys:
        groups = by_answer({r: answer.get(key, _ABSENT) for r, answer in seen.answers.items()})
        if len(groups) == 1:
            continue
        usual, *others = groups
        strangers |= {rank for value in others for rank in groups[value]}
        rows.append((key, [(value, seen.where(groups[value])) for value in (usual, *others)]))
    if not rows:
        yield ok(same)
        return
    lines = [
        f"\n{key if first else '':<34}  {value:<24} {where}"
        for key, values in rows[:_MOST_DIFFERENCES]
        for first, (value, where) in zip([True] + [False] * len(values), values, strict=False)
    ]
    more = len(rows) - _MOST_DIFFERENCES
    tail = f"\nand {more} more" if more > 0 else ""
    yield fail(f"not the same on all ranks{''.join(lines)}{tail}", remedy, strangers)
