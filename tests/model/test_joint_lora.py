"""Joint LoRA layers have the outputs and gradients of peft, and share one dropout mask.

After `join_lora`, layers that read the same input, such as q, k and v, compute the product with
their matrices A at once.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from pipeline.model.joint_lora import join_lora

pytestmark = pytest.mark.tensor

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Attention(nn.Module):
    """Layers with the names of attention; `is_shared`: whether k_proj reads what q_proj reads."""

    def __init__(self, *, is_shared=True):
        super().__init__()
        self.is_shared = is_shared
        sizes = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 6}
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(8, size))

    def forward(self, x):
        """Outputs of all layers."""
        input_of_k = x if self.is_shared else 2 * x
        inputs = {"q_proj": x, "k_proj": input_of_k, "v_proj": x, "o_proj": x + 1}
        return torch.cat([getattr(self, name)(value) for name, value in inputs.items()], dim=-1)


def adapted(*, is_shared=True, **config):
    """`Attention` with a peft adapter whose A and B are random."""
    torch.manual_seed(0)
    patterns = {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"v_proj": 7}}
    options = LoraConfig(r=2, target_modules=NAMES, **(patterns | config))
    model = get_peft_model(Attention(is_shared=is_shared), options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return model


def results(model):
    """Output and gradients for a fixed input, by name."""
    model.zero_grad()
    torch.manual_seed(1)
    x = torch.randn(2, 3, 8, requires_grad=True)
    output = model(x)
    (output * torch.randn_like(output)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads | {"output": output.detach(), "x": x.grad}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("is_shared", [True, False])
def test_outputs_and_gradients_equal_those_of_peft(is_shared):
    model = adapted(is_shared=is_shared)
    expected, names = results(model), list(model.state_dict())
    join_lora(model)
    assert_same(results(model), expected)
    assert_same(results(model), expected)  # nothing is left over from the first pass
    assert list(model.state_dict()) == names


def test_layers_that_share_an_input_share_a_dropout_mask():
    model = adapted(lora_dropout=0.5)
    join_lora(model)
    x = torch.randn(2, 3, 8)
    torch.manual_seed(5)
    output = model(x).split([8, 4, 4, 6], dim=-1)
    torch.manual_seed(5)
    dropped = F.dropout(x.view(-1, 8), 0.5).view_as(x)
    for name, actual in zip(NAMES[:3], output[:3], strict=True):
        layer = getattr(model.base_model.model, name)
        added = layer.lora_B["default"](layer.lora_A["default"](dropped)) * layer.scaling["default"]
        torch.testing.assert_close(actual, layer.base_layer(x) + added)


def test_a_model_in_evaluation_mode_has_no_dropout():
    model = adapted(lora_dropout=0.5).eval()
    expected = results(model)
    join_lora(model)
    assert_same(results(model), expected)


def test_one_product_serves_the_layers_that_share_an_input(monkeypatch):
    model = adapted()
    join_lora(model)
    output_sizes, linear = [], F.linear

    def recording_linear(x, weight, bias=None):
        output_sizes.append(len(weight))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", recording_linear)
    model(torch.randn(2, 3, 8))
    # base of q; A of q, k and v together; bases of k, v and o; A of o
    assert output_sizes == [8, 2 + 3 + 2, 4, 4, 6, 2]


def test_an_output_computed_without_gradients_is_not_used_with_them():
    model = adapted()
    join_lora(model)
    x, q_proj = torch.randn(2, 3, 8), model.base_model.model.q_proj
    with torch.no_grad():  # also computes A for k_proj and v_proj, which are not called here
        q_proj(x)
    model.base_model.model.k_proj(x).sum().backward()
    assert model.base_model.model.k_proj.lora_A["default"].weight.grad.any()


def test_dora_layers_stay_as_they_are():
    model = adapted(use_dora=True)
    expected = results(model)
    join_lora(model)
    assert "forward" not in vars(model.base_model.model.q_proj)
    assert_same(results(model), expected)


def test_a_disabled_adapter_has_no_effect():
    model = adapted()
    join_lora(model)
    x = torch.randn(2, 3, 8)
    with model.disable_adapter():
        off = model.base_model.model.q_proj(x)
    torch.testing.assert_close(off, model.base_model.model.q_proj.base_layer(x))


def test_the_called_modules_do_not_depend_on_the_layout_of_the_input():
    """At ZeRO-3 a call of a module is a collective, and the batches of the ranks differ.

    The layers share the product with A only if they read the same memory, as for `whole`. The other
    input is not contiguous: each layer flattens it into a copy of its own.
    """
    model = adapted(lora_dropout=0.5)
    join_lora(model)
    calls = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    whole = torch.randn(2, 4, 8)
    called = []
    for x in (whole, whole[:, :2]):
        calls.clear()
        model(x)
        called.append(list(calls))
    assert called[0] == called[1]
