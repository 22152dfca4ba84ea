"""Plan: everything derived from settings, model shape, hardware and the size of the data. No torch.

A Plan is computed once for a run. All other packages read batch sizes, step counts and predictions
from it and do not compute them again. The *layout* in it is the combination of ZeRO stage,
micro-batch size, activation checkpointing and offload. A *candidate* is a layout with its predicted
memory and time. A *rule* is one known problem with its condition and remedy (plan/rules/).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from pipeline.config.settings import RunSettings, replaced_preset_values
from pipeline.errors import UserError
from pipeline.plan.choose import Candidate, Cluster, candidates
from pipeline.plan.cost.answers import Answers, answers
from pipeline.plan.cost.decompositions import Decompositions, decompositions
from pipeline.plan.cost.memory import Memory, memory
from pipeline.plan.cost.speed import Speed, step_seconds
from pipeline.plan.deepspeed.config import deepspeed_config
from pipeline.plan.deepspeed.overlay import overlay, with_json_constraints
from pipeline.plan.given.adapter_counts import adapter_counts, trainable_parameters
from pipeline.plan.given.class_proof import (
    Proof,
    cached_proof,
    ensure_proof,
    without_mixing_packs,
    without_wrong_fast_paths,
)
from pipeline.plan.given.data_size import DataSize
from pipeline.plan.given.fast_paths import fast_paths
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.layout import Layout, SequenceProfile
from pipeline.plan.given.new_tokens import rows_text, token_rows, with_added_rows
from pipeline.plan.given.shape import EXPERTS, ModelShape, read_shape
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
    """Numbers of steps of a run. They are final once the data has been prepared."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int

    @classmethod
    def of(cls, settings: RunSettings, steps_per_epoch: int) -> "Schedule":
        """The schedule of a run with `steps_per_epoch` steps in each epoch."""
        limits = [settings.max_steps] if settings.max_steps is not None else []
        if settings.epochs != "auto":  # Fraction, because 30 x 8.3 exceeds 249 in floating point
            limits.append(math.ceil(Fraction(str(settings.epochs)) * steps_per_epoch))
        total, warmup = min(limits), settings.warmup_steps
        if warmup is None or warmup < 1:  # a value below 1 is a fraction of all steps
            share = settings.warmup_ratio if warmup is None else warmup
            warmup = math.ceil((share or 0) * total)
        return cls(
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
            warmup_steps=min(int(warmup), total),
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run.

    `why`: name of a setting or of a field of the layout -> reason for the chosen value. `rules`:
    the rules that apply. `deepspeed`: the config for `deepspeed.initialize`. `data`: size of the
    training data; None if it is not known. `fits`: whether `layout` fits in memory; if no layout
    does, `layout` is the one that needs the least memory. `candidates`: all candidates for the
    layout, best first. `proof`: results of the checks whether this package trains the model's class
    correctly; None if they have not run on this machine.
    """

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
    candidates: tuple[Candidate, ...] = ()
    proof: Proof | None = None

    @property
    def training_dtype(self) -> str:
        """bfloat16, float16 or float32."""
        return self.layout.training_dtype

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.layout.world_size

    @property
    def cluster(self) -> Cluster:
        """The nodes and devices of the run."""
        nodes, ranks = self.layout.nodes, self.layout.ranks_per_node
        return Cluster(hardware=self.hardware, nodes=nodes, ranks_per_node=ranks)

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return trainable_parameters(self.shape, self.settings)

    @property
    def fast_paths(self) -> dict[str, str]:
        """Name of each fast path -> the reason why it is off; an empty text if it is on.

        A fast path is a faster computation with the same result (given/fast_paths.py).
        """
        reasons = fast_paths(self.shape, self.settings, self.layout, self.hardware)
        if self.proof is not None and self.proof.without_fast_paths:
            return dict.fromkeys(reasons, self.proof.without_fast_paths[0])
        return reasons

    @property
    def fast_path_states(self) -> dict[str, str]:
        """Name of each fast path -> `on`, or the reason why it is off."""
        return {name: reason or "on" for name, reason in self.fast_paths.items()}

    @property
    def steps(self) -> Schedule:
        """The schedule of a plan returned by `with_data()`; other plans have none."""
        assert self.schedule is not None, "call with_data() first"
        return self.schedule

    @property
    def memory(self) -> Memory:
        """Predicted memory for the longest sequence of the data.

        Until the data has been counted, its longest sequence is assumed to have `max_length`
        tokens.
        """
        sequences = SequenceProfile(tokens=self.settings.max_length)
        if self.data is not None and self.data.is_exact and self.data.longest is not None:
            sequences = self._profile(self.data, self.data.longest)
        return self._memory(sequences)

    def tensor_bytes(self, sequences: SequenceProfile) -> int:
        """Predicted peak bytes of live tensors, while loading or in a step with these sequences."""
        return self._memory(sequences).tensor_bytes

    @property
    def speed(self) -> Speed:
        """Predicted time of a step for documents of mean length, or `max_length` if unknown."""
        sequences = SequenceProfile(tokens=self.settings.max_length)
        if self.data is not None:
            sequences = self._profile(self.data, self.data.mean_tokens)
        return step_seconds(self.shape, self.settings, self.layout, self.hardware, sequences)

    @property
    def answers(self) -> Answers | None:
        """Predicted answers of one evaluation; None without `eval_generate`.

        Until the data has been counted, half of a document is assumed to be its answer.
        """
        document = self.settings.max_length if self.data is None else self.data.mean_tokens
        answer, length_loss = document / 2, None if self.data is None else self.data.length_loss
        if length_loss is not None and self.data is not None and self.data.is_exact:
            answer = length_loss.tokens / length_loss.documents
        lengths = max(1.0, document - answer), answer
        return answers(self.shape, self.settings, self.layout, self.hardware, lengths)

    @property
    def decompositions(self) -> Decompositions | None:
        """Predicted decompositions at the start (PiSSA, OLoRA, LoftQ); None if there are none."""
        return decompositions(self.shape, self.settings, self.layout, self.hardware)

    @property
    def num_evaluations(self) -> int:
        """Number of evaluations on held-out rows."""
        frequency = self.settings.evaluations if self.settings.eval_data is not None else None
        if frequency is None:
            return 0
        return frequency.count(self.steps.total_steps, self.steps.steps_per_epoch)

    @property
    def seconds(self) -> float:
        """Predicted time of all steps, of the answers of evaluations, and of decompositions."""
        seconds = self.steps.total_steps * self.speed.seconds_per_step
        if (answers_of_evaluation := self.answers) is not None:
            seconds += self.num_evaluations * answers_of_evaluation.seconds
        decomposed = self.decompositions
        return seconds + (0.0 if decomposed is None else decomposed.seconds)

    def _memory(self, sequences: SequenceProfile) -> Memory:
        return memory(self.shape, self.settings, self.layout, self.hardware, sequences)

    def _profile(self, data: DataSize, document_tokens: float) -> SequenceProfile:
        """Profile of sequences whose documents all have this length; packed if `packing` is set."""
        document_tokens = min(self.settings.max_length, document_tokens)
        if not self.settings.packing:
            return SequenceProfile(tokens=document_tokens)
        pack_tokens = min(self.settings.max_length, data.tokens)
        return SequenceProfile(tokens=pack_tokens, attended=document_tokens)

    def with_data(self, data: DataSize) -> "Plan":
        """The plan with the schedule for a training set of this size.

        Raises UserError if a rule refuses the data.
        """
        settings = self.settings
        sequences = data.num_sequences(settings.max_length, is_packed=settings.packing)
        per_epoch = math.ceil(sequences / self.layout.global_batch_size)
        return replace(self, data=data, schedule=Schedule.of(settings, per_epoch))._check_rules()

    def with_proof(self, proof: Proof) -> "Plan":
        """The plan with the results of the checks of its model class.

        Raises UserError if a rule refuses the run because of these results.
        """
        settings = without_wrong_fast_paths(self.settings, proof)
        return replace(self, settings=settings, proof=proof)._check_rules()

    def _check_rules(self) -> "Plan":
        """The plan with the rules that apply. Raises UserError if one of them refuses the run."""
        _raise_input_refusals(self.context)
        raise_refusals(applicable_rules(CONTEXT_RULES, self.context))
        return replace(self, rules=_all_applicable_rules(self.context))

    @property
    def context(self) -> PlanContext:
        """The input for the conditions of the rules."""
        return PlanContext(
            settings=self.settings,
            shape=self.shape,
            hardware=self.hardware,
            packages=installed_versions(),
            proof=self.proof,
            layout=self.layout,
            deepspeed=self.deepspeed,
            data=self.data,
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this index, counted from 0. The first rate is above 0."""
        schedule, settings = self.steps, self.settings
        if step < schedule.warmup_steps:
            return settings.lr * (step + 1) / schedule.warmup_steps
        if settings.lr_scheduler_type == "constant":
            return settings.lr
        decay_steps = max(1, schedule.total_steps - schedule.warmup_steps)
        progress = (step - schedule.warmup_steps) / decay_steps
        is_linear = settings.lr_scheduler_type == "linear"
        factor = 1 - progress if is_linear else (1 + math.cos(math.pi * progress)) / 2
        return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * factor)


