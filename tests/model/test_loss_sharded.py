"""SummedLoss at every ZeRO stage equals the loss from the model's own logits, without ZeRO.

So do the gradients. Word embeddings are tied or untied.
"""

from functools import cache

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from pipeline.model.attention import WITHIN_DOCUMENTS
from pipeline.model.loss import IGNORED, SummedLoss
from pipeline.model.structure import text_decoder
from tests.model.models import build
from tests.ranks import run_ranks

pytestmark = pytest.mark.engine

# granite scales logits. gemma4 is multimodal, and the soft cap of its logits is only in the config
# of its text model.
# The second value, `is_fast`: whether the gradient is computed in the forward pass.
KINDS = [("granite", False), ("granite", True), ("gemma4", True)]


def adapted(kind, is_tied):
    """The model with a peft adapter on q_proj and o_proj whose A and B are random."""
    model = build(kind)
    if not is_tied:
        head = model.get_output_embeddings()
        torch.manual_seed(3)
        head.weight = torch.nn.Parameter(0.1 * torch.randn_like(head.weight))
        model.config.get_text_config().tie_word_embeddings = False
    model.set_attn_implementation(WITHIN_DOCUMENTS)
    decoder = set(text_decoder(model).modules())
    names = [
        name
        for name, module in model.named_modules()
        if module in decoder and name.endswith(("q_proj", "o_proj"))
    ]
    torch.manual_seed(4)
    config = LoraConfig(r=4, target_modules=names, init_lora_weights="gaussian")
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def make_batch():
    torch.manual_seed(1)
    ids = torch.randint(3, 250, (2, 16))
    labels = ids.clone()
    labels[:, :5] = IGNORED
    return ids, labels


def sharded(session, kind, stage, is_tied, is_fast):
    """Summed loss and gradients under ZeRO of one batch, which is the same on both ranks."""
    model = adapted(kind, is_tied)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    engine, *_ = deepspeed.initialize(
        model=SummedLoss(model, 3, has_gradient_in_forward=is_fast),
        model_parameters=list(trainable.values()),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
        },
        dist_init_required=False,
    )
    ids, labels = make_batch()
    loss = engine(ids, labels, ((16,), (16,)))
    engine.backward(loss)
    grads = {name: safe_get_full_grad(p).reshape(-1).clone() for name, p in trainable.items()}
    return loss.item(), grads


CASES = [(stage, is_tied) for stage in (1, 2, 3) for is_tied in (True, False)]


def sharded_in_each_case(session, kind, is_fast):
    return {case: sharded(session, kind, *case, is_fast) for case in CASES}


@pytest.fixture(scope="module")
def sharded_results(tmp_path_factory):
    """Function: kind and is_fast -> loss and gradients in each of CASES; the ranks start once."""

    @cache
    def train(kind, is_fast):
        folder = tmp_path_factory.mktemp("sharded")
        return run_ranks(sharded_in_each_case, kind, is_fast, tmp_path=folder)[0]

    return train


@cache
def loss_and_gradients_without_zero(kind, is_tied):
    model, (ids, labels) = adapted(kind, is_tied), make_batch()
    logits = model.get_base_model()(input_ids=ids, use_cache=False).logits[:, :-1].float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), {name: p.grad.reshape(-1) for name, p in trainable.items()}


@pytest.mark.parametrize(("stage", "is_tied"), CASES)
@pytest.mark.parametrize(("kind", "is_fast"), KINDS)
def test_loss_and_gradients_equal_those_of_the_model_without_zero(
    sharded_results, kind, is_fast, stage, is_tied
):
    expected_loss, expected = loss_and_gradients_without_zero(kind, is_tied)
    loss, gradients = sharded_results(kind, is_fast)[stage, is_tied]
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    difference = sum(float((gradients[n] - expected[n]).square().sum()) for n in expected) ** 0.5
    assert difference < 2e-6 * sum(float(expected[n].square().sum()) for n in expected) ** 0.5
