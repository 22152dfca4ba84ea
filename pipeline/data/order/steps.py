"""Training steps of one rank: its micro-batches, from the plan and a prepared split."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from pipeline.data.dataset.sequences import StepSize
from pipeline.data.order.batches import Batch, SequencePart, batches_of
from pipeline.data.order.order import BatchLayout, RankWork, forward_seed
from pipeline.plan.cost.per_token import cost_per_token, sequence_flops
from pipeline.plan.plan import Plan

if TYPE_CHECKING:
    from pipeline.data.dataset.reader import Split


@dataclass(frozen=True)
class SeededBatch:
    """A micro-batch and the seed of dropout in its forward pass."""

    batch: Batch
    seed: int


@dataclass(frozen=True)
class TrainingStep:
    """One optimizer step: this rank's micro-batches, and the step's size summed over all ranks."""

    index: int
    batches: Iterator[SeededBatch]
    size: StepSize


def training_steps(
    plan: Plan, split: "Split", *, rank: int, first_step: int
) -> Iterator[TrainingStep]:
    """Yield the steps from `first_step` to the last one.

    The ranks of a sequence-parallel group share each sequence: they get the same sequences, and
    different parts and seeds. Consume all batches of a step before taking the next step. Iterate
    inside `worker_deaths_reported`, which reports the death of a data loader's worker.
    """
    settings = plan.settings
    size = plan.layout.sequence_parallel_size
    group, rank_in_group = divmod(rank, size)
    layout = BatchLayout(
        data_parallel_size=plan.layout.data_parallel_size,
        accumulation_steps=plan.layout.accumulation_steps,
        micro_batch_size=plan.layout.micro_batch_size,
        flops=sequence_flops(cost_per_token(plan.shape, settings, plan.training_dtype)),
    )
    steps = range(first_step, plan.steps.total_steps)
    work = RankWork(split, layout, seed=settings.seed, rank=group, steps=steps)
    batches = batches_of(
        split,
        work,
        part=SequencePart(size, rank_in_group),
        num_workers=settings.dataloader_num_workers,
        prefetch_factor=settings.dataloader_prefetch_factor,
    )
    seeded = (
        SeededBatch(
            batch, forward_seed(settings.seed, work.step_of(i), first_sequence, rank_in_group)
        )
        for i, (batch, first_sequence) in enumerate(batches)
    )
    for step in steps:
        yield TrainingStep(step, islice(seeded, layout.accumulation_steps), work.size_of(step))