class DoesNotFitError(UserError):
    """No layout fits in memory.

    `nearest`: the plan of the layout that needs the least memory. `ranked`: all candidates, each
    with its refusal.
    """

    def __init__(self, message: str, nearest: Plan, ranked: Sequence[Candidate]) -> None:
        super().__init__(message)
        self.nearest, self.ranked = nearest, ranked


def plan_run(settings: RunSettings, hardware: Hardware, *, nodes: int, ranks_per_node: int) -> Plan:
    """The plan of a run whose model is in the folder `settings.model_folder`.

    If the model's class is not in the table of known classes (given/families.py), its checks run
    first, unless their results are cached. Raises UserError if a rule refuses the run or no layout
    fits.
    """
    shape = read_shape(str(settings.model_folder), trust_remote_code=settings.trust_remote_code)
    ensure_proof(settings, shape)
    return make_plan(settings, shape, hardware, nodes=nodes, ranks_per_node=ranks_per_node)


def make_plan(
    settings: RunSettings, shape: ModelShape, hardware: Hardware, *, nodes: int, ranks_per_node: int
) -> Plan:
    """The plan of a run. Raises UserError if a rule refuses the run or no layout fits."""
    return plan_and_candidates(
        settings, shape, hardware, nodes=nodes, ranks_per_node=ranks_per_node
    )[0]


