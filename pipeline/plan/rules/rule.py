"""What a rule is, and what it may look at; the table itself is rule_table.py.

A rule refuses (exit 2), warns, sets (says what was chosen because of it) or advises. Versions
come from package metadata: nothing is imported.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Generic, Literal, TypeVar

from packaging.requirements import Requirement

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.shape import ModelShape

Level = Literal["refuse", "warn", "set", "advise"]
_LEVELS: tuple[Level, ...] = ("refuse", "warn", "set", "advise")
_NEWEST = "9999"


@dataclass(frozen=True, kw_only=True)
class PlanInput:
    """What is known before anything is chosen."""

    settings: RunSettings
    shape: ModelShape
    hardware: Hardware
    packages: Mapping[str, str | None]


@dataclass(frozen=True, kw_only=True)
class PlanContext(PlanInput):
    """A request and what was chosen for it.

    `deepspeed` is what DeepSpeed will get, a user's own JSON merged in; `data` is the number of
    training documents, None until they have been prepared.
    """

    layout: Layout
    deepspeed: Mapping[str, Any]
    data: int | None = None

    @property
    def zero(self) -> Mapping[str, Any]:
        """The block `zero_optimization`."""
        return self.block("zero_optimization")

    def block(self, *path: str) -> Mapping[str, Any]:
        """A block of the DeepSpeed config, empty where there is none."""
        found: Any = self.deepspeed
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found if isinstance(found, Mapping) else {}


ContextT = TypeVar("ContextT", bound=PlanInput, contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Rule(Generic[ContextT]):
    """One known trap.

    `versions` is a requirement ("deepspeed>=0.17.6,<0.18.3") that the rule holds for; a package
    that is not installed counts as newer than any. Empty: every version that is supported.
    """

    id: str
    level: Level
    applies: Callable[[ContextT], bool]
    reason: str
    remedy: str
    source: str
    versions: str = ""

    @property
    def message(self) -> str:
        """Reason and remedy."""
        return f"{self.reason}; {self.remedy}"

    def holds(self, known: ContextT) -> bool:
        """Whether the rule has something to say here."""
        if self.versions:
            wanted = Requirement(self.versions)
            found = known.packages.get(wanted.name) or _NEWEST
            if not wanted.specifier.contains(found, prereleases=True):
                return False
        return self.applies(known)


def issue(repository: str, *numbers: int) -> str:
    """Links to issues or pull requests; GitHub leads from the one to the other."""
    return ", ".join(f"https://github.com/{repository}/issues/{number}" for number in numbers)


@cache
def installed_versions() -> Mapping[str, str | None]:
    """Versions of the packages that rules ask about, None where one is not installed.

    Kept: reading the metadata takes longer than all rules together.
    """
    found: dict[str, str | None] = {}
    for name in ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "flash-attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def applicable_rules(rules: Iterable[Rule[ContextT]], known: ContextT) -> list[Rule[ContextT]]:
    """Rules that have something to say, refusals first."""
    found = [rule for rule in rules if rule.holds(known)]
    return sorted(found, key=lambda rule: _LEVELS.index(rule.level))


def raise_refusals(rules: Iterable[Rule[ContextT]]) -> None:
    """Raises UserError with every refusal among the rules."""
    if refused := [rule for rule in rules if rule.level == "refuse"]:
        raise UserError("\n".join(f"{rule.message} [rule {rule.id}]" for rule in refused))
