"""Checks of software: versions of packages, torch with CUDA and NCCL, bitsandbytes, process group.

Torch is imported inside the probes that need it, because the first stage runs without torch.
"""

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import chain
from typing import Any

from packaging.requirements import Requirement

from pipeline import __version__
from pipeline.errors import UserError
from pipeline.preflight.check import Check, Finding, ProbeResults, compare, fail, ok
from pipeline.preflight.context import RankContext
from pipeline.preflight.gpus import used_gpu_indices
from pipeline.preflight.rates import devices_of

_INSTALL = "install the project again (make install; a tracker: pip install -e '.[NAME]')"
# Mean absolute error of normally distributed numbers that are quantised in blocks of 64 and
# dequantised, as a multiple of their standard deviation. Measured on a CPU, 2026-11-25,
# bitsandbytes 0.50.2; double quantisation adds 0.0001.
_QUANTISATION_ERRORS = {"nf4": 0.0728, "fp4": 0.0965}
_RELATIVE_TOLERANCE = 0.2


def _probe_versions(context: RankContext) -> dict[str, str]:
    """Versions of Python, of this project, and of each package that it or a tracker requires.

    Raises UserError if a package is missing or its version is not supported.
    """
    # An optional dependency group of pyproject.toml has the name of its tracker; "" means no group.
    groups = ["", *(context.settings.trackers if context.settings is not None else [])]
    versions = {"rankzero": __version__, "python": platform.python_version()}
    problems = []
    try:
        requirements = requires("rankzero") or []
    except PackageNotFoundError:
        raise UserError("packages: the project is not installed; run make install") from None
    for line in requirements:
        required = Requirement(line)
        marker = required.marker
        if marker and not any(marker.evaluate({"extra": group}) for group in groups):
            continue
        try:
            versions[required.name] = version(required.name)
        except PackageNotFoundError:
            problems.append(f"{required.name} is not installed")
            continue
        if not required.specifier.contains(versions[required.name], prereleases=True):
            problems.append(
                f"{required.name} {versions[required.name]} does not satisfy {required.specifier}"
            )
    if problems:
        raise UserError(f"packages: {', '.join(problems)}; {_INSTALL}")
    return versions


def _assess_versions(results: ProbeResults) -> Iterable[Finding]:
    names = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes")
    packages = ", ".join(f"{name} {results.first[name]}" for name in names)
    text = f"Python {results.first['python']}, {packages}"
    return compare(results, text, "install the same versions on every node (constraints.txt)")


def _probe_libraries(context: RankContext) -> dict[str, str]:
    """Versions of torch, CUDA and NCCL.

    Raises UserError if torch detects no GPU, or if the driver is too old for torch's CUDA.
    """
    import torch

    if context.hardware.kind == "cpu":
        return {"torch": torch.__version__, "cuda": "not used", "nccl": "not used"}
    cuda = torch.version.cuda
    if cuda is None:
        raise UserError(
            f"torch {torch.__version__} is built without CUDA, but this node has GPUs; install "
            "the wheel of torch for its driver (pytorch.org)"
        )
    _require_driver(cuda)
    if not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} (CUDA {cuda}) detects no GPU, but NVML does; check "
            "CUDA_VISIBLE_DEVICES and the driver (nvidia-smi)"
        )
    used_gpu_indices(context, torch.cuda.device_count())  # raises if this rank has no GPU
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {"torch": torch.__version__, "cuda": cuda, "nccl": nccl}


def _require_driver(cuda: str) -> None:
    """Raise UserError if the driver does not support the CUDA version that torch is built with.

    A driver reports the newest CUDA version that it supports. It also runs programs built with any
    other CUDA version of the same or an earlier major version (NVIDIA, CUDA compatibility).
    """
    import pynvml

    pynvml.nvmlInit()
    try:
        newest = int(pynvml.nvmlSystemGetCudaDriverVersion())
        driver = pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()
    if int(cuda.split(".")[0]) > newest // 1000:
        raise UserError(
            f"torch is built with CUDA {cuda}, but driver {driver} supports only CUDA up to "
            f"{newest / 1000:.1f}; install a newer driver, or torch for CUDA {newest // 1000}"
        )


def _assess_libraries(results: ProbeResults) -> Iterable[Finding]:
    first = results.first
    text = f"torch {first['torch']}, CUDA {first['cuda']}, NCCL {first['nccl']}"
    return compare(results, text, "install the same wheels on every node (constraints.txt)")


def _probe_quantisation(context: RankContext) -> dict[str, Any]:
    """Quantisation error of a random matrix on each device of this rank.

    The list is empty without `load_in_4bit`.
    """
    settings = context.known_settings
    if not settings.load_in_4bit:
        return {"errors": [], "data_type": settings.bnb_4bit_quant_type}
    from pipeline.model.base import quantisation_error

    errors = [quantisation_error(settings, device) for device in devices_of(context)]
    return {"errors": errors, "data_type": settings.bnb_4bit_quant_type}


def _assess_quantisation(results: ProbeResults) -> Iterable[Finding]:
    """Compare the errors with the known error of correct kernels."""
    if not results.first["errors"]:
        return
    data_type = results.first["data_type"]
    expected = _QUANTISATION_ERRORS[data_type]
    tolerance = _RELATIVE_TOLERANCE * expected
    wrong_errors = {
        rank: result["errors"]
        for rank, result in results.by_rank.items()
        if not all(abs(error - expected) < tolerance for error in result["errors"])
    }
    if wrong_errors:
        errors = ", ".join(f"{error:.3g}" for error in chain.from_iterable(wrong_errors.values()))
        yield fail(
            f"{results.name_ranks(wrong_errors)}: numbers quantised to {data_type} and dequantised "
            f"differ by {errors} standard deviations, expected {expected:.3g}",
            "install bitsandbytes for this CUDA (python -m bitsandbytes shows what it detects)",
            wrong_errors,
        )
    else:
        error = results.first["errors"][0]
        yield ok(f"{data_type}: quantisation error {error:.3g} standard deviations, as expected")


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
