"""CPU time of EVA's PCA of the inputs of a layer, and the rate that it reaches.

`python -m tests.bench.input_directions`. The time is CPU time of one thread, so other work on the
machine changes it less than elapsed time.
"""

import time

import torch

from pipeline.model.input_directions import LayerInput
from pipeline.plan.cost.decompositions import EVA_SEQUENCES, pca_flops

CASES = ((576, 37, 16), (1536, 37, 16), (576, 512, 16), (1536, 512, 16), (2048, 512, 64))


def measure(width: int, tokens: int, r: int) -> float:
    """Seconds of CPU time for EVA_SEQUENCES sequences."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(2, 0.1, width)
    layer_input, seconds = LayerInput("layer"), 0.0
    layer_input.r, layer_input.is_supervised = r, torch.ones(tokens, dtype=torch.bool)
    for _ in range(EVA_SEQUENCES):
        rows = torch.randn(1, tokens, width, generator=generator) * scale
        start = time.process_time()
        layer_input.record(torch.nn.Identity(), (rows,))
        seconds += time.process_time() - start
    return seconds


if __name__ == "__main__":
    torch.set_num_threads(1)
    for width, tokens, r in CASES:
        seconds = measure(width, tokens, r)
        rate = EVA_SEQUENCES * pca_flops(tokens, width, r) / seconds / 1e9
        print(f"width {width}, {tokens} tokens, r {r}: {seconds:.2f} s, {rate:.1f} GFLOP/s")
