"""Predicted time and memory of the decompositions that PiSSA, OLoRA and LoftQ make at the start.

Rank 0 decomposes one weight after another in fp32, while the other ranks wait. A resumed run makes
no decompositions.
"""

from dataclasses import dataclass

from pipeline.config.settings import RunSettings
from pipeline.plan.given.adapter_counts import AdaptedLayer, adapted_layers
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.shape import ModelShape

# Fraction of the 16-bit matrix rate that a decomposition in fp32 reaches. GPU: an assumption, not
# measured. CPU, one thread of a Xeon, 2026-11-30: SVD of 576 x 576 to 4096 x 1024 at 80 to 107
# GFLOP/s of the 150 that catalogue.py has for a core, QR at 65 to 89, approximate SVD at 51 to 69.
_RATE_SHARE = {"cuda": 0.001, "cpu": 0.5}


@dataclass(frozen=True, kw_only=True)
class Decompositions:
    """The decompositions of a run.

    `kind`: SVD, approximate SVD or QR. `matrices`: number of decomposed weights. `peak_bytes`:
    memory of the largest decomposition on rank 0.
    """

    kind: str
    matrices: int
    seconds: float
    peak_bytes: int


def decompositions(
    shape: ModelShape, settings: RunSettings, layout: Layout, hardware: Hardware
) -> Decompositions | None:
    """The decompositions at the start of a run; None if it makes none."""
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
    """
    layers = _decomposed_layers(shape, settings)
    is_approximate = "niter" in str(settings.init_lora_weights)
    largest = 0
    for d_out, d_in, r in {(each.linear.d_out, each.linear.d_in, each.r) for each in layers}:
        m, n = max(d_out, d_in), min(d_out, d_in)
        factors = r * (m + n) if is_approximate else m * n + n * n
        largest = max(largest, 4 * (3 * m * n + 2 * factors))
    return largest


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
    Matrix Computations, 4th ed., s.8.6 and 5.2). Approximate SVD (torch.svd_lowrank): two products
    with r columns in each iteration and two more, and a QR after each product.
    """
    d_out, d_in = layer.linear.d_out, layer.linear.d_in
    m, n = max(d_out, d_in), min(d_out, d_in)
    if "niter" in method:
        products = 2 * int(method.rpartition("_")[2]) + 2
        return products * (2 * m * n * layer.r + 4 * m * layer.r**2)
    return 4 * m * n**2 if method == "olora" else 6 * m * n**2 + 20 * n**3
