"""Matrix products and attention of bf16 tensors in fp32 kernels, for CPUs with slow bf16 kernels.

Inputs are cast to fp32 and results are rounded to bf16, so all tensors between the kernels stay in
bf16. A matrix product differs from that of a bf16 kernel only in the order of its sums: products of
two bf16 values are exact in fp32, and bf16 kernels also add them in fp32. Attention is more exact
than in bf16, because the weights of the softmax are not rounded to bf16.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.plan.given.fast_paths import FP32_PART_VALUES

# For fewer tokens, casting the weight takes longer than the product.
_MIN_TOKENS = 32
# PyTorch's fused attention on a CPU. `scaled_dot_product_attention` calls the first function, but
# does not return the log-sum-exp, which the second needs.
_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def multiply_in_fp32(model: nn.Module) -> None:
    """Replace the forward methods of the linear layers whose weights are frozen and in bf16."""
    for module in model.modules():
        if type(module) is nn.Linear and _is_frozen_in_bf16(module):
            module.forward = partial(_linear, module)  # type: ignore[method-assign]


def _is_frozen_in_bf16(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return all(p.dtype == torch.bfloat16 and not p.requires_grad for p in parameters)


def _linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The output of a linear layer; replaces its forward method."""
    if x.dtype != torch.bfloat16 or x.numel() < _MIN_TOKENS * x.shape[-1]:
        return F.linear(x, layer.weight, layer.bias)
    output: torch.Tensor = _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return output


class _Linear(torch.autograd.Function):
    """x (..., d_in), frozen weight (d_out, d_in) and bias (d_out) or None -> (..., d_out)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The output, rounded to bf16."""
        ctx.save_for_backward(weight)
        inputs = x.reshape(-1, x.shape[-1]).float()
        output = x.new_empty(len(inputs), len(weight))
        start = 0
        for part, columns in _parts(weight, output):
            end = start + len(part)
            if bias is None:
                columns.copy_(inputs @ part.float().t())
            else:  # the bias is added before the sum is rounded to bf16
                columns.copy_(torch.addmm(bias[start:end].float(), inputs, part.float().t()))
            start = end
        return output.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of x, rounded to bf16."""
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        output_gradient = gradient.reshape(-1, len(weight))
        input_gradient = torch.zeros(len(output_gradient), weight.shape[1])
        for part, columns in _parts(weight, output_gradient):
            input_gradient.addmm_(columns.float(), part.float())
        return input_gradient.to(gradient.dtype).view(*gradient.shape[:-1], -1), None, None


def _parts(
    weight: torch.Tensor, outputs: torch.Tensor
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of the rows of a weight (d_out, d_in), each with its columns of `outputs` (T, d_out).

    A part is so small that it is still in the CPU's cache after it has been cast.
    """
    rows = max(1, FP32_PART_VALUES // weight.shape[1])
    return zip(torch.split(weight, rows), torch.split(outputs, rows, dim=1), strict=True)


def attend_in_fp32(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Causal attention in bf16: (B, H, L, D), (B, K, L, D), (B, K, L, D) -> (B, H, L, D)."""
    output: torch.Tensor = _Attention.apply(query, key, value, scaling)  # type: ignore[no-untyped-call]
    return output


class _Attention(torch.autograd.Function):
    """Causal attention that saves bf16 tensors for its backward pass, and casts them there."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
    ) -> torch.Tensor:
        """The output, rounded to bf16."""
        tensors = (tensor.float() for tensor in (query, key, value))
        output, logsumexp = _attention(*tensors, is_causal=True, scale=scaling)
        rounded: torch.Tensor = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, rounded, logsumexp)
        ctx.scaling = scaling
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of query, key and value, rounded to bf16."""
        *saved, logsumexp = ctx.saved_tensors
        tensors = (tensor.float() for tensor in (*gradients, *saved))
        results = _attention_backward(*tensors, logsumexp, 0.0, True, scale=ctx.scaling)
        return (*(result.to(saved[0].dtype) for result in results), None)
