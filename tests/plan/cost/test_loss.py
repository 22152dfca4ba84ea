"""The predicted memory of the loss, compared with live tensors of the loss alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.model.fp32_kernels import multiply_in_fp32
from pipeline.model.loss_gradient import sum_with_gradient
from pipeline.plan.cost.loss import loss_bytes
from pipeline.plan.given.catalogue import cpu_of
from pipeline.plan.given.fast_paths import FP32_PART_VALUES
from pipeline.train.live_bytes import LiveBytes
from tests.plan.cost.test_memory import SMALL, layout, run

pytestmark = pytest.mark.tensor

BF16 = torch.bfloat16
# Hidden size, vocabulary and supervised tokens. The first two heads are cast to fp32 as a whole,
# the others in parts. The casts are the largest term in the first and third case, and the logits in
# the others.
HEADS = [(1024, 1024, 64), (256, 2048, 1024), (2048, 8192, 40), (256, 16384, 512)]


def plain_loss(head, hidden, targets):
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def loss_with_gradient(head, hidden, targets):
    return sum_with_gradient(head, hidden, targets, 1)


def measured_bytes(loss_of, width, vocabulary, positions):
    """Peak of live bytes in the loss and its backward pass, without the head and the targets."""
    weights = nn.Sequential(nn.Linear(width, vocabulary, bias=False, dtype=BF16))
    multiply_in_fp32(weights.requires_grad_(False))
    hidden = torch.randn(positions, width).to(BF16).requires_grad_()
    targets = torch.zeros(positions, dtype=torch.long)
    with LiveBytes() as live:
        loss_of(weights, hidden, targets).backward()
    return live.peak - 2 * width * vocabulary - 8 * positions


@pytest.mark.parametrize(("width", "vocabulary", "positions"), HEADS)
@pytest.mark.parametrize("loss_of", [plain_loss, loss_with_gradient])
def test_the_casts_of_the_head_to_fp32_are_counted(loss_of, width, vocabulary, positions):
    assert (width * vocabulary > FP32_PART_VALUES) == (vocabulary > 2048)
    shape = replace(
        SMALL, vocab_size=vocabulary, blocks=(replace(SMALL.blocks[0], hidden_size=width),)
    )
    # A run that trains its head has the plain loss.
    settings = run(modules_to_save=["lm_head"]) if loss_of is plain_loss else run()
    slow_in_bf16 = replace(cpu_of(2, 2**34), is_slow_in_bf16=True)
    predicted = loss_bytes(shape, settings, layout(), positions, slow_in_bf16)
    measured = measured_bytes(loss_of, width, vocabulary, positions)
    assert predicted == pytest.approx(measured, rel=0.1)
