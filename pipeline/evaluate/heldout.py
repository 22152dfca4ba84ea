"""Held-out loss: the mean loss of supervised tokens; each rank computes some of the sequences."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from pipeline.cluster.progress import Work, show_progress
from pipeline.cluster.session import Session
from pipeline.data.dataset.reader import Split
from pipeline.data.order.batches import Batch, SequencePart, batches_of
from pipeline.data.order.order import evaluation_work
from pipeline.plan.given.layout import Layout


def held_out_loss(
    summed_loss: Callable[[Batch], float],
    split: Split,
    session: Session,
    layout: Layout,
    show: Callable[[str, int], AbstractContextManager[Work]] = show_progress,
) -> float:
    """Mean loss over the supervised tokens of a split. Collective: all ranks must call it.

    `summed_loss`: returns the sum of the losses of a batch's supervised tokens. In a
    sequence-parallel group, where a rank has only some of the tokens of a sequence, it is the sum
    over these tokens. `layout`: numbers of data-parallel and sequence-parallel ranks, and the
    micro-batch size. `show`: context manager that shows the progress, called with a text and the
    number of batches.
    """
    micro_batches_by_group = evaluation_work(
        split.sequences,
        data_parallel_size=layout.data_parallel_size,
        micro_batch_size=layout.micro_batch_size,
    )
    # Consecutive ranks form a sequence-parallel group. They have the same sequences, and each has
    # one part of the tokens of each sequence.
    group_size = layout.sequence_parallel_size
    group, rank_in_group = divmod(session.placement.rank, group_size)
    micro_batches = micro_batches_by_group[group]
    part = SequencePart(group_size, rank_in_group)
    loss_sum = 0.0
    with show("measuring the held-out loss", len(micro_batches)) as progress:
        for batch, _ in batches_of(split, micro_batches, part=part):
            loss_sum += summed_loss(batch)
            progress.advance()
    return session.sum_over_ranks([loss_sum])[0] / split.sequences.supervised_tokens
