"""Plan: everything derived from settings, model shape, hardware and the data index. No torch.

`Plan` is computed once and passed on; nothing else multiplies micro-batches by ranks.
"""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.choose import Choice, choose
from pipeline.plan.hardware import GIB, Hardware
from pipeline.plan.layout import Layout
from pipeline.plan.memory import (
    checkpoint_bytes,
    load_peak_bytes,
    memory_per_rank,
    trainable_parameters,
)
from pipeline.plan.overlay import constraints_of, overlay
from pipeline.plan.rule_table import BEFORE_THE_CHOICE, OF_THE_CHOICE
from pipeline.plan.rules import (
    Request,
    Rule,
    Situation,
    installed_versions,
    require_none_refuses,
    rules_that_hold,
)
from pipeline.plan.shape import ModelShape
from pipeline.plan.zero import deepspeed_config


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps of the run; fixed once the data has been prepared."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will run."""

    settings: RunSettings
    shape: ModelShape
    hardware: Hardware
    choice: Choice
    rules: tuple[Rule[Situation], ...]
    deepspeed: dict[str, Any]
    schedule: Schedule | None = None

    @property
    def layout(self) -> Layout:
        """What was chosen."""
        return self.choice.layout

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

    def with_data(self, documents: int) -> "Plan":
        """The plan with its steps, for a training set of so many documents."""
        settings = self.settings
        per_epoch = math.ceil(documents / self.layout.global_batch_size)
        total = per_epoch * settings.epochs
        if settings.max_steps is not None:
            total = min(total, settings.max_steps)
        warmup = min(math.ceil(settings.warmup_ratio * total), total)
        schedule = Schedule(steps_per_epoch=per_epoch, total_steps=total, warmup_steps=warmup)
        return replace(self, schedule=schedule, rules=self._rules(documents))

    def _rules(self, documents: int) -> tuple[Rule[Situation], ...]:
        """The rules again, now that the size of the data is known."""
        situation = Situation(
            settings=self.settings,
            shape=self.shape,
            hardware=self.hardware,
            packages=installed_versions(),
            layout=self.layout,
            deepspeed=self.deepspeed,
            data=documents,
        )
        return tuple(rules_that_hold(OF_THE_CHOICE, situation))

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

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data: what plan.json holds."""
        layout = self.layout
        memory = memory_per_rank(self.shape, self.settings, layout)
        schedule = self.schedule
        return {
            "settings": self.settings.model_dump(mode="json"),
            "model": {
                "folder": self.shape.folder,
                "model_type": self.shape.model_type,
                "parameters": self.shape.parameters,
                "trainable": self.trainable,
                "layers": self.shape.num_layers,
            },
            "hardware": {
                "kind": self.hardware.kind,
                "name": self.hardware.name,
                "ranks": self.world_size,
            },
            "choice": {
                "zero_stage": layout.zero_stage,
                "micro_batch_size": layout.micro_batch_size,
                "gradient_accumulation_steps": layout.accumulation_steps,
                "global_batch_size": self.layout.global_batch_size,
                "checkpointed_layers": layout.checkpointed_layers,
                "hpz_partition_size": layout.hpz_partition_size,
                "offload_param": layout.offload_param,
                "training_dtype": layout.training_dtype,
                "why": self.choice.why,
            },
            "memory": {
                "per_rank": memory,
                "peak_bytes": sum(memory.values()),
                "load_peak_bytes": load_peak_bytes(self.shape, self.settings, layout),
                "device_bytes": self.hardware.device_bytes,
                "fits": True,  # a plan that does not fit is refused
            },
            "disk": {"checkpoint": checkpoint_bytes(self.trainable), "adapter": 4 * self.trainable},
            "rules": [
                {"id": r.id, "level": r.level, "message": r.message, "source": r.source}
                for r in self.rules
            ],
            "steps": None if schedule is None else dict(vars(schedule)),
            "deepspeed": self.deepspeed,
        }

    def render(self) -> str:
        """The plan as text for a terminal."""
        layout, choice = self.layout, self.choice
        share = 100 * self.trainable / self.shape.parameters
        lines = [
            f"model      {self.shape.folder}: {self.shape.parameters / 1e6:,.1f} M parameters, "
            f"{self.trainable / 1e6:,.2f} M trainable ({share:.2f} %)",
            f"hardware   {self.world_size} x {self.hardware.name}",
            f"run        ZeRO-{layout.zero_stage}, {layout.training_dtype}, global batch "
            f"{layout.global_batch_size} = {layout.micro_batch_size} x "
            f"{layout.accumulation_steps} x {layout.world_size} ranks, "
            f"{layout.checkpointed_layers} of {self.shape.num_layers} blocks checkpointed",
        ]
        if self.schedule is not None:
            lines.append(
                f"steps      {self.schedule.total_steps} ({self.schedule.steps_per_epoch} an "
                f"epoch), {self.schedule.warmup_steps} of warm-up"
            )
        lines += [f"  {key}: {text}" for key, text in choice.why.items()]
        memory = memory_per_rank(self.shape, self.settings, layout)
        lines.append(f"memory     {_size(sum(memory.values()))} a rank (estimate)")
        for term, size in sorted(memory.items(), key=lambda item: -item[1]):
            lines.append(f"  {term:<20} {_size(size):>10}")
        lines += [f"{rule.level:<10} {rule.message} [{rule.id}]" for rule in self.rules]
        return "\n".join(lines)


def make_plan(
    settings: RunSettings, shape: ModelShape, hardware: Hardware, *, nodes: int, ranks_per_node: int
) -> Plan:
    """Derive the plan. Raises UserError where a rule refuses or nothing fits, with what would."""
    if nodes < 1 or ranks_per_node < 1:
        raise UserError(f"{nodes} nodes of {ranks_per_node} ranks: both must be 1 or more")
    if settings.deepspeed_json is not None:
        settings = constraints_of(settings.deepspeed_json, settings)
    request = Request(
        settings=settings, shape=shape, hardware=hardware, packages=installed_versions()
    )
    require_none_refuses(rules_that_hold(BEFORE_THE_CHOICE, request))
    trainable_parameters(shape, settings)  # a target that matches nothing is refused first
    choice = choose(settings, shape, hardware, nodes=nodes, ranks_per_node=ranks_per_node)
    layout = choice.layout
    deepspeed = deepspeed_config(shape, settings, layout, is_cuda=hardware.kind == "cuda")
    if settings.deepspeed_json is not None:
        deepspeed = overlay(deepspeed, settings.deepspeed_json)
    situation = Situation(**vars(request), layout=layout, deepspeed=deepspeed)
    rules = rules_that_hold(OF_THE_CHOICE, situation)
    require_none_refuses(rules)
    return Plan(
        settings=settings,
        shape=shape,
        hardware=hardware,
        choice=choice,
        rules=tuple(rules),
        deepspeed=deepspeed,
    )


def _size(num_bytes: int) -> str:
    if num_bytes < GIB:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / GIB:.2f} GiB"


def dump_json(data: Any) -> str:
    """JSON as every file of a run has it."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
