"""The DeepSpeed engine: optimizer steps and forward passes for evaluation.

All methods are collective: every rank calls them, in the same order.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from pipeline.adapter.gather import (
    create_state_of_groups,
    disable_scale_error,
    is_at_smallest_scale,
)
from pipeline.cluster.sequence_group import SequenceGroup
from pipeline.config.settings import RunSettings
from pipeline.data.order.batches import IGNORED, WHOLE, Batch, SequencePart
from pipeline.data.order.steps import SeededBatch
from pipeline.evaluate.generate import Generator
from pipeline.model.adapter import trainable
from pipeline.model.base import remove_input_gradients, require_input_gradients
from pipeline.model.fp32_kernels import multiply_in_fp32
from pipeline.model.joint_lora import join_lora
from pipeline.model.loss import SummedLoss, max_chunks
from pipeline.model.neftune import EmbeddingNoise
from pipeline.model.tiles import tile_mlps
from pipeline.plan.given.fast_paths import FP32_KERNELS, JOINT_LORA, LOSS_GRADIENT, ONE_REDUCTION
from pipeline.plan.given.layout import SequenceProfile
from pipeline.plan.plan import Plan
from pipeline.train.reduction import accumulate_in_fp32, reduced_once

_RATE_NAMES = ("lr", "lr_lora_b")  # names in metrics.jsonl, in the order of the parameter groups


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of an optimizer step on one rank.

    `loss_sum`, `tokens`: sums over the micro-batches of this rank. The ranks of a sequence-parallel
    group share their tokens, so only the first of them counts the tokens; on the others `tokens`
    is 0. `grad_norm`: norm of the gradient over all ranks. `was_applied`: False if the update was
    skipped. `can_lower_scale`: whether the loss scale of fp16 was above its minimum. If so, an
    overflow is not a failure, because DeepSpeed lowers the scale and continues.
    """

    loss_sum: float
    tokens: int
    grad_norm: float
    was_applied: bool
    can_lower_scale: bool


