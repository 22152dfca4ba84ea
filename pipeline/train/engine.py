"""The DeepSpeed engine: one optimizer step, one evaluation forward.

Collective throughout: every rank calls every method, in the same order.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from peft import PeftModel

from pipeline.data.batches import Batch
from pipeline.model.adapter import trainable
from pipeline.model.base import forget_input_gradients, require_input_gradients
from pipeline.model.loss import SummedLoss, chunks_for_any_batch
from pipeline.plan.plan import Plan


@dataclass(frozen=True)
class SeededBatch:
    """A batch and the seed of its forward's dropout."""

    batch: Batch
    seed: int


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one rank knows after a step; `loss_sum` is over this rank's tokens."""

    loss_sum: float
    tokens: int
    grad_norm: float
    was_applied: bool


class Engine:
    """A model under DeepSpeed, and the parameters that it trains."""

    def __init__(self, model: PeftModel, plan: Plan) -> None:
        self.parameters = trainable(model)
        self._world_size = plan.world_size
        is_sharded = plan.layout.is_sharded
        causal: Any = model.get_base_model()
        is_reentrant = is_sharded and plan.layout.checkpointed_layers > 0
        if is_reentrant:
            forget_input_gradients(causal)
        self.deepspeed, *_ = deepspeed.initialize(
            model=SummedLoss(model, chunks_for_any_batch(plan) if is_sharded else None),
            model_parameters=list(self.parameters.values()),
            config=dict(plan.deepspeed),
            dist_init_required=False,
        )
        self._persistent = self.deepspeed.optimizer.persistent_parameters if is_sharded else []
        if is_reentrant:
            require_input_gradients(causal)

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        device: torch.device = torch.device(self.deepspeed.device)
        return device

    def optimizer_step(
        self, batches: Iterable[SeededBatch], supervised_tokens: int, lr: float
    ) -> StepResult:
        """One step over this rank's micro-batches; `supervised_tokens` are of all ranks."""
        self.deepspeed.train()
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        tokens, before = 0, self.deepspeed.global_steps
        for seeded in batches:
            loss_sum += self.accumulate(seeded, supervised_tokens).detach().double()
            tokens += seeded.batch.tokens
            self.deepspeed.step()
        assert self.deepspeed.global_steps == before + 1, "not one step's micro-batches"
        return StepResult(
            loss_sum=float(loss_sum),
            tokens=tokens,
            grad_norm=_as_float(self.deepspeed.get_global_grad_norm()),
            was_applied=bool(self.deepspeed.was_step_applied()),
        )

    def accumulate(self, seeded: SeededBatch, supervised_tokens: int) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its summed loss.

        DeepSpeed averages gradients over ranks and, by default, divides the loss by the number of
        micro-batches. Both are undone here, the one place: what is left is the gradient of the
        mean loss over all supervised tokens of the step, however it is split.
        """
        torch.manual_seed(seeded.seed)
        loss_sum = self._forward(seeded.batch)
        scaled = loss_sum * (self._world_size / supervised_tokens)
        self.deepspeed.backward(scaled, scale_wrt_gas=False)
        return loss_sum

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """Summed loss of one batch, without dropout."""
        self.deepspeed.eval()
        loss_sum = float(self._forward(batch))
        self._release_gathered()
        return loss_sum

    def _release_gathered(self) -> None:
        """Let go of what ZeRO-3 has gathered for a backward that does not come.

        DeepSpeed 0.19.8 forgets it when it counts live parameters in the next forward
        (partitioned_param_coordinator.py:286), and would gather as much on top.
        """
        for parameter in self.deepspeed.module.parameters():
            status = getattr(parameter, "ds_status", None)
            if status is ZeroParamStatus.AVAILABLE and not parameter.ds_persist:
                parameter.partition()

    def _gather_persistent(self) -> None:
        """Gather what is to stay whole at ZeRO-3, adapters first of all, where it is not yet.

        A fresh engine has them sharded, and while DeepSpeed 0.19.8 records the order of modules it
        shards them again after each use (partitioned_param_coordinator.py:459). peft looks at
        lora_A before its module is reached; if it is not there, DeepSpeed gives it to a second
        module, and an order that is recorded already then fails with a "tracing error".
        """
        missing = [p for p in self._persistent if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if missing:
            missing[0].all_gather(missing)

    def _forward(self, batch: Batch) -> torch.Tensor:
        self._gather_persistent()
        moved = batch.to(self.device)
        loss: torch.Tensor = self.deepspeed(moved.input_ids, moved.labels)
        return loss


def _as_float(value: Any) -> float:
    return float("nan") if value is None else float(value)
