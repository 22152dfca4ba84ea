"""Plan: everything derived from settings, model shape, hardware and the data index. No torch.

`Plan` is computed once and passed on; nothing else multiplies micro-batches by ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.choose import Candidate, Cluster, candidates
from pipeline.plan.cost.memory import Memory, memory
from pipeline.plan.cost.speed import Speed, step_seconds
from pipeline.plan.deepspeed.config import deepspeed_config
from pipeline.plan.deepspeed.overlay import overlay, with_json_constraints
from pipeline.plan.estimate import DataSize
from pipeline.plan.given.adapter_counts import adapter_counts, trainable_parameters
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.shape import ModelShape
from pipeline.plan.reasons import misfit_message, reasons
from pipeline.plan.rules.model import INPUT_RULES
from pipeline.plan.rules.rule import (
    PlanContext,
    PlanInput,
    Rule,
    applicable_rules,
    installed_versions,
    raise_refusals,
)
from pipeline.plan.rules.table import CONTEXT_RULES


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps of the run; fixed once the data has been prepared."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int

    @classmethod
    def of(cls, settings: RunSettings, steps_per_epoch: int) -> "Schedule":
        """The schedule of a run whose epochs have so many steps."""
        ends = [settings.max_steps] if settings.max_steps is not None else []
        if settings.epochs != "auto":  # as decimal text: 30 x 0.1 is 3, and no more
            ends.append(math.ceil(Fraction(str(settings.epochs)) * steps_per_epoch))
        total, warmup = min(ends), settings.warmup_steps
        if warmup is None or warmup < 1:
            share = settings.warmup_ratio if warmup is None else warmup
            warmup = math.ceil((share or 0) * total)
        return cls(
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
            warmup_steps=min(int(warmup), total),
        )


@dataclass(frozen=True, kw_only=True)
class LargestBatch:
    """The largest micro-batch that has run.

    `tokens` of a sequence, the share of them that counts in the loss, and, of packs, over how many
    a token's attention reached in the mean: those of its document.
    """

    tokens: int
    supervised_share: float
    attended: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will run; where it does not fit, what would come nearest."""

    settings: RunSettings
    shape: ModelShape
    hardware: Hardware
    layout: Layout
    why: dict[str, str]
    rules: tuple[Rule[PlanContext], ...]
    deepspeed: dict[str, Any]
    data: DataSize | None = None
    schedule: Schedule | None = None
    fits: bool = True

    @property
    def training_dtype(self) -> str:
        """bfloat16, float16 or float32."""
        return self.layout.training_dtype

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.layout.world_size

    @property
    def trainable(self) -> int:
        """Trainable parameters."""
        return trainable_parameters(self.shape, self.settings)

    @property
    def steps(self) -> Schedule:
        """The schedule of a plan that has been given its data."""
        assert self.schedule is not None, "with_data() comes first"
        return self.schedule

    @property
    def memory(self) -> Memory:
        """Memory, for the longest sequence of the data where all of it has been seen.

        A pack may fill up to `max_length`.
        """
        tokens: int = self.settings.max_length
        attended: int | None = None
        if self.data is not None and self.data.is_exact and self.data.longest is not None:
            longest = min(tokens, self.data.longest)
            in_packs = min(tokens, self.data.tokens), longest
            tokens, attended = in_packs if self.settings.packing else (longest, None)
        return memory(
            self.shape, self.settings, self.layout, self.hardware, tokens, attended=attended
        )

    def tensor_bytes(self, batch: LargestBatch) -> int:
        """Predicted peak of live tensors for micro-batches like this one, loading included."""
        return memory(
            self.shape,
            self.settings,
            self.layout,
            self.hardware,
            batch.tokens,
            supervised_share=batch.supervised_share,
            attended=batch.attended,
        ).tensor_bytes

    @property
    def speed(self) -> Speed:
        """Time of a step, for sequences of the data's mean length where that is known."""
        tokens: float = self.settings.max_length
        attended: float | None = None
        if self.data is not None:
            mean = self.data.mean_tokens
            in_packs = min(tokens, self.data.tokens), min(tokens, mean)
            tokens, attended = in_packs if self.settings.packing else (mean, None)
        return step_seconds(
            self.shape, self.settings, self.layout, self.hardware, tokens, attended=attended
        )

    def with_data(self, data: DataSize) -> "Plan":
        """The plan with its steps, for a training set of this size."""
        settings = self.settings
        sequences = data.sequences
        if sequences is None:  # prepare leaves hardly a hundredth of a pack empty
            packs = math.ceil(data.tokens / settings.max_length)
            sequences = packs if settings.packing else data.documents
        per_epoch = math.ceil(sequences / self.layout.global_batch_size)
        schedule = Schedule.of(settings, per_epoch)
        return replace(self, data=data, schedule=schedule, rules=self._rules(data.documents))

    def _rules(self, documents: int) -> tuple[Rule[PlanContext], ...]:
        """The rules again, now that the size of the data is known."""
        situation = PlanContext(
            settings=self.settings,
            shape=self.shape,
            hardware=self.hardware,
            packages=installed_versions(),
            layout=self.layout,
            deepspeed=self.deepspeed,
            data=documents,
        )
        return tuple(applicable_rules(CONTEXT_RULES, situation))

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this index (from 0); above 0 at the first one."""
        schedule, settings = self.steps, self.settings
        if step < schedule.warmup_steps:
            return settings.lr * (step + 1) / schedule.warmup_steps
        done = (step - schedule.warmup_steps) / max(1, schedule.total_steps - schedule.warmup_steps)
        if settings.lr_scheduler_type == "constant":
            return settings.lr
        is_linear = settings.lr_scheduler_type == "linear"
        course = 1 - done if is_linear else (1 + math.cos(math.pi * done)) / 2
        return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * course)


class DoesNotFitError(UserError):
    """No candidate fits: the one that comes nearest as a plan, and each with its reason."""

    def __init__(self, message: str, nearest: Plan, ranked: Sequence[Candidate]) -> None:
        super().__init__(message)
        self.nearest, self.ranked = nearest, ranked


def make_plan(
    settings: RunSettings, shape: ModelShape, hardware: Hardware, *, nodes: int, ranks_per_node: int
) -> Plan:
    """Derive the plan. Raises UserError where a rule refuses or nothing fits, with what would."""
    return rank_plans(settings, shape, hardware, nodes=nodes, ranks_per_node=ranks_per_node)[0]


def rank_plans(
    settings: RunSettings, shape: ModelShape, hardware: Hardware, *, nodes: int, ranks_per_node: int
) -> tuple[Plan, list[Candidate]]:
    """The plan, and every candidate, best first, those that were left out with the reason."""
    if nodes < 1 or ranks_per_node < 1:
        raise UserError(f"{nodes} nodes of {ranks_per_node} ranks: both must be 1 or more")
    if settings.deepspeed_json is not None:
        settings = with_json_constraints(settings.deepspeed_json, settings)
    request = PlanInput(
        settings=settings, shape=shape, hardware=hardware, packages=installed_versions()
    )
    raise_refusals(applicable_rules(INPUT_RULES, request))
    adapter_counts(shape, settings)  # a target that matches nothing is refused first
    machines = Cluster(hardware=hardware, nodes=nodes, ranks_per_node=ranks_per_node)
    ranked = candidates(settings, shape, machines)
    if all(candidate.refusal for candidate in ranked):
        raise DoesNotFitError(
            misfit_message(settings, shape, machines, ranked), _plan(request, ranked[0], {}), ranked
        )
    held = {c.layout: _situation(request, c.layout) for c in ranked if c.refusal is None}
    refusals = {layout: said for layout, known in held.items() if (said := _refusal(known))}
    if len(refusals) == len(held):
        raise_refusals(applicable_rules(CONTEXT_RULES, next(iter(held.values()))))
    ranked = sorted(
        (replace(c, refusal=refusals.get(c.layout, c.refusal)) for c in ranked),
        key=lambda candidate: candidate.refusal is not None,
    )
    why = reasons(ranked[0], ranked, settings, shape, machines)
    return _plan(request, ranked[0], why), ranked


def _plan(request: PlanInput, chosen: Candidate, why: dict[str, str]) -> Plan:
    situation = _situation(request, chosen.layout)
    return Plan(
        settings=request.settings,
        shape=request.shape,
        hardware=request.hardware,
        layout=chosen.layout,
        why=why,
        rules=tuple(applicable_rules(CONTEXT_RULES, situation)),
        deepspeed=dict(situation.deepspeed),
        fits=chosen.refusal is None,
    )


def _situation(request: PlanInput, layout: Layout) -> PlanContext:
    settings, is_cuda = request.settings, request.hardware.kind == "cuda"
    config = deepspeed_config(request.shape, settings, layout, is_cuda=is_cuda)
    if settings.deepspeed_json is not None:
        config = overlay(config, settings.deepspeed_json)
    return PlanContext(**vars(request), layout=layout, deepspeed=config)


def _refusal(known: PlanContext) -> str | None:
    refused = [r for r in applicable_rules(CONTEXT_RULES, known) if r.level == "refuse"]
    return f"is refused: {refused[0].reason} [rule {refused[0].id}]" if refused else None
