"""Predicted time and memory of the decompositions of PiSSA, OLoRA, LoftQ and EVA at the start.

Rank 0 decomposes one matrix after another in fp32, while the other ranks wait. PiSSA, OLoRA and
LoftQ decompose weights. EVA decomposes the inputs of layers, which it records in forward passes
over training data. A resumed run makes no decompositions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.activations import activations
from pipeline.plan.cost.gathers import gathered_bytes
from pipeline.plan.cost.per_token import cost_per_token
from pipeline.plan.cost.speed import gather_seconds, reachable_rates
from pipeline.plan.given.adapter_counts import (
    AdaptedLayer,
    adapted_layers,
    adapter_counts,
    input_of,
)
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.layout import Layout, SequenceProfile
from pipeline.plan.given.shape import ModelShape

# Number of training sequences over which EVA runs the base, one after another. It stops earlier if
# all directions have converged.
EVA_SEQUENCES = 128
# Number of tokens of a sequence whose inputs EVA decomposes. All 128 K tokens of a sequence would
# take tens of GB.
EVA_TOKENS = 4096
# Least number of rows (inputs at a token) that EVA decomposes at once, unless the data end. Each
# decomposition includes the directions so far, so many small ones take longer than few large ones.
EVA_ROWS = 256
# Fraction of the 16-bit matrix rate that a decomposition in fp32 reaches. GPU: an assumption, not
# measured. CPU, one thread of a Xeon, 2026-11-30: SVD of 576 x 576 to 4096 x 1024 at 80 to 107
# GFLOP/s of the 150 that catalogue.py has for a core, QR at 65 to 89, approximate SVD at 51 to 69.
_RATE_SHARE = {"cuda": 0.001, "cpu": 0.5}
# The same for EVA's PCA, whose matrices are small and whose means are in fp64. CPU: 3 to 10 GFLOP/s
# of the 150 for a core, 2026-12-01, `python -m tests.bench.input_directions`.
_PCA_RATE_SHARE = {"cuda": 0.001, "cpu": 0.035}


@dataclass(frozen=True, kw_only=True)
class Decompositions:
    """The decompositions of a run.

    `kind`: SVD, approximate SVD, QR or PCA of the inputs. `matrices`: number of weights that are
    decomposed or have these inputs. `seconds`: with EVA for EVA_SEQUENCES of max_length.
    `peak_bytes`: memory of the largest decomposition on rank 0.
    """

    kind: str
    matrices: int
    seconds: float
    peak_bytes: int


def decompositions(
    shape: ModelShape, settings: RunSettings, layout: Layout, hardware: Hardware
) -> Decompositions | None:
    """The decompositions at the start of a run; None if it makes none."""
    if settings.initialises_from_inputs:
        return Decompositions(
            kind="PCA of the inputs",
            matrices=len(adapted_layers(shape, settings)),
            seconds=_eva_seconds(shape, settings, layout, hardware),
            peak_bytes=decomposition_bytes(shape, settings),
        )
    layers = _decomposed_layers(shape, settings)
    if not layers:
        return None
    method = str(settings.init_lora_weights)
    flops = sum(_flops(method, layer) for layer in layers)
    sharers = layout.ranks_per_node if hardware.kind == "cpu" else 1
    return Decompositions(
        kind="approximate SVD" if "niter" in method else "QR" if method == "olora" else "SVD",
        matrices=len(layers),
        seconds=flops / (_RATE_SHARE[hardware.kind] * hardware.flops / sharers),
        peak_bytes=decomposition_bytes(shape, settings),
    )


def decomposition_bytes(shape: ModelShape, settings: RunSettings) -> int:
    """Peak bytes of the largest decomposition at the start of a run; 0 if it makes none.

    The sum of these tensors in fp32: the weight, a copy of it, the residual (the weight minus the
    product B A), the factors, and a workspace of the same size as the factors (LAPACK's gesdd). The
    two factors of an exact decomposition of an (m, n) matrix have m n and n^2 values. Those of an
    approximate decomposition have m r and n r values.

    EVA decomposes at least EVA_ROWS inputs of a layer together with r earlier directions, with
    factors of twice the r.
    """
    if settings.initialises_from_inputs:
        num_rows = EVA_ROWS + min(settings.max_length, EVA_TOKENS)  # kept ones and a sequence
        matrices = [
            (num_rows + layer.r, layer.linear.d_in, 2 * layer.r)
            for layer in _layers_by_input(shape, settings)
        ]
        return _largest_bytes(matrices, is_approximate=True)
    layers = _decomposed_layers(shape, settings)
    matrices = [(layer.linear.d_out, layer.linear.d_in, layer.r) for layer in layers]
    return _largest_bytes(matrices, is_approximate="niter" in str(settings.init_lora_weights))


def initial_values_bytes(
    shape: ModelShape,
    settings: RunSettings,
    layout: Layout,
    hardware: Hardware,
    sequences: SequenceProfile,
) -> int:
    """Peak bytes of rank 0 beside its base while initial values are computed; 0 without any.

    `sequences`: profile of the longest sequences. At ZeRO-3 the weight that is decomposed is
    gathered. EVA decomposes inputs during a forward pass over one sequence, which each rank runs
    whole, without tiles.
    """
    b = layout.bytes_per_value
    largest_linear = b * shape.largest_linear
    if not settings.initialises_from_inputs:
        decomposed = decomposition_bytes(shape, settings)
        return decomposed + largest_linear if decomposed and layout.is_sharded else decomposed
    one_sequence = replace(layout, micro_batch_size=1, sequence_parallel_size=1, mlp_tiles=1)
    acts = activations(shape, settings, one_sequence, hardware, sequences)
    head, block, _ = gathered_bytes(shape, settings, layout)
    # Without gradients a block has at most the tensors that it saves with them.
    in_block = block + max(block.saved for block in acts.blocks)
    in_block += largest_linear if settings.is_quantised else 0  # dequantised
    in_block += decomposition_bytes(shape, settings)
    adapter = b * adapter_counts(shape, settings).parameters
    # For each input of layers, EVA keeps the directions and up to EVA_ROWS rows.
    kept = sum(
        4 * (EVA_ROWS + layer.r) * layer.linear.d_in for layer in _layers_by_input(shape, settings)
    )
    outside = b * shape.largest_outside if layout.is_gathered else 0
    forward = max(outside, head + acts.logits, in_block)
    return adapter + kept + acts.of_tokens + acts.block_input + forward


def _largest_bytes(matrices: Sequence[tuple[int, int, int]], *, is_approximate: bool) -> int:
    """Peak bytes of the largest decomposition of matrices, given as rows, columns and r."""
    largest = 0
    for d_out, d_in, r in set(matrices):
        m, n = max(d_out, d_in), min(d_out, d_in)
        factors = r * (m + n) if is_approximate else m * n + n * n
        largest = max(largest, 4 * (3 * m * n + 2 * factors))
    return largest


def _layers_by_input(shape: ModelShape, settings: RunSettings) -> list[AdaptedLayer]:
    """For each input of adapted layers, the layer with the largest r."""
    layers: dict[str, AdaptedLayer] = {}
    for layer in sorted(adapted_layers(shape, settings), key=lambda layer: layer.r):
        layers[input_of(layer.name)] = layer
    return list(layers.values())


def _eva_seconds(
    shape: ModelShape, settings: RunSettings, layout: Layout, hardware: Hardware
) -> float:
    """Seconds of the forward passes over training sequences and of the PCA of their inputs."""
    cost = cost_per_token(shape, settings, layout.training_dtype, is_sharded=layout.is_sharded)
    rates, length = reachable_rates(layout, hardware), settings.max_length
    forward_flops = length * (cost.base_flops + cost.score_flops * length / 2)
    forward_s = forward_flops / rates.flops + gather_seconds(cost, layout, rates)
    tokens = min(length, EVA_TOKENS)  # of a sequence
    flops = sum(
        pca_flops(tokens, layer.linear.d_in, layer.r) for layer in _layers_by_input(shape, settings)
    )
    sharers = layout.ranks_per_node if hardware.kind == "cpu" else 1
    pca_rate = _PCA_RATE_SHARE[hardware.kind] * hardware.flops / sharers
    return EVA_SEQUENCES * (forward_s + flops / pca_rate)


def pca_flops(tokens: int, width: int, r: int) -> float:
    """FLOPs of EVA's PCA for each sequence of `tokens` inputs of this width."""
    rows = max(tokens, EVA_ROWS, 2 * r)  # of an update
    return _approximate_flops(rows + r, width, 2 * r, iterations=2) * tokens / rows


def _decomposed_layers(shape: ModelShape, settings: RunSettings) -> list[AdaptedLayer]:
    """The adapted layers whose weight is decomposed; LoftQ decomposes quantised weights only."""
    if not (settings.initialises_from_base or settings.corrects_quantisation):
        return []
    layers = adapted_layers(shape, settings)
    if settings.initialises_from_base:
        return list(layers)
    return [layer for layer in layers if layer.linear.is_quantised]


def _flops(method: str, layer: AdaptedLayer) -> float:
    """FLOPs of one decomposition of an (m, n) matrix with m >= n.

    SVD with singular vectors: 6 m n^2 + 20 n^3. QR with an explicit Q: 4 m n^2 (Golub and Van Loan,
    Matrix Computations, 4th ed., s.8.6 and 5.2). Approximate SVD: two products with r columns in
    each iteration and two more, and a QR after each product.
    """
    d_out, d_in = layer.linear.d_out, layer.linear.d_in
    m, n = max(d_out, d_in), min(d_out, d_in)
    if "niter" in method:
        return _approximate_flops(m, n, layer.r, iterations=int(method.rpartition("_")[2]))
    return 4 * m * n**2 if method == "olora" else 6 * m * n**2 + 20 * n**3


def _approximate_flops(m: int, n: int, r: int, *, iterations: int) -> float:
    """FLOPs of an approximate SVD of an (m, n) matrix with r columns (torch.svd_lowrank)."""
    products = 2 * iterations + 2
    return products * (2 * m * n * r + 4 * max(m, n) * r**2)
