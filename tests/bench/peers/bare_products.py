"""Rate of matrix products of one process, in FLOP/s: the forward products of a model.

Every layer has weights of its own, as in a model, so that they are not in the cache. The result is
the rate in bf16 or in fp32, whichever is higher: some CPUs multiply faster in fp32.
"""

import json
import sys
import time
from pathlib import Path

import torch

TOKENS, SECONDS, PASSES = 384, 1.0, 5  # for at least so long and so often


def rate(sizes, dtype):
    """Median rate over several passes through all layers."""
    layers = [torch.randn(size, dtype=dtype) for _ in range(8) for size in sizes]
    inputs = {size: torch.randn(TOKENS, size, dtype=dtype) for _, size in sizes}
    flops = sum(2 * TOKENS * weight.numel() for weight in layers)
    rates, begin = [], time.perf_counter()
    while time.perf_counter() - begin < SECONDS or len(rates) < PASSES:
        start = time.perf_counter()
        for weight in layers:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        rates.append(flops / (time.perf_counter() - start))
    return sorted(rates[1:])[len(rates[1:]) // 2]


def main():
    config = json.loads((Path(sys.argv[1]) / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    sizes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    sizes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    print(max(rate(sizes, dtype) for dtype in (torch.bfloat16, torch.float32)))


if __name__ == "__main__":
    main()
