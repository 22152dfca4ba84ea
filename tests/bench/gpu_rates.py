"""Rates of one device: matrix products, memory, kernel launches, and attention of packs."""

import inspect
import time

import torch
from torch.nn.functional import scaled_dot_product_attention


class Missing(Exception):
    """A feature that this machine does not have."""


def seconds_of(work, device, repeats=5):
    """Median seconds of a call, after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        _synchronise(device)
        start = time.perf_counter()
        work()
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def _synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def products(device, *, is_tiny):
    """FLOP/s of bf16 matrix products of the sizes of Llama 3.1 8B, for 8192 tokens."""
    tokens, sizes = (64, [(64, 96)]) if is_tiny else (8192, [(4096, 4096), (4096, 14336)])
    result = {}
    for d_in, d_out in sizes:
        a = torch.randn(tokens, d_in, device=device, dtype=torch.bfloat16)
        b = torch.randn(d_out, d_in, device=device, dtype=torch.bfloat16)
        seconds = seconds_of(lambda a=a, b=b: [a @ b.T for _ in range(10)], device) / 10
        result[f"{tokens} x {d_in} x {d_out}"] = 2 * tokens * d_in * d_out / seconds
    return {"flops": result}


def bandwidth(device, *, is_tiny):
    """Bytes per second, read plus written, of a copy on the device; and from pinned host memory."""
    count = 2**12 if is_tiny else 2**30
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    result = {"copy": 2 * count / seconds_of(lambda: target.copy_(source), device)}
    if device.type == "cuda":
        host = torch.zeros(count, dtype=torch.uint8, pin_memory=True)
        result["from host"] = count / seconds_of(lambda: target.copy_(host), device)
    return result


def launches(device, *, is_tiny):
    """Host seconds for one small kernel from eager PyTorch."""
    count = 10 if is_tiny else 5000
    x = torch.zeros(8, device=device)
    return {"seconds": seconds_of(lambda: [x.add_(1) for _ in range(count)], device) / count}


def attention(device, *, is_tiny):
    """Seconds of attention of packs, forward and backward: a kernel per document, and varlen_attn.

    The result also has the difference of the two, relative to the norm, for the output and each
    gradient.
    """
    heads, key_heads, head_dim, lengths = (
        (4, 2, 16, [8, 24]) if is_tiny else (32, 8, 128, [512] * 16)
    )
    total, dtype = sum(lengths), torch.bfloat16
    query, key, value = (
        torch.randn(total, num_heads, head_dim, device=device, dtype=dtype, requires_grad=True)
        for num_heads in (heads, key_heads, key_heads)
    )
    output_gradient = torch.randn(total, heads, head_dim, device=device, dtype=dtype)

    def by_document():
        parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        outputs = [
            scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in part), is_causal=True, enable_gqa=True
            )[0].transpose(0, 1)
            for part in parts
        ]
        return torch.cat(outputs)

    def gradients(forward):
        output = forward()
        return [output.detach(), *torch.autograd.grad(output, (query, key, value), output_gradient)]

    result = {"by document": seconds_of(lambda: gradients(by_document), device)}
    if device.type != "cuda":
        return result | {"varlen_attn": "needs CUDA"}
    kernel = _varlen(lengths, device)
    result["varlen_attn"] = seconds_of(lambda: gradients(lambda: kernel(query, key, value)), device)
    pairs = zip(gradients(by_document), gradients(lambda: kernel(query, key, value)), strict=True)
    names = ("output", "query", "key", "value")
    return result | {
        f"difference of {name}": float((b - a).float().norm() / a.float().norm())
        for name, (a, b) in zip(names, pairs, strict=True)
    }


def _varlen(lengths, device):
    """varlen_attn, causal within documents of these lengths; its arguments differ by version."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Missing("torch.nn.attention.varlen") from error
    bounds = torch.tensor([0, *lengths], device=device, dtype=torch.int32).cumsum(0).int()
    longest = max(lengths)
    parameters = inspect.signature(varlen_attn).parameters
    options = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}

    def attend(query, key, value):
        if "enable_gqa" in parameters:
            return varlen_attn(query, key, value, bounds, bounds, longest, longest,
                               enable_gqa=True, **options)  # fmt: skip
        queries_per_key = query.shape[1] // key.shape[1]  # heads
        key, value = (x.repeat_interleave(queries_per_key, 1) for x in (key, value))
        return varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)

    return attend
