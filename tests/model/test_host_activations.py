"""Inputs of checkpointed layers are in host memory, and gradients are those of plain layers."""

import weakref

import pytest
import torch
from torch import nn

from pipeline.model import host_activations
from pipeline.model.host_activations import HostActivations

pytestmark = pytest.mark.tensor


def forward(layers, hidden, checkpoint=None):
    """The output of the layers, and a weak reference to the storage of each layer's input."""
    inputs = []
    for layer in layers:
        inputs.append(weakref.ref(hidden.untyped_storage()))
        hidden = layer(hidden) if checkpoint is None else checkpoint(layer, hidden)
    return hidden, inputs


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_graph_keeps_no_input_and_the_gradients_are_equal(use_reentrant):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)]
    weights = [weight for layer in layers for weight in layer.parameters()]
    leaf = torch.randn(2, 5, 8, requires_grad=True)
    output, _ = forward(layers, leaf * 2)  # only `leaf` itself is referenced by this test
    expected = torch.autograd.grad(output.sin().sum(), [leaf, *weights])

    host = HostActivations()
    for _ in range(2):  # two micro-batches
        output, inputs = forward(
            layers,
            leaf * 2,
            lambda *args: host.checkpoint(*args, use_reentrant=use_reentrant),
        )
        assert [storage() for storage in inputs] == [None] * 4
        for weight in (leaf, *weights):
            weight.grad = None
        output.sin().sum().backward()
        for weight, gradient in zip((leaf, *weights), expected, strict=True):
            assert weight.grad.equal(gradient)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inputs_of_layers_without_gradients_are_released(use_reentrant, monkeypatch):
    """Only the last layers have an adapter, so the backward pass ends before the first layers."""
    live_inputs = weakref.WeakSet()

    class TrackedInput(host_activations._Input):
        def __init__(self, *args):
            super().__init__(*args)
            live_inputs.add(self)

    monkeypatch.setattr(host_activations, "_Input", TrackedInput)
    layers, host = [nn.Linear(8, 8) for _ in range(4)], HostActivations()
    for layer in layers[:2]:
        layer.requires_grad_(False)
    for _ in range(2):
        output, _ = forward(
            layers,
            torch.randn(2, 5, 8),
            lambda *args: host.checkpoint(*args, use_reentrant=use_reentrant),
        )
        if output.requires_grad:  # re-entrant checkpointing needs an input with a gradient
            output.sum().backward()
        del output
        assert not live_inputs


def test_saved_tensors_other_than_the_hidden_states_are_not_copied_to_the_host():
    host, positions = HostActivations(), torch.randn(5, 8)
    hidden = torch.randn(5, 8, requires_grad=True) * 1
    packed = host._pack((hidden.data_ptr(), hidden.shape), positions)
    assert packed is positions
    assert host._unpack(packed) is positions


def test_a_function_without_a_positional_input_is_refused():
    with pytest.raises(AssertionError, match="offload_activations"):
        HostActivations().checkpoint(lambda: None, use_reentrant=False)
