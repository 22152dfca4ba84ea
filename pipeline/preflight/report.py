"""The report of a preflight: findings of the checks by name, as text and as JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.plan.plan import Plan
from pipeline.preflight.check import (
    LEVELS,
    Check,
    Finding,
    Level,
    ProbeResults,
    fail,
    ranks_by_value,
)

# The result of a probe that raised an exception is {ERROR: message}. No other result has ERROR as
# its only key.
ERROR = "error"
_REQUIRED = ("settings", "plan")  # checks on which most other checks depend


@dataclass(kw_only=True)
class Report:
    """The report of a preflight.

    `findings`: name of a check -> its findings. `skipped`: name of a check -> reason why it has no
    findings.
    """

    findings: dict[str, list[Finding]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(
        self,
        checks: Sequence[Check],
        results: Sequence[Mapping[str, Any]],
        hosts: Sequence[str],
        plan: Plan | None,
    ) -> None:
        """Assess the results of all ranks, `results[rank][check name]`, and add the findings."""
        for check in checks:
            by_rank = {
                rank: rank_results[check.name]
                for rank, rank_results in enumerate(results)
                if check.name in rank_results
            }
            if not by_rank:  # no rank could run the probe: it needs settings or a plan
                failed = [name for name in _REQUIRED if self.level_of(name) == "fail"]
                self.skipped[check.name] = f"{' and '.join(failed)} failed"
                continue
            findings = _findings_of(check, ProbeResults(by_rank=by_rank, hosts=hosts, plan=plan))
            if findings:
                self.findings[check.name] = findings
            else:
                self.skipped[check.name] = "nothing to check in this run"

    def level_of(self, name: str) -> Level:
        """The worst level of a check; ok if it was skipped."""
        levels = [finding.level for finding in self.findings.get(name, [])]
        return max(levels, key=LEVELS.index, default="ok")

    def failed(self) -> list[str]:
        """Names of the checks that fail."""
        return [name for name in self.findings if self.level_of(name) == "fail"]

    @property
    def level(self) -> Level:
        """The worst level of all checks."""
        return max(map(self.level_of, self.findings), key=LEVELS.index, default="ok")

    def text(self) -> str:
        """The report as text: findings with remedies, skipped checks, and a summary."""
        lines = [
            line for name, findings in self.findings.items() for line in _lines(name, findings)
        ]
        skipped_by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            skipped_by_reason.setdefault(reason, []).append(name)
        for reason, names in skipped_by_reason.items():
            lines.append(f"not checked  {', '.join(names)}: {reason}")
        total = len(self.findings)
        if failed := self.failed():
            lines.append(f"{len(failed)} of {total} checks failed: {', '.join(failed)}")
        else:
            warned = [name for name in self.findings if self.level_of(name) == "warn"]
            warnings = f", {len(warned)} with a warning: {', '.join(warned)}" if warned else ""
            lines.append(f"{total} checks passed{warnings}")
        return "\n".join(lines)

    def as_json(self, hosts: Sequence[str]) -> dict[str, Any]:
        """The report as JSON data; a finding without ranks concerns all ranks."""
        return {
            "level": self.level,
            "hosts": list(hosts),
            "findings": [
                {"check": name} | asdict(finding)
                for name, findings in self.findings.items()
                for finding in findings
            ],
            "not_checked": self.skipped,
        }

    def warnings(self) -> list[str]:
        """The lines of findings with level warn or fail."""
        lines: list[str] = []
        for name, findings in self.findings.items():
            lines += _lines(name, [finding for finding in findings if finding.level != "ok"])
        return lines


def _findings_of(check: Check, results: ProbeResults) -> list[Finding]:
    """The findings of a check. If probes raised, there is one finding for each distinct error."""
    errors = {
        rank: result[ERROR]
        for rank, result in results.by_rank.items()
        if isinstance(result, dict) and set(result) == {ERROR}
    }
    if not errors:
        return list(check.assess(results))
    findings = []
    for message, ranks in ranks_by_value(errors).items():
        text, remedy = _split_remedy(message)
        location = "" if len(ranks) == len(results.hosts) else f"{results.name_ranks(ranks)}: "
        findings.append(fail(f"{location}{text}", remedy or check.remedy, ranks))
    return findings


def _split_remedy(message: str) -> tuple[str, str]:
    """Fact and remedy of a UserError's message; the remedy is empty if the message has none.

    The remedy is the text after the last semicolon. A message of several lines has a remedy in each
    line, so it is not split. Errors about settings end with `; found VALUE` instead of a remedy.
    """
    text, _, remedy = message.rpartition("; ")
    is_remedy = text and not remedy.startswith("found ") and "\n" not in message
    return (text, remedy) if is_remedy else (message, "")


def _lines(name: str, findings: Iterable[Finding]) -> Iterable[str]:
    """The findings of one check as lines: level, name and text, then the remedy after an arrow."""
    for finding in findings:
        first, *more = finding.text.splitlines()
        yield f"{finding.level:<5} {name:<15} {first}"
        yield from (f"{'':<21} {line}" for line in more)
        if finding.remedy:
            yield f"{'':<21} -> {finding.remedy}"