class Engine:
    """A model in a DeepSpeed engine, and its trainable parameters.

    `on_phase`: called with the name of each phase of a step, for the watchdog. `group`: the ranks
    that share each sequence with this rank; None if each rank has its own sequences.
    """

    def __init__(
        self,
        model: PeftModel,
        plan: Plan,
        on_phase: Callable[[str], None] = lambda phase: None,
        group: SequenceGroup | None = None,
    ) -> None:
        self._model = model
        self.parameters = trainable(model)
        self._on_phase = on_phase
        self._world_size = plan.world_size
        self._group = group
        self._part = WHOLE if group is None else SequencePart(group.size, group.rank)
        self.largest_batch = SequenceProfile(tokens=1)
        self._max_tokens = 0  # batch size times length of `largest_batch`
        is_sharded = plan.layout.is_sharded  # ZeRO-3
        reasons_off = plan.fast_paths  # fast path -> why it is off; an empty text if it is on
        if not reasons_off[JOINT_LORA]:
            join_lora(model)  # layers with the same input compute their LoRA products together
        if not reasons_off[FP32_KERNELS]:
            multiply_in_fp32(model)
        causal_lm: Any = model.get_base_model()
        self._tiled_mlps = tile_mlps(causal_lm, plan)
        # At ZeRO-3 activation checkpointing is re-entrant.
        is_reentrant = is_sharded and plan.layout.checkpointed_layers > 0
        if is_reentrant:
            remove_input_gradients(causal_lm)
        self.deepspeed, *_ = deepspeed.initialize(
            model=SummedLoss(
                model,
                max_chunks(plan) if is_sharded else None,
                has_gradient_in_forward=not reasons_off[LOSS_GRADIENT],
                group=group,
            ),
            model_parameters=_parameter_groups(self.parameters, plan.settings),
            config=dict(plan.deepspeed),
            dist_init_required=False,
        )
        self._reduces_once = not reasons_off[ONE_REDUCTION]
        if self._reduces_once:
            accumulate_in_fp32(self.parameters.values())
            # Makes DeepSpeed update the weights in every call of step().
            self.deepspeed.set_gradient_accumulation_boundary(True)
        self._lr_ratios = [group["lr"] / plan.settings.lr for group in self._parameter_groups]
        create_state_of_groups(self.deepspeed)
        disable_scale_error(self.deepspeed)
        # Small parameters that ZeRO-3 keeps gathered (stage3_param_persistence_threshold).
        self._persistent = self.deepspeed.optimizer.persistent_parameters if is_sharded else []
        if is_sharded:
            _register_token_weights(model)
        if is_reentrant:
            require_input_gradients(causal_lm)
        alpha = plan.settings.neftune_noise_alpha
        embeddings = causal_lm.get_input_embeddings()
        self._noise = EmbeddingNoise(embeddings, alpha, group) if alpha else None

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
        """Set the rate of each parameter group.

        The main group gets `lr`. With LoRA+ the group of B gets `lr` times `lora_plus_ratio`.
        """
        for group, ratio in zip(self._parameter_groups, self._lr_ratios, strict=True):
            group["lr"] = lr * ratio

    def learning_rates(self) -> dict[str, float]:
        """The rate of each parameter group, by its name in metrics.jsonl."""
        rates = (group["lr"] for group in self._parameter_groups)
        return dict(zip(_RATE_NAMES, rates, strict=False))

    def optimizer_step(
        self, batches: Iterable[SeededBatch], supervised_tokens: int, lr: float
    ) -> StepResult:
        """One optimizer step over the micro-batches of this rank.

        `supervised_tokens`: number in the whole step, on all ranks. If a loss or gradient is not
        finite on any rank, all ranks skip the update. If `batches` raises an exception, the step is
        incomplete and its gradients remain, so the process must end.
        """
        self.deepspeed.train()
        self.set_learning_rate(lr)
        earlier_steps = self.deepspeed.global_steps
        can_lower_scale = not is_at_smallest_scale(self.deepspeed)
        loss_sum, tokens = self.backward_passes(batches, supervised_tokens)
        self.deepspeed.step()
        assert self.deepspeed.global_steps == earlier_steps + 1, "wrong number of micro-batches"
        return StepResult(
            loss_sum=float(loss_sum),
            tokens=tokens,
            grad_norm=_as_float(self.deepspeed.get_global_grad_norm()),
            was_applied=bool(self.deepspeed.was_step_applied()),
            can_lower_scale=can_lower_scale,
        )

    def backward_passes(
        self, batches: Iterable[SeededBatch], supervised_tokens: int
    ) -> tuple[torch.Tensor, int]:
        """Accumulate and reduce the gradients of a step; returns the summed loss and the tokens.

        The gradient is that of the mean loss over all supervised tokens of the step, for every
        division into micro-batches and ranks. DeepSpeed averages gradients over ranks, which the
        factor `world_size` undoes. By default DeepSpeed also divides the loss by the number of
        micro-batches, which `scale_wrt_gas=False` prevents.

        If a loss is not finite, the gradients are set to NaN. DeepSpeed checks only gradients, and
        then skips the step on all ranks (0.19.8, every stage and dtype).
        """
        loss_sum, tokens = torch.zeros((), dtype=torch.float64, device=self.device), 0
        with self._reduction():
            for index, seeded in enumerate(batches):
                if index > 0 and not self._reduces_once:
                    self.deepspeed.step()  # ends the previous micro-batch; no update yet
                torch.manual_seed(seeded.seed)
                self._note_size(seeded.batch)
                self._on_phase("the forward pass")
                loss = self._forward(seeded.batch)
                factor = torch.full_like(loss, self._world_size / supervised_tokens)
                scaled = loss * factor.where(loss.detach().isfinite(), float("nan"))
                self._on_phase("the backward pass")
                self.deepspeed.backward(scaled, scale_wrt_gas=False)
                loss_sum += loss.detach().double()
                if self._group is None or self._group.rank == 0:
                    tokens += seeded.batch.tokens
                del loss, scaled  # frees the graph, in which 8-bit layers keep tensors
            self._on_phase("the optimizer's step")
        return loss_sum, tokens

    def _reduction(self) -> AbstractContextManager[None]:
        """Context of the backward passes of a step, which reduces their gradients over ranks."""
        if not self._reduces_once:  # DeepSpeed reduces in each backward pass
            return nullcontext()
        return reduced_once(self.deepspeed, self.parameters.values())

    def _note_size(self, batch: Batch) -> None:
        """Set `largest_batch`, whose predicted memory is shown with the measured peak."""
        if batch.input_ids.numel() > self._max_tokens:
            self._max_tokens = batch.input_ids.numel()
            labels = batch.labels
            if self._group is not None:
                labels = self._group.local_part(labels, IGNORED)
            share = float((labels != IGNORED).double().mean())
            tokens = batch.input_ids.shape[1]
            self.largest_batch = SequenceProfile(
                tokens=tokens, supervised_share=share, attended=batch.attended
            )

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """Summed loss of one batch, without dropout."""
        self._on_phase("a forward pass of the evaluation")
        self.deepspeed.eval()
        loss_sum = float(self._forward(batch))
        self._release_gathered()
        return loss_sum

    @torch.no_grad()
    def answers(
        self, generator: Generator, prompts: Sequence[str], on_token: Callable[[], None]
    ) -> list[str]:
        """Greedy answers of the model. At ZeRO-3 a rank without prompts must call it too.

        ZeRO-3 records the order of modules in each forward pass, from one call of `reset_step` to
        the next. The forward pass of `self.deepspeed` calls it, but `generate` calls the wrapped
        model directly; therefore `before_forward` calls `reset_step`.
        """
        self._on_phase("generating answers")
        self.deepspeed.eval()
        offload = getattr(self.deepspeed.optimizer, "parameter_offload", None)
        forwards = count()

        def before_forward() -> None:
            on_token()
            # Only the first forward pass, that of the prompts, has long sequences to tile.
            self._set_tiled(next(forwards) == 0)
            if offload is not None:
                self._release_gathered()
                offload.get_param_coordinator().reset_step()
                self._gather_persistent()

        is_synced = offload is not None and self._world_size > 1
        answers = generator.answers(self._model, prompts, before_forward, is_synced=is_synced)
        self._set_tiled(True)
        self._release_gathered()
        return answers

    def _set_tiled(self, is_tiled: bool) -> None:
        """Choose whether MLPs compute their sequences in tiles, which saves memory."""
        for mlp in self._tiled_mlps:
            mlp.is_tiled = is_tiled

    def _release_gathered(self) -> None:
        """Shard again the parameters that ZeRO-3 keeps gathered for a backward pass.

        An evaluation has no backward pass. In the next forward pass DeepSpeed 0.19.8 does not count
        these parameters (partitioned_param_coordinator.py:286) and would gather others in addition.
        """
        for parameter in self.deepspeed.module.parameters():
            status = getattr(parameter, "ds_status", None)
            if status is ZeroParamStatus.AVAILABLE and not parameter.ds_persist:
                parameter.partition()

    def _gather_persistent(self) -> None:
        """Gather the persistent parameters of ZeRO-3 that are sharded; most are adapter weights.

        All are sharded in a new engine. While DeepSpeed 0.19.8 records the order of modules, it
        also shards them after each use (partitioned_param_coordinator.py:459). But peft reads
        lora_A before the forward pass of its module. If lora_A is sharded then, DeepSpeed assigns
        it to a second module, and later fails with a "tracing error" because the order differs.
        """
        sharded = [p for p in self._persistent if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if sharded:
            sharded[0].all_gather(sharded)

    def _forward(self, batch: Batch) -> torch.Tensor:
        assert batch.part == self._part, "a batch that was built for another rank of the group"
        self._gather_persistent()
        if self._noise is not None:
            self._noise.documents = batch.documents
        moved = batch.to(self.device)
        loss: torch.Tensor = self.deepspeed(
            moved.input_ids, moved.labels, moved.documents, moved.predicting
        )
        return loss


def _register_token_weights(model: PeftModel) -> None:
    """Let ZeRO-3 gather the weights that peft's TrainableTokensLayer reads from other modules."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            trained_rows = module.trainable_tokens_delta.values()
            for parameter in (module.get_base_layer().weight, *trained_rows):
                deepspeed.zero.register_external_parameter(module, parameter)


def _parameter_groups(
    parameters: Mapping[str, nn.Parameter], settings: RunSettings
) -> list[dict[str, Any]]:
    """The parameter groups of the optimizer: one, or with LoRA+ a second one for the matrices B.

    As in peft, DoRA's magnitudes have the rate of B (peft 0.21.2 optimizers/loraplus.py).
    """
    if settings.lora_plus_ratio == 1:
        return [{"params": list(parameters.values()), "lr": settings.lr}]
    group_a: list[nn.Parameter] = []
    group_b: list[nn.Parameter] = []
    for key, parameter in parameters.items():
        is_magnitude = parameter.dim() == 1
        (group_b if ".lora_B." in key or is_magnitude else group_a).append(parameter)
    return [
        {"params": group_a, "lr": settings.lr},
        {"params": group_b, "lr": settings.lr * settings.lora_plus_ratio},
    ]


def _as_float(value: Any) -> float:
    return float("nan") if value is None else float(value)
