"""A sequence that is split over a group has the loss and gradients that it has whole.

The ranks of a group are threads, so that a class takes a fraction of a second. Real ranks are
tested in tests/train/test_sequence_parallel.py.
"""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from pipeline.cluster import sequence_group
from pipeline.cluster.sequence_group import SequenceGroup
from pipeline.model.attention import WITHIN_DOCUMENTS
from pipeline.model.class_shape import shape_or_reason
from pipeline.model.loss import IGNORED, SummedLoss
from pipeline.model.structure import text_decoder
from pipeline.model.ulysses import heads_of_whole_sequence, tokens_of_all_heads
from pipeline.plan.cost.speed import exchanged_values
from pipeline.plan.given import class_shape
from pipeline.plan.given.shape import read_shape
from tests.messages import refused
from tests.model.models import build
from tests.model.test_classes import MIX_DOCUMENTS, SEPARATE_DOCUMENTS
from tests.models.kinds import ALL

pytestmark = pytest.mark.tensor

LENGTH = 23  # tokens of a sequence; neither 2 nor 4 ranks divide it
# Tokens of each document in two sequences: packs, and single documents. Padding follows.
PACKED, WHOLE = ((7, 12, 3), (20, 1, 2)), ((23,), (19,))


class ThreadGroup:
    """A process group whose ranks are threads; `place` is the rank in the group."""

    def __init__(self, size):
        self.size = size
        self._barrier = Barrier(size, timeout=60)
        self._sent = [None] * size

    def exchange(self, place, sent):
        """Row p of each thread's tensor goes to thread p."""
        self._sent[place] = sent.detach().clone()
        self._barrier.wait()
        received = torch.stack([sent[place] for sent in self._sent])
        self._barrier.wait()  # until every thread has read
        return received

    def run(self, body):
        """The results of `body` on every place."""
        groups = [SequenceGroup(self.size, place, (self, place)) for place in range(self.size)]
        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(body, groups))


@pytest.fixture(autouse=True)
def _threads_exchange(monkeypatch):
    def exchange(sent, group_and_place):
        group, place = group_and_place
        return group.exchange(place, sent)

    monkeypatch.setattr(sequence_group, "_exchange", exchange)