def plan_and_candidates(
    settings: RunSettings, shape: ModelShape, hardware: Hardware, *, nodes: int, ranks_per_node: int
) -> tuple[Plan, list[Candidate]]:
    """The plan of a run, and all candidates for its layout, best first.

    Raises UserError if a rule refuses the run or no layout fits.
    """
    if nodes < 1 or ranks_per_node < 1:
        raise UserError(f"{nodes} nodes of {ranks_per_node} ranks: both must be 1 or more")
    if settings.deepspeed_json is not None:
        settings = with_json_constraints(settings.deepspeed_json, settings)
    why = replaced_preset_values(settings)
    shape = with_added_rows(shape, settings)
    if (rows := token_rows(shape, settings)) is not None:
        why["new_tokens"] = rows_text(rows, shape, settings)
    targets = shape.without_auto(settings.lora_target_modules)
    if targets != settings.lora_target_modules:
        settings = settings.model_copy(update={"lora_target_modules": targets})
        names = ", ".join(target for target in targets if target != EXPERTS)
        experts = f", and {EXPERTS}: all fused experts" if EXPERTS in targets else ""
        why["lora_target_modules"] = f"{names}: the linear layers of the blocks{experts}"
    if EXPERTS in targets and settings.lora_dropout > 0:
        why["lora_dropout"] = (
            f"{settings.lora_dropout:g} on the input of linear layers; 0 for experts, because peft "
            "supports no dropout there, and adapter_config.json has 0"
        )
    plan_input = PlanInput(
        settings=settings, shape=shape, hardware=hardware, packages=installed_versions()
    )
    _raise_input_refusals(plan_input)
    adapter_counts(shape, settings)  # called only for its UserError if a target matches no layer
    proof = cached_proof(shape, settings)
    settings, reason = without_mixing_packs(settings, shape, proof)
    if reason:
        why["packing"] = f"false, because {reason}"
    settings = without_wrong_fast_paths(settings, proof)
    plan_input = replace(plan_input, settings=settings, proof=proof)
    _raise_input_refusals(plan_input)
    cluster = Cluster(hardware=hardware, nodes=nodes, ranks_per_node=ranks_per_node)
    ranked = candidates(settings, shape, cluster)
    if all(candidate.refusal for candidate in ranked):
        message = misfit_message(settings, shape, cluster, ranked)
        raise DoesNotFitError(message, _build_plan(plan_input, ranked, why), ranked)
    ranked = _refused_by_rules_last(plan_input, ranked)
    why |= reasons(ranked[0], ranked, settings, shape, cluster)
    return _build_plan(plan_input, ranked, why), ranked


