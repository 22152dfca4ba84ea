"""The DeepSpeed engine: optimizer steps and evaluation forwards.

Collective throughout: every rank calls every method, in the same order.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from peft import PeftModel

from pipeline.adapter.gather import count_overflows_ourselves, is_at_smallest_scale
from pipeline.data.order.batches import IGNORED, Batch
from pipeline.data.order.steps import SeededBatch
from pipeline.model.adapter import trainable
from pipeline.model.base import remove_input_gradients, require_input_gradients
from pipeline.model.loss import SummedLoss, chunks_for_any_batch
from pipeline.plan.given.layout import SequenceProfile
from pipeline.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of a step on one rank; `loss_sum` is over this rank's tokens.

    `is_scale_searched`: fp16's loss scale was above its minimum, so an overflow reduces it.
    """

    loss_sum: float
    tokens: int
    grad_norm: float
    was_applied: bool
    is_scale_searched: bool


class Engine:
    """A model under DeepSpeed, and its trainable parameters.

    `on_phase` is called with each phase of a step, for the watchdog.
    """

    def __init__(
        self, model: PeftModel, plan: Plan, on_phase: Callable[[str], None] = lambda phase: None
    ) -> None:
        self.parameters = trainable(model)
        self._on_phase = on_phase
        self._world_size = plan.world_size
        self.largest_batch = SequenceProfile(tokens=1)
        self._most_tokens = 0
        is_sharded = plan.layout.is_sharded
        causal: Any = model.get_base_model()
        is_reentrant = is_sharded and plan.layout.checkpointed_layers > 0
        if is_reentrant:
            remove_input_gradients(causal)
        self.deepspeed, *_ = deepspeed.initialize(
            model=SummedLoss(model, chunks_for_any_batch(plan) if is_sharded else None),
            model_parameters=list(self.parameters.values()),
            config=dict(plan.deepspeed),
            dist_init_required=False,
        )
        self._lr_ratios = [group["lr"] / plan.settings.lr for group in self._parameter_groups]
        count_overflows_ourselves(self.deepspeed)
        self._persistent = self.deepspeed.optimizer.persistent_parameters if is_sharded else []
        if is_reentrant:
            require_input_gradients(causal)

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        device: torch.device = torch.device(self.deepspeed.device)
        return device

    @property
    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.deepspeed.optimizer.param_groups
        return groups

    def set_learning_rate(self, lr: float) -> None:
        """Scale each parameter group's own base rate as the schedule scales `lr`."""
        for group, ratio in zip(self._parameter_groups, self._lr_ratios, strict=True):
            group["lr"] = lr * ratio

    def optimizer_step(
        self, batches: Iterable[SeededBatch], supervised_tokens: int, lr: float
    ) -> StepResult:
        """One step over this rank's micro-batches; `supervised_tokens` counts all ranks.

        A loss or gradient that is not finite on any rank makes all of them skip the update. If
        `batches` raises, the step is dropped and its gradients stay: the process must end.
        """
        self.deepspeed.train()
        self.set_learning_rate(lr)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        tokens, before = 0, self.deepspeed.global_steps
        is_scale_searched = not is_at_smallest_scale(self.deepspeed)
        for seeded in batches:
            loss_sum += self.accumulate(seeded, supervised_tokens).detach().double()
            tokens += seeded.batch.tokens
            self._on_phase("the optimizer's step")
            self.deepspeed.step()
        assert self.deepspeed.global_steps == before + 1, "not the micro-batches of one step"
        return StepResult(
            loss_sum=float(loss_sum),
            tokens=tokens,
            grad_norm=_as_float(self.deepspeed.get_global_grad_norm()),
            was_applied=bool(self.deepspeed.was_step_applied()),
            is_scale_searched=is_scale_searched,
        )

    def accumulate(self, seeded: SeededBatch, supervised_tokens: int) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its summed loss.

        DeepSpeed averages gradients over ranks and, by default, divides the loss by the number of
        micro-batches. Both are undone here and nowhere else: the result is the gradient of the mean
        loss over all supervised tokens of the step, however it is split.

        A loss that is not finite gets gradients that are not finite: DeepSpeed checks gradients
        only, over all ranks, and skips the step on all of them (0.19.8, every stage and dtype).
        """
        torch.manual_seed(seeded.seed)
        self._note_size(seeded.batch)
        self._on_phase("the forward pass")
        loss_sum = self._forward(seeded.batch)
        factor = torch.full_like(loss_sum, self._world_size / supervised_tokens)
        scaled = loss_sum * factor.where(loss_sum.detach().isfinite(), float("nan"))
        self._on_phase("the backward pass")
        self.deepspeed.backward(scaled, scale_wrt_gas=False)
        return loss_sum

    def _note_size(self, batch: Batch) -> None:
        """Remember the largest micro-batch: its predicted memory is compared with the peak."""
        if batch.input_ids.numel() > self._most_tokens:
            self._most_tokens = batch.input_ids.numel()
            share = float((batch.labels != IGNORED).double().mean())
            tokens = batch.input_ids.shape[1]
            self.largest_batch = SequenceProfile(
                tokens=tokens, supervised_share=share, attended=batch.attended
            )

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """Summed loss of one batch, without dropout."""
        self._on_phase("an evaluation forward")
        self.deepspeed.eval()
        loss_sum = float(self._forward(batch))
        self._release_gathered()
        return loss_sum

    def _release_gathered(self) -> None:
        """Partition again what ZeRO-3 gathered for a backward pass that does not come.

        DeepSpeed 0.19.8 loses count of it in the next forward
        (partitioned_param_coordinator.py:286) and would gather as much on top.
        """
        for parameter in self.deepspeed.module.parameters():
            status = getattr(parameter, "ds_status", None)
            if status is ZeroParamStatus.AVAILABLE and not parameter.ds_persist:
                parameter.partition()

    def _gather_persistent(self) -> None:
        """Gather ZeRO-3's persistent parameters, above all the adapters, where they are sharded.

        A fresh engine has them sharded, and while DeepSpeed 0.19.8 records the order of modules it
        shards them again after each use (partitioned_param_coordinator.py:459). peft reads lora_A
        before its module is reached; if it is sharded, DeepSpeed attributes it to a second module,
        and an order recorded earlier then fails with a "tracing error".
        """
        missing = [p for p in self._persistent if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if missing:
            missing[0].all_gather(missing)

    def _forward(self, batch: Batch) -> torch.Tensor:
        self._gather_persistent()
        moved = batch.to(self.device)
        loss: torch.Tensor = self.deepspeed(moved.input_ids, moved.labels, moved.documents)
        return loss


def _as_float(value: Any) -> float:
    return float("nan") if value is None else float(value)
