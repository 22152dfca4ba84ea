"""A tiled MLP has the outputs and gradients of the whole MLP, in every dense model family.

It computes parts of the sequence (tiles) one after the other, and again in the backward pass.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.model.structure import blocks
from pipeline.model.tiles import TiledForward
from pipeline.plan.given.families import FAMILIES
from pipeline.plan.given.shape import shape_of
from tests.bench.memory import BASE

pytestmark = pytest.mark.tensor

DENSE = [kind for kind, family in FAMILIES.items() if family.experts is None]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 4}


def mlp_of(kind):
    """The shape of a small model of a family, and its MLP."""
    torch.manual_seed(0)
    values = {key: value for key, value in BASE.items() if key != "model_type"} | SMALL
    config = AutoConfig.for_model(kind, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return shape_of(config.to_dict(), kind), blocks(model)[0].mlp.train()


def results(mlp, forward, hidden):
    """The output, the gradient of the input and those of the weights."""
    hidden = hidden.clone().requires_grad_(True)
    mlp.zero_grad()
    output = forward(hidden)
    (output.sin().sum()).backward()
    return [output.detach(), hidden.grad, *(p.grad for p in mlp.parameters())]


@pytest.mark.parametrize("kind", DENSE)
def test_tiles_of_any_number_have_the_results_of_the_whole(kind):
    shape, mlp = mlp_of(kind)
    assert shape.blocks[0].has_tileable_mlp
    hidden = torch.randn(2, 7, 32)
    whole = results(mlp, mlp.forward, hidden)
    for num_tiles in (1, 3, 7, 9):  # 9: more tiles than tokens
        for tiled, expected in zip(
            results(mlp, TiledForward(mlp, num_tiles), hidden), whole, strict=True
        ):
            assert (tiled - expected).norm() <= 1e-6 * expected.norm()


def test_gradients_of_weights_are_accumulated_once():
    """DeepSpeed reduces a gradient when autograd accumulates it."""
    _, mlp = mlp_of("llama")
    calls = []
    mlp.up_proj.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.shape))
    results(mlp, TiledForward(mlp, 4), torch.randn(1, 8, 32))
    assert len(calls) == 1


def test_a_frozen_mlp_with_a_frozen_input_has_no_gradient():
    _, mlp = mlp_of("llama")
    mlp.requires_grad_(False)
    assert not TiledForward(mlp, 4)(torch.randn(1, 8, 32)).requires_grad


def test_the_backward_pass_repeats_the_random_numbers_of_the_forward_pass():
    """The gradient of the input is 0 where dropout has removed it in the forward pass."""
    dropout = torch.nn.Dropout(0.5).train()
    hidden = torch.ones(1, 8, 32, requires_grad=True)
    output = TiledForward(dropout, 4)(hidden)
    state = torch.get_rng_state()
    output.sum().backward()
    assert hidden.grad.equal(output)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("is_training", [True, False])
def test_the_number_of_tiles_does_not_depend_on_the_length(is_training):
    """At ZeRO-3 each tile gathers weights, and another rank may have a longer batch."""
    _, mlp = mlp_of("llama")
    mlp.train(is_training)
    calls = []
    mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    tiled = TiledForward(mlp, 4)
    with torch.no_grad():
        for length in (1, 3, 9):
            tiled(torch.randn(1, length, 32))
    assert len(calls) == 3 * 4
    tiled.is_tiled = False
    assert tiled(torch.randn(1, 1, 32)).shape == (1, 1, 32)
    assert len(calls) == 3 * 4 + 1


def test_the_layers_of_a_tile_read_the_same_memory():
    """A tile of several sequences is not contiguous: each layer would copy it."""
    _, mlp = mlp_of("llama")
    inputs = []
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    results(mlp, TiledForward(mlp, 4), torch.randn(2, 8, 32))
    assert all(x.is_contiguous() for x in inputs)
    assert len(inputs) == 2 * 2 * 4  # layers, forward and recomputed, tiles
