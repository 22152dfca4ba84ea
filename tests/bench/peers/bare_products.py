"""Rate of matrix products of one process, in FLOP/s: the forward products of a model.

Every layer has weights of its own, as in a model, so that they are not in the cache. The result is
the rate in bf16 or in fp32, whichever is higher: some CPUs multiply faster in fp32.
"""

import json
import sys
import time
from pathlib import Path

import torch

TOKENS = 384  # rows of each input: about the tokens of a micro-batch of `make bench`
MIN_SECONDS, MIN_PASSES = 1.0, 5


def rate(sizes, dtype):
    """Median rate over several passes through 8 layers; the first pass warms up.

    `sizes`: shapes of the weights of a layer, each (outputs, inputs).
    """
    layers = [torch.randn(size, dtype=dtype) for _ in range(8) for size in sizes]
    inputs = {size: torch.randn(TOKENS, size, dtype=dtype) for _, size in sizes}
    flops = sum(2 * TOKENS * weight.numel() for weight in layers)
    rates, begin = [], time.perf_counter()
    while time.perf_counter() - begin < MIN_SECONDS or len(rates) < MIN_PASSES:
        start = time.perf_counter()
        for weight in layers:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        rates.append(flops / (time.perf_counter() - start))
    measured = sorted(rates[1:])
    return measured[len(measured) // 2]


def main():
    config = json.loads((Path(sys.argv[1]) / "config.json").read_text(encoding="utf-8"))
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    keys = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    sizes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    sizes += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    print(max(rate(sizes, dtype) for dtype in (torch.bfloat16, torch.float32)))


if __name__ == "__main__":
    main()