def _refused_by_rules_last(plan_input: PlanInput, ranked: list[Candidate]) -> list[Candidate]:
    """The candidates in the same order, except that those refused by a rule are moved to the end.

    Raises UserError if rules refuse every candidate that fits.
    """
    checked, first_refusals = [], None
    for candidate in ranked:
        if candidate.refusal is None:
            rules = applicable_rules(CONTEXT_RULES, _build_context(plan_input, candidate.layout))
            if refused := [rule for rule in rules if rule.level == "refuse"]:
                first_refusals = first_refusals or refused
                text = f"is refused: {refused[0].reason} [rule {refused[0].id}]"
                candidate = replace(candidate, refusal=text)  # noqa: PLW2901
        checked.append(candidate)
    checked.sort(key=lambda candidate: candidate.refusal is not None)
    if checked[0].refusal is not None and first_refusals:
        raise_refusals(first_refusals)
    return checked


def _build_plan(plan_input: PlanInput, ranked: Sequence[Candidate], why: dict[str, str]) -> Plan:
    """The plan with the layout of the first candidate."""
    chosen = ranked[0]
    context = _build_context(plan_input, chosen.layout)
    return Plan(
        settings=plan_input.settings,
        shape=plan_input.shape,
        hardware=plan_input.hardware,
        layout=chosen.layout,
        why=why,
        rules=_all_applicable_rules(context),
        deepspeed=dict(context.deepspeed),
        fits=chosen.refusal is None,
        candidates=tuple(ranked),
        proof=plan_input.proof,
    )


def _raise_input_refusals(plan_input: PlanInput) -> None:
    """Raise UserError if a rule refuses this input.

    There are also plans for published models that have no folder on this machine. Such a plan is
    only shown, so its refusals are listed with the other rules and do not end the command.
    """
    if plan_input.shape.source is None:  # the model has a folder
        raise_refusals(applicable_rules(INPUT_RULES, plan_input))


def _all_applicable_rules(context: PlanContext) -> tuple[Rule[PlanContext], ...]:
    """The rules about the plan's input and about the layout that apply."""
    return tuple(applicable_rules((*INPUT_RULES, *CONTEXT_RULES), context))


def _build_context(plan_input: PlanInput, layout: Layout) -> PlanContext:
    """The context of rules for a layout, with the DeepSpeed config of that layout."""
    settings = plan_input.settings
    config = deepspeed_config(plan_input.shape, settings, layout, is_cuda=plan_input.is_cuda)
    if settings.deepspeed_json is not None:
        config = overlay(config, settings.deepspeed_json)
    return PlanContext(**vars(plan_input), layout=layout, deepspeed=config)
