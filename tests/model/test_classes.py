"""This project's loss and attention equal those of each model class in transformers.

The classes differ in scales, soft caps, attention sinks, sliding windows and attention chunks.
"""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from pipeline.model import attention
from pipeline.model.attention import (
    WITHIN_DOCUMENTS,
    PackedDocuments,
    document_arguments,
    require_separate_documents,
)
from pipeline.model.loss import IGNORED, SummedLoss
from pipeline.model.structure import blocks, num_blocks_with, text_decoder
from tests.messages import refused
from tests.model.models import build
from tests.models.kinds import ALL

pytestmark = pytest.mark.tensor

# A kind for each feature in which classes differ.
SEPARATE_DOCUMENTS = [
    "llama",
    "mixtral",  # experts
    "gemma2",  # soft caps of scores and logits, window
    "granite",  # logits scaling, attention multiplier
    "cohere",  # logit scale, parallel residual
    "gpt_oss",  # sinks, window
    "deepseek_v3",  # values of another width than keys
    "llama4_text",  # chunks; its decoder is the model itself
    "gemma4",  # text decoder inside a wrapper; the soft cap is only in the text config
    "gemma4_text/ple+shared",  # shared keys and values
    "diffllama",  # two calls of attention in each block
    "mistral3",  # a wrapper without its own causal class
]
# Kinds in which packed documents mix, and the number of decoder layers (of 4) that keep documents
# separate, because they pass the argument `documents` to the attention function.
MIX_DOCUMENTS = [("qwen3_5_text", 1), ("lfm2", 1), ("stablelm", 0), ("nemotron", 0)]
LOSS_ONLY = [
    "qwen3_5_text",  # recurrent state
    "falcon_h1",  # its forward method reads an attribute of `self.model`
    "phimoe",  # random router
    "opt",  # its forward method calls `self.model.decoder`
]
# Tokens of a sequence, and of each document in two packs, which end with padding.
LENGTH, DOCUMENTS = 24, ((7, 12, 3), (20, 1, 2))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Use one thread, so that sums have the same order in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 250, (2, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, :5] = IGNORED
    return ids, labels


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("kind", [*SEPARATE_DOCUMENTS, *LOSS_ONLY])
def test_the_loss_equals_that_of_the_model_class(kind, num_chunks):
    model, (ids, labels) = build(kind, kinds=ALL), make_batch()
    model.set_attn_implementation("eager")
    theirs = model(input_ids=ids, labels=labels, use_cache=False).loss
    model.set_attn_implementation(WITHIN_DOCUMENTS)
    ours = SummedLoss(model, num_chunks)(ids, labels, ((LENGTH,), (LENGTH,)))
    supervised = int((labels[:, 1:] != IGNORED).sum())
    assert float(ours) / supervised == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("kind", ["granite", "gemma2", "gpt_oss", "gemma4"])
def test_the_gradient_equals_that_of_the_model_class(kind):
    model, (ids, labels) = build(kind), make_batch()
    weight = text_decoder(model).layers[0].self_attn.q_proj.weight
    model.set_attn_implementation("eager")
    [theirs] = torch.autograd.grad(model(input_ids=ids, labels=labels).loss, weight)
    model.set_attn_implementation(WITHIN_DOCUMENTS)
    loss = SummedLoss(model, 3)(ids, labels, ((LENGTH,), (LENGTH,)))
    [ours] = torch.autograd.grad(loss / int((labels[:, 1:] != IGNORED).sum()), weight)
    assert relative_error(ours, theirs) < 3e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", [*SEPARATE_DOCUMENTS, "qwen3_5_text"])
def test_attention_equals_eager_attention_beyond_window_and_chunk(kind):
    model, (ids, _) = build(kind), make_batch()
    model.set_attn_implementation("eager")
    theirs = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(WITHIN_DOCUMENTS)
    assert relative_error(model(input_ids=ids, use_cache=False).logits, theirs) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "deepseek_v3"])
def test_a_fused_kernel_computes_attention_so_no_scores_are_materialised(kind):
    model, (ids, _) = build(kind), make_batch()
    model.set_attn_implementation(WITHIN_DOCUMENTS)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises an error if it cannot be used
        model(input_ids=ids, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("kind", SEPARATE_DOCUMENTS)
def test_a_packed_document_has_the_hidden_states_that_it_has_alone(kind):
    model, (ids, labels) = build(kind), make_batch()
    model.set_attn_implementation(WITHIN_DOCUMENTS)
    arguments = document_arguments(WITHIN_DOCUMENTS, DOCUMENTS, ids)
    decoder = text_decoder(model)
    packed = decoder(input_ids=ids, use_cache=False, **arguments).last_hidden_state
    layers = blocks(model)
    assert num_blocks_with(arguments["documents"].receivers, layers) == len(layers) == 4
    for row, lengths in enumerate(DOCUMENTS):
        start = 0
        for length in lengths:
            span = slice(start, start + length)
            alone = decoder(input_ids=ids[row : row + 1, span], use_cache=False).last_hidden_state
            assert relative_error(packed[row, span], alone[0]) < 1e-5
            start += length
    SummedLoss(model)(ids, labels, DOCUMENTS)  # not refused


@torch.no_grad()
@pytest.mark.parametrize(("kind", "num_blocks"), MIX_DOCUMENTS)
def test_packs_are_refused_if_a_block_does_not_separate_documents(kind, num_blocks):
    model, (ids, labels) = build(kind), make_batch()
    model.set_attn_implementation(WITHIN_DOCUMENTS)
    with refused("packing: false", f"{num_blocks} of 4 blocks", model.config.model_type):
        SummedLoss(model)(ids, labels, DOCUMENTS)
    SummedLoss(model)(ids, labels, ((LENGTH,), (LENGTH,)))  # without packs it is accepted


@torch.no_grad()
def test_attention_with_more_keys_than_tokens_is_refused():
    model, (ids, _) = build("deepseek_v4"), make_batch()
    model.set_attn_implementation(WITHIN_DOCUMENTS)
    with refused("DeepseekV4Attention", "24", "30"):  # tokens and keys
        model(input_ids=ids, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("name", ["position_bias", "indexer_mask"])
def test_an_unknown_argument_of_attention_is_refused_unless_it_is_none(name):
    query = torch.randn(1, 2, 5, 8)
    attend = AttentionInterface()[WITHIN_DOCUMENTS]
    attend(torch.nn.Module(), query, query, query, None, **{name: None})
    with refused(name, "Module"):
        attend(torch.nn.Module(), query, query, query, None, **{name: torch.zeros(1)})


def test_attention_to_later_tokens_is_refused():
    query, module = torch.randn(1, 2, 5, 8), torch.nn.Module()
    module.is_causal = False
    with refused("later tokens"):
        attention._attend(module, query, query, query, None)
    with refused("later tokens"):
        attention._attend(torch.nn.Module(), query, query, query, None, is_causal=False)


def test_a_block_with_several_calls_of_attention_is_counted_once():
    query = torch.randn(1, 2, 5, 8)
    documents = PackedDocuments(((2, 3),))
    layers = [nn.ModuleList([nn.Module(), nn.Module()]) for _ in range(3)]
    # Both modules of layer 0 call attention, one of layer 1 calls it twice, and none of layer 2.
    for module in [*layers[0], layers[1][1], layers[1][1]]:
        attention._attend(module, query, query, query, None, documents=documents)
    with refused("2 of 3 blocks", "llama", "packing: false"):
        require_separate_documents(documents, layers, "llama")
    require_separate_documents(documents, layers[:2], "llama")
