"""What a preflight has found, as text and as JSON. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.plan.plan import Plan
from pipeline.preflight.check import LEVELS, Finding, Level, ProbeResults, by_answer, fail
from pipeline.preflight.table import Check

# Without these there is no run to look at.
PLANNED = ("settings", "plan")
# A look that raised; no check answers with a mapping of this key alone.
ERROR = "error"


@dataclass(kw_only=True)
class Report:
    """Findings by check, in the order in which they were made; `left_out`: why a check was not."""

    findings: dict[str, list[Finding]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(
        self,
        checks: Sequence[Check],
        answers: Sequence[Mapping[str, Any]],
        hosts: Sequence[str],
        plan: Plan | None,
    ) -> None:
        """Judge the answers of all ranks, by rank and by check."""
        for check in checks:
            given = {r: found[check.name] for r, found in enumerate(answers) if check.name in found}
            if not given:  # none of the ranks that look has a plan
                self.left_out[check.name] = f"{', '.join(self.failed(PLANNED))} first"
            elif found := list(_judged(check, ProbeResults(answers=given, hosts=hosts, plan=plan))):
                self.findings[check.name] = found
            else:
                self.left_out[check.name] = "nothing to look at in this run"

    def level_of(self, name: str) -> Level:
        """The worst that a check has said; ok where it was left out."""
        said = [finding.level for finding in self.findings.get(name, [])]
        return max(said, key=LEVELS.index, default="ok")

    def failed(self, names: Iterable[str] | None = None) -> list[str]:
        """Those of the checks, or of all, that fail."""
        asked = self.findings if names is None else names
        return [name for name in asked if self.level_of(name) == "fail"]

    @property
    def verdict(self) -> Level:
        """The worst of all."""
        return max((self.level_of(name) for name in self.findings), key=LEVELS.index, default="ok")

    def text(self) -> str:
        """A line a finding, its remedy below it; then what was left out, and the verdict."""
        lines = [line for name, found in self.findings.items() for line in _lines(name, found)]
        for reason, names in _by_reason(self.left_out).items():
            lines.append(f"not checked  {', '.join(names)}: {reason}")
        failed = self.failed()
        total = len(self.findings)
        if failed:
            lines.append(f"{len(failed)} of {total} checks fail: {', '.join(failed)}")
        else:
            warned = [name for name in self.findings if self.level_of(name) == "warn"]
            rest = f", {len(warned)} with a warning: {', '.join(warned)}" if warned else ""
            lines.append(f"{total} checks passed{rest}")
        return "\n".join(lines)

    def as_json(self, hosts: Sequence[str]) -> dict[str, Any]:
        """The same as data; a finding without ranks concerns all."""
        return {
            "verdict": self.verdict,
            "hosts": list(hosts),
            "findings": [
                {"check": name} | asdict(finding)
                for name, found in self.findings.items()
                for finding in found
            ],
            "not_checked": self.left_out,
        }


def warnings(report: Report) -> list[str]:
    """Lines of a report that are not ok."""
    return [
        line
        for name, found in report.findings.items()
        for line in _lines(name, [finding for finding in found if finding.level != "ok"])
    ]


def _judged(check: Check, seen: ProbeResults) -> Iterable[Finding]:
    """What the check says, or its looks' errors: once for ranks with the same one."""
    errors = {
        rank: answer[ERROR]
        for rank, answer in seen.answers.items()
        if isinstance(answer, dict) and set(answer) == {ERROR}
    }
    if not errors:
        yield from check.judge(seen)
        return
    for message, ranks in by_answer(errors).items():
        text, remedy = _parted(message)
        where = "" if len(ranks) == len(seen.hosts) else f"{seen.where(ranks)}: "
        yield fail(f"{where}{text}", remedy or check.otherwise, ranks)


def _parted(message: str) -> tuple[str, str]:
    """What was found and what would work, as messages for users are made; the latter may miss."""
    text, _, remedy = message.rpartition("; ")
    is_remedy = text and not remedy.startswith("found ") and "\n" not in message
    return (text, remedy) if is_remedy else (message, "")


def _lines(name: str, found: Iterable[Finding]) -> Iterable[str]:
    for finding in found:
        first, *more = finding.text.splitlines()
        yield f"{finding.level:<5} {name:<15} {first}"
        yield from (f"{'':<21} {line}" for line in more)
        if finding.remedy:
            yield f"{'':<21} -> {finding.remedy}"


def _by_reason(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return reasons
