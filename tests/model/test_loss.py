"""The summed loss equals torch's cross entropy of each document, with and without chunks."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from pipeline.data.order.batches import IGNORED, build_batch
from pipeline.model import loss as loss_module
from pipeline.model.loss import SummedLoss
from tests.tiny import Documents

pytestmark = pytest.mark.tensor


@pytest.fixture
def model(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    return model


def loss_and_gradient(model, batch):
    total = SummedLoss(model)(batch.input_ids, batch.labels, batch.documents)
    model.zero_grad()
    total.backward()
    return total.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()


def test_the_loss_is_the_sum_over_single_documents(model):
    documents = Documents(6)
    batch = build_batch(documents, range(6))
    expected = 0.0
    for i in range(6):
        ids, mask = documents.document(i)
        labels = torch.from_numpy(ids).long().masked_fill(~torch.from_numpy(mask), IGNORED)
        logits = model(torch.from_numpy(ids).long()[None]).logits[0, :-1]
        expected += F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=IGNORED)
    total, _ = loss_and_gradient(model, batch)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert batch.tokens == documents.lengths.sum()


def test_the_number_of_chunks_does_not_change_loss_and_gradient(model, monkeypatch):
    batch = build_batch(Documents(6), range(6))
    loss, gradient = loss_and_gradient(model, batch)
    # A chunk has the fp32 logits of seven tokens, for a vocabulary of 259.
    monkeypatch.setattr(loss_module, "LOGITS_CHUNK_BYTES", 4 * 259 * 7)
    loss_in_chunks, gradient_in_chunks = loss_and_gradient(model, batch)
    assert loss_in_chunks.item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.allclose(gradient_in_chunks, gradient, rtol=1e-5, atol=1e-5)


def test_offsets_from_the_host_select_the_positions_that_a_mask_selects(model):
    """`batch.predicting`: offsets of tokens with a supervised next token; else a mask is made."""
    batch = build_batch(Documents(6), range(6))
    loss, selected = SummedLoss(model), []
    loss._loss_sum = lambda causal, hidden, targets: selected.append((hidden, targets))
    loss(batch.input_ids, batch.labels, batch.documents, batch.predicting)
    loss(batch.input_ids, batch.labels, batch.documents)
    hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    targets = batch.labels[:, 1:]
    is_supervised = targets != IGNORED
    for selected_hidden, selected_targets in selected:
        assert torch.equal(selected_hidden, hidden[:, :-1][is_supervised])
        assert torch.equal(selected_targets, targets[is_supervised])


def test_the_loss_of_an_empty_micro_batch_is_zero_and_has_a_gradient_of_zero(model):
    total, gradient = loss_and_gradient(model, build_batch(Documents(1), []))
    assert total.item() == 0.0
    assert not gradient.any()
