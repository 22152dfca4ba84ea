"""Rule: one known problem, with its condition, reason, remedy and source.

A rule refuses the run (exit 2), warns or advises. Package versions are read from metadata, without
importing the packages.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Generic, Literal, TypeVar

from packaging.requirements import Requirement

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.given.class_proof import Proof
from pipeline.plan.given.data_size import DataSize
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.shape import ModelShape
from pipeline.plan.given.torch_process import package_version

Level = Literal["refuse", "warn", "advise"]
LEVELS: tuple[Level, ...] = ("refuse", "warn", "advise")
LEAVE_OUT = "leave it out"
_NEWEST = "9999"  # version assumed for a package that is not installed

# Beginnings of the texts that name a rule's source.
DEEPSPEED = "deepspeedai/DeepSpeed"
ENGINE_SOURCE = "DeepSpeed 0.19.8 runtime/engine.py"
ZERO_SOURCE = "DeepSpeed 0.19.8 runtime/zero"


@dataclass(frozen=True, kw_only=True)
class PlanInput:
    """The input from which a plan is made.

    `packages`: version of each package that rules depend on; None if it is not installed. `proof`:
    None if the model's class has not been checked on this machine.
    """

    settings: RunSettings
    shape: ModelShape
    hardware: Hardware
    packages: Mapping[str, str | None]
    proof: Proof | None = None

    @property
    def is_cuda(self) -> bool:
        """Whether the ranks train on GPUs."""
        return self.hardware.kind == "cuda"


@dataclass(frozen=True, kw_only=True)
class PlanContext(PlanInput):
    """The input of a rule's condition: the plan's input, and the layout chosen for it.

    `deepspeed`: the DeepSpeed config, merged with the user's own JSON. `data`: size of the training
    data; None until it has been counted or estimated.
    """

    layout: Layout
    deepspeed: Mapping[str, Any]
    data: DataSize | None = None

    @property
    def zero(self) -> Mapping[str, Any]:
        """The block `zero_optimization` of the DeepSpeed config."""
        return self.block("zero_optimization")

    @property
    def offload_device(self) -> str:
        """Device of the base shards in the DeepSpeed config: `cpu`, `nvme`, or `none` for GPUs."""
        return str(self.value("zero_optimization.offload_param.device") or "none")

    def block(self, path: str) -> Mapping[str, Any]:
        """A block of the DeepSpeed config by its dotted path; empty if the block is missing."""
        value = self.value(path)
        return value if isinstance(value, Mapping) else {}

    def value(self, path: str) -> Any:
        """A value of the DeepSpeed config by its dotted path; None if the key is missing."""
        value: Any = self.deepspeed
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


ContextT = TypeVar("ContextT", bound=PlanInput, contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Rule(Generic[ContextT]):
    """One known problem.

    `level`: whether the rule refuses the run, warns or advises. `applies`: the condition, a
    function of a run's PlanInput or PlanContext. It returns whether the rule applies. A returned
    text that is not empty also means that the rule applies, and is appended to the reason.
    `reason`: what the problem is. `remedy`: what the user can do. `source`: page or file that shows
    the problem. `versions`: package versions with the problem, such as
    "deepspeed>=0.17.6,<0.18.3"; empty if all supported versions have it. For a package that is not
    installed, the newest version is assumed.
    """

    id: str
    level: Level
    applies: Callable[[ContextT], bool | str]
    reason: str
    remedy: str = LEAVE_OUT
    source: str
    versions: str = ""

    @property
    def message(self) -> str:
        """Reason and remedy."""
        return f"{self.reason}; {self.remedy}"

    def check(self, context: ContextT) -> "Rule[ContextT] | None":
        """The rule if it applies, with the text of `applies` appended to its reason; else None."""
        if self.versions:
            affected = Requirement(self.versions)
            installed = context.packages.get(affected.name) or _NEWEST
            if not affected.specifier.contains(installed, prereleases=True):
                return None
        result = self.applies(context)
        if not result:
            return None
        return replace(self, reason=f"{self.reason}: {result}") if isinstance(result, str) else self


def is_set(*paths: str) -> Callable[[PlanContext], bool]:
    """Condition: one of these keys of the DeepSpeed config is neither missing, off nor empty."""
    return lambda context: any(
        context.value(path) not in (None, False, 0, "", "none", {}, []) for path in paths
    )


def is_present(*paths: str) -> Callable[[PlanContext], bool]:
    """Condition: one of these keys of the DeepSpeed config is present, even if false or empty."""
    return lambda context: any(context.value(path) is not None for path in paths)


def is_false(path: str) -> Callable[[PlanContext], bool]:
    """Condition: this key of the DeepSpeed config is present and false."""
    return lambda context: context.value(path) is False


def issue(repository: str, *numbers: int) -> str:
    """Links to issues or pull requests; GitHub redirects an issue link to the pull request."""
    return ", ".join(f"https://github.com/{repository}/issues/{number}" for number in numbers)


@cache  # reading the metadata takes longer than checking all rules
def installed_versions() -> Mapping[str, str | None]:
    """Versions of the packages that rules depend on; None for one that is not installed."""
    names = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "flash-attn")
    return {name: package_version(name) for name in names}


def applicable_rules(rules: Iterable[Rule[ContextT]], context: ContextT) -> list[Rule[ContextT]]:
    """The rules that apply, refusals first."""
    applicable = [applied for rule in rules if (applied := rule.check(context)) is not None]
    return sorted(applicable, key=lambda rule: LEVELS.index(rule.level))


def raise_refusals(rules: Iterable[Rule[ContextT]]) -> None:
    """Raise UserError with the messages of all rules of level `refuse`, if there are any."""
    if text := refusals_text(rules):
        raise UserError(text)


def refusals_text(rules: Iterable[Rule[ContextT]]) -> str:
    """A line for each rule of level `refuse`; empty if there is none."""
    refused = [rule for rule in rules if rule.level == "refuse"]
    return "\n".join(f"{rule.message} [rule {rule.id}]" for rule in refused)