def make_batch(num_supervised=LENGTH):
    """Ids and labels. The first token of each part has a label, if `num_supervised` reaches it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 250, (2, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, 1::3] = labels[:, 0] = labels[1, 19:] = IGNORED
    labels[:, num_supervised:] = IGNORED
    return ids, labels


def losses_and_gradient(model, documents, size, num_supervised=LENGTH):
    """The sum of the losses of all places, and the gradient of all parameters as one vector."""
    model.zero_grad()
    ids, labels = make_batch(num_supervised)

    def loss_of(group):
        loss = SummedLoss(model, 2, group=group)(ids, labels, documents)
        loss.backward()
        return float(loss.detach())

    losses = [loss_of(None)] if size == 1 else ThreadGroup(size).run(loss_of)
    parameters = text_decoder(model).parameters()
    return sum(losses), torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@pytest.mark.parametrize("size", [2, 4])  # of the group; 4 ranks replicate the 2 key heads
@pytest.mark.parametrize("documents", [PACKED, WHOLE], ids=["packed", "whole"])
@pytest.mark.parametrize("kind", SEPARATE_DOCUMENTS)
def test_a_split_sequence_has_the_loss_and_gradients_of_a_whole_one(kind, documents, size):
    model = build(kind, kinds=ALL)
    model.set_attn_implementation(WITHIN_DOCUMENTS)
    expected, gradient = losses_and_gradient(model, documents, 1)
    loss, split_gradient = losses_and_gradient(model, documents, size)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert float((split_gradient - gradient).norm() / gradient.norm()) < 3e-5


@torch.no_grad()
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["llama", "deepseek_v3", "gemma4_text"])
def test_the_plan_counts_the_values_that_a_group_exchanges(kind, size, tmp_path, monkeypatch):
    """Query and key heads of DeepSeek are wider than value heads."""
    monkeypatch.setenv("RANKZERO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(class_shape, "_count_in_subprocess", shape_or_reason)
    model = build(kind, kinds=ALL)
    model.config.save_pretrained(tmp_path)
    model.set_attn_implementation(WITHIN_DOCUMENTS)
    ids, labels = make_batch()
    sent_values, exchange = [], sequence_group._exchange

    def count(sent, group_and_place):
        sent_values.append(sent.numel())
        return exchange(sent, group_and_place)

    monkeypatch.setattr(sequence_group, "_exchange", count)
    ThreadGroup(size).run(lambda group: SummedLoss(model, group=group)(ids, labels, WHOLE).detach())
    num_tokens = ids.shape[0] * size * -(-LENGTH // size)  # parts are padded to equal lengths
    assert sum(sent_values) == num_tokens * exchanged_values(read_shape(str(tmp_path)), size)


def test_ranks_whose_part_has_no_supervised_tokens_take_part_in_the_gradient_of_the_others():
    """Only the first 5 of 23 tokens have labels, so 3 of 4 parts have none."""
    model = build("llama")
    model.set_attn_implementation(WITHIN_DOCUMENTS)
    expected, gradient = losses_and_gradient(model, WHOLE, 1, num_supervised=5)
    loss, split_gradient = losses_and_gradient(model, WHOLE, 4, num_supervised=5)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert float((split_gradient - gradient).norm() / gradient.norm()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("kind", "num_blocks"), MIX_DOCUMENTS)
def test_a_class_with_layers_that_see_only_their_part_of_a_sequence_is_refused(kind, num_blocks):
    """For example a convolution or a recurrent state: only attention exchanges heads."""
    model, (ids, labels) = build(kind, kinds=ALL), make_batch()
    model.set_attn_implementation(WITHIN_DOCUMENTS)

    def loss_of(group):
        with refused("sequence_parallel_size: 1", f"{num_blocks} of 4 blocks", kind):
            SummedLoss(model, group=group)(ids, labels, WHOLE)
        return True

    assert all(ThreadGroup(2).run(loss_of))


@pytest.mark.parametrize(
    ("size", "heads", "key_heads"),
    [(2, 4, 4), (4, 8, 2), (4, 12, 6), (3, 6, 1), (3, 9, 3), (4, 4, 2)],
)
def test_each_rank_of_a_group_has_the_key_heads_of_its_query_heads(size, heads, key_heads):
    """Query head h is filled with h, and key head k with k."""
    tokens = 2
    query = torch.arange(heads, dtype=torch.float)[None, :, None, None].expand(1, -1, tokens, 3)
    key = torch.arange(key_heads, dtype=torch.float)[None, :, None, None].expand(1, -1, tokens, 3)

    def heads_of(group):
        own, keys, values = heads_of_whole_sequence(group, query, key, key[..., :2])
        assert own.shape == (1, heads // size, size * tokens, 3)
        assert values.shape == (*keys.shape[:3], 2)
        repeats = own.shape[1] // keys.shape[1]
        output = own.transpose(1, 2).contiguous()
        output = tokens_of_all_heads(group, output)
        assert torch.equal(output, query.transpose(1, 2))
        assert output.is_contiguous()  # classes such as Afmoe call .view on it
        key_of_query = keys.repeat_interleave(repeats, dim=1)
        return [
            (float(q.mean()), float(k.mean())) for q, k in zip(own[0], key_of_query[0], strict=True)
        ]

    pairs = [pair for place in ThreadGroup(size).run(heads_of) for pair in place]
    assert pairs == [(h, h // (heads // key_heads)) for h in range(heads)]


def test_the_parts_of_a_sequence_are_equally_long_and_padded_at_the_end():
    tensor = torch.arange(2 * 7).view(2, 7)
    parts = [SequenceGroup(4, place, None).local_part(tensor, -1) for place in range(4)]
    assert {part.shape for part in parts} == {(2, 2)}
    assert torch.equal(torch.cat(parts, dim=1), torch.nn.functional.pad(tensor, (0, 1), value=-1))
