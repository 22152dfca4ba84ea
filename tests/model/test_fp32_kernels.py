"""fp32 kernels give bf16 results at least as exact as those of bf16 kernels, and save no more."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.model import fp32_kernels
from pipeline.model.attention import WITHIN_DOCUMENTS, WITHIN_DOCUMENTS_FP32
from pipeline.model.fp32_kernels import attend_in_fp32, multiply_in_fp32
from tests.model.test_attention import WINDOW, load, logits, make, make_ids

pytestmark = pytest.mark.tensor

BF16 = torch.bfloat16


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


def results(function, *tensors):
    """The output of a function and the gradients of its inputs, for a fixed output gradient."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*inputs)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape).to(BF16).to(output.dtype))
    return [output.detach(), *(tensor.grad for tensor in inputs)]


def assert_as_exact(function, plain, *tensors):
    """Assert that `function` is at least as close to `plain` in fp64 as `plain` is in bf16."""
    in_fp64 = results(plain, *(tensor.double() for tensor in tensors))
    of_function, in_bf16 = results(function, *tensors), results(plain, *tensors)
    for actual, bf16, expected in zip(of_function, in_bf16, in_fp64, strict=True):
        assert actual.dtype == BF16
        # `function` and `plain` round to bf16, which is most of the error: hence only 5 % margin.
        assert error(actual, expected) <= 1.05 * error(bf16, expected) < 0.02


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("part_values", [100, 2**20])  # several parts of the weight, and one
def test_a_linear_layer_is_as_exact_as_in_bf16(monkeypatch, bias, part_values):
    monkeypatch.setattr(fp32_kernels, "FP32_PART_VALUES", part_values)
    torch.manual_seed(0)
    plain = nn.Linear(48, 40, bias=bias, dtype=BF16).requires_grad_(False)
    exact = nn.Linear(48, 40, bias=bias).double()
    exact.load_state_dict(plain.state_dict())
    fast = nn.Sequential(plain)
    x = torch.randn(2, 100, 48).to(BF16)
    expected, in_bf16 = results(exact, x.double()), results(plain, x)
    multiply_in_fp32(fast)  # which changes the layer `plain` in it
    for actual, bf16, reference in zip(results(fast, x), in_bf16, expected, strict=True):
        assert actual.dtype == BF16
        assert error(actual, reference) <= 1.05 * error(bf16, reference) < 0.01


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize(("heads", "keys"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("length", [2, 7, 200])
def test_attention_is_as_exact_as_in_bf16(heads, keys, length, scaling):
    torch.manual_seed(0)
    sizes = (heads, keys, keys)
    tensors = [torch.randn(2, length, n, 16).to(BF16).transpose(1, 2) for n in sizes]
    assert_as_exact(
        lambda *qkv: attend_in_fp32(*qkv, scaling),
        lambda *qkv: F.scaled_dot_product_attention(
            *qkv, is_causal=True, scale=scaling, enable_gqa=True
        ),
        *tensors,
    )


def test_attention_saves_bf16_tensors():
    saved = []
    tensors = [torch.randn(1, 4, 50, 16, dtype=BF16, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = attend_in_fp32(*tensors, None)
    of_bf16 = {tensor.data_ptr() for tensor in saved if tensor.dtype == BF16}
    assert of_bf16 == {tensor.data_ptr() for tensor in (*tensors, output)}
    # the log-sum-exp of 4 heads and 50 tokens
    assert sum(tensor.numel() for tensor in saved if tensor.dtype != BF16) == 4 * 50


def test_trained_quantised_and_fp32_layers_keep_their_kernels():
    class Packed(nn.Linear):
        """A layer of another class, such as one with a 4-bit weight."""

    layers = [nn.Linear(8, 8, dtype=BF16), nn.Linear(8, 8), Packed(8, 8, dtype=BF16)]
    for layer in layers[1:]:
        layer.requires_grad_(False)
    multiply_in_fp32(nn.Sequential(*layers))
    assert not any("forward" in vars(layer) for layer in layers)


def test_few_tokens_are_multiplied_in_bf16(monkeypatch):
    layer = nn.Linear(8, 8, dtype=BF16).requires_grad_(False)
    x = torch.randn(1, fp32_kernels._MIN_TOKENS - 1, 8).to(BF16)
    expected = layer(x)
    multiply_in_fp32(layer)
    monkeypatch.setattr(fp32_kernels, "_Linear", None)
    assert torch.equal(layer(x), expected)


def gradient(model, ids):
    """The gradient of the embedded tokens of packs."""
    embeddings = model.get_input_embeddings()
    inputs = embeddings(ids).detach().requires_grad_()
    handle = embeddings.register_forward_hook(lambda *_: inputs)
    logits(model, ids).square().mean().backward()
    handle.remove()
    return inputs.grad


@pytest.mark.parametrize(("kind", "change"), [("llama", {}), ("gemma3_text", WINDOW)])
def test_gradients_of_packs_are_as_exact_as_in_bf16(tmp_path, kind, change):
    folder, ids = make(tmp_path, kind, change, "bfloat16"), make_ids()
    exact = gradient(load(folder, "rankzero_documents").double(), ids)
    in_bf16 = gradient(load(folder, WITHIN_DOCUMENTS, "bfloat16"), ids)
    model = load(folder, WITHIN_DOCUMENTS_FP32, "bfloat16").requires_grad_(False)
    multiply_in_fp32(model)
    assert error(gradient(model, ids), exact) <= 1.2 * error(in_bf16, exact) < 0.2
