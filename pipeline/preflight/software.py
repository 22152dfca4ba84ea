"""Checks of software: versions of packages, torch with CUDA and NCCL, bitsandbytes, process group.

Probes import torch only after the rendezvous.
"""

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.requirements import Requirement

from pipeline import __version__
from pipeline.errors import UserError
from pipeline.preflight.check import Check, Finding, ProbeResults, compare, fail, ok
from pipeline.preflight.context import RankContext
from pipeline.preflight.gpus import own_devices
from pipeline.preflight.rates import devices_of

_INSTALL = "install the project again (make install; a tracker: pip install -e '.[NAME]')"
# Mean absolute error, in standard deviations, after normally distributed numbers are quantised in
# blocks of 64 and dequantised. Measured on a CPU, 2026-11-25, bitsandbytes 0.50.2; double
# quantisation adds 0.0001.
_QUANTISATION_ERRORS = {"nf4": 0.0728, "fp4": 0.0965}
_TOLERANCE = 0.2  # relative


def _probe_versions(context: RankContext) -> dict[str, str]:
    """Versions of Python, of the project's packages and of those of the run's trackers.

    Raises UserError if a package is missing or too old.
    """
    trackers = context.settings.trackers if context.settings is not None else []
    versions = {"rankzero": __version__, "python": platform.python_version()}
    wrong = []
    try:
        requirements = requires("rankzero") or []
    except PackageNotFoundError:
        raise UserError("packages: the project is not installed; run make install") from None
    for line in requirements:
        required = Requirement(line)
        extras = ["", *trackers]  # an extra has the name of its tracker
        if (marker := required.marker) and not any(marker.evaluate({"extra": e}) for e in extras):
            continue
        try:
            versions[required.name] = version(required.name)
        except PackageNotFoundError:
            wrong.append(f"{required.name} is not installed")
            continue
        if not required.specifier.contains(versions[required.name], prereleases=True):
            wrong.append(
                f"{required.name} {versions[required.name]} does not satisfy {required.specifier}"
            )
    if wrong:
        raise UserError(f"packages: {', '.join(wrong)}; {_INSTALL}")
    return versions


def _assess_versions(results: ProbeResults) -> Iterable[Finding]:
    names = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes")
    packages = ", ".join(f"{name} {results.first[name]}" for name in names)
    text = f"Python {results.first['python']}, {packages}"
    return compare(results, text, "install the same versions on every node (constraints.txt)")


def _probe_libraries(context: RankContext) -> dict[str, str]:
    """Versions of torch, CUDA and NCCL.

    Raises UserError if torch detects no GPU or the driver is too old for it.
    """
    import torch

    if context.hardware.kind == "cpu":
        return {"torch": torch.__version__, "cuda": "not used", "nccl": "not used"}
    built = torch.version.cuda
    if built is None:
        raise UserError(
            f"torch {torch.__version__} is built without CUDA, but this node has GPUs; install "
            "the wheel of torch for its driver (pytorch.org)"
        )
    _require_driver(built)
    if not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} (CUDA {built}) detects no GPU, but NVML does; check "
            "CUDA_VISIBLE_DEVICES and the driver (nvidia-smi)"
        )
    own_devices(context, torch.cuda.device_count())
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {"torch": torch.__version__, "cuda": built, "nccl": nccl}


def _require_driver(built: str) -> None:
    """Raise UserError if the driver does not support the CUDA version that torch is built with.

    A driver supports all CUDA versions that have the major version of its newest one (NVIDIA, CUDA
    compatibility).
    """
    import pynvml

    pynvml.nvmlInit()
    try:
        newest = int(pynvml.nvmlSystemGetCudaDriverVersion())
        driver = pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()
    if int(built.split(".")[0]) > newest // 1000:
        raise UserError(
            f"torch is built with CUDA {built}, but driver {driver} supports only CUDA up to "
            f"{newest / 1000:.1f}; install a newer driver, or torch for CUDA {newest // 1000}"
        )


def _assess_libraries(results: ProbeResults) -> Iterable[Finding]:
    first = results.first
    text = f"torch {first['torch']}, CUDA {first['cuda']}, NCCL {first['nccl']}"
    return compare(results, text, "install the same wheels on every node (constraints.txt)")


def _probe_quantisation(context: RankContext) -> dict[str, Any]:
    """Quantisation error of a tile on each device of this rank; empty without `load_in_4bit`."""
    settings = context.known_settings
    if not settings.load_in_4bit:
        return {"errors": [], "kind": settings.bnb_4bit_quant_type}
    from pipeline.model.base import quantisation_error

    errors = [quantisation_error(settings, device) for device in devices_of(context)]
    return {"errors": errors, "kind": settings.bnb_4bit_quant_type}


def _assess_quantisation(results: ProbeResults) -> Iterable[Finding]:
    """Compare the errors with the known error of correct kernels."""
    if not results.first["errors"]:
        return
    kind = results.first["kind"]
    expected = _QUANTISATION_ERRORS[kind]
    wrong = [
        rank
        for rank, result in results.by_rank.items()
        if not all(abs(error - expected) < _TOLERANCE * expected for error in result["errors"])
    ]
    if wrong:
        errors = ", ".join(f"{e:.3g}" for rank in wrong for e in results.by_rank[rank]["errors"])
        yield fail(
            f"{results.where(wrong)}: numbers quantised to {kind} and dequantised differ by "
            f"{errors} standard deviations, expected {expected:.3g}",
            "install bitsandbytes for this CUDA (python -m bitsandbytes shows what it detects)",
            wrong,
        )
    else:
        error = results.first["errors"][0]
        yield ok(f"{kind}: quantisation error {error:.3g} standard deviations, as expected")


def _probe_process_group(context: RankContext) -> str:
    """Initialise the process group in the same way as training. Collective."""
    context.session.start()
    return "nccl" if context.hardware.kind == "cuda" else "gloo"


def _assess_process_group(results: ProbeResults) -> Iterable[Finding]:
    yield ok(f"{len(results.by_rank)} ranks over {results.first}")


VERSIONS = Check("versions", _probe_versions, _assess_versions, _INSTALL, needs="nothing")
LIBRARIES = Check("libraries", _probe_libraries, _assess_libraries, _INSTALL)
QUANTISATION = Check(
    "4 bits", _probe_quantisation, _assess_quantisation,
    "run python -m bitsandbytes, which shows the CUDA version that it detects",
)  # fmt: skip
PROCESS_GROUP = Check(
    "process group", _probe_process_group, _assess_process_group,
    "set NCCL_DEBUG=INFO, which logs what NCCL tries",
)  # fmt: skip
