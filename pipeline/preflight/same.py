"""What must be the same on all ranks: packages, settings, plan, base and prepared data."""

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.requirements import Requirement

from pipeline import __version__
from pipeline.data.dataset.reader import INDEX, DataIndex
from pipeline.errors import UserError
from pipeline.model.fingerprint import sampled_fingerprint
from pipeline.preflight.check import Finding, ProbeResults, compare, flat, in_units
from pipeline.preflight.context import RankContext

_SAME_INSTALL = "install the same versions on every machine (constraints.txt)"
_SAME_RUN_FILE = "start every rank with the same run file and the same key=value overrides"
_SAME_MACHINES = (
    "use machines with the same devices and memory, or set what differs in the run file"
)
_SAME_MODEL = "copy the model folder anew to the machines named"
_SHARED = "put output_dir on a file system that every machine has"


def probe_versions(context: RankContext) -> dict[str, str]:
    """Python and the project's packages. Raises UserError for one that is too old or missing."""
    del context
    found = {"rankzero": __version__, "python": platform.python_version()}
    wrong = []
    try:
        needed = requires("rankzero") or []
    except PackageNotFoundError:
        raise UserError("packages: the project is not installed; run make install") from None
    for line in needed:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found[wanted.name] = version(wanted.name)
        except PackageNotFoundError:
            wrong.append(f"{wanted.name} is not installed")
            continue
        if not wanted.specifier.contains(found[wanted.name], prereleases=True):
            wrong.append(f"{wanted.name} {found[wanted.name]} is not {wanted.specifier}")
    if wrong:
        raise UserError(f"packages: {', '.join(wrong)}; install the project again (make install)")
    return found


def assess_versions(seen: ProbeResults) -> Iterable[Finding]:
    """All alike."""
    first = next(iter(seen.answers.values()))
    shown = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes")
    said = ", ".join(f"{name} {first[name]}" for name in shown)
    return compare(seen, f"Python {first['python']}, {said}", _SAME_INSTALL)


def probe_settings(context: RankContext) -> dict[str, str]:
    """All settings, as resolved."""
    return flat(context.known_settings.model_dump(mode="json"))


def assess_settings(seen: ProbeResults) -> Iterable[Finding]:
    """All alike."""
    return compare(seen, "valid, and the same on all ranks", _SAME_RUN_FILE)


def probe_plan(context: RankContext) -> dict[str, str]:
    """What was chosen and what DeepSpeed gets."""
    plan = context.known_plan
    return flat({"layout": vars(plan.layout), "deepspeed": dict(plan.deepspeed)})


def assess_plan(seen: ProbeResults) -> Iterable[Finding]:
    """All alike."""
    assert seen.plan is not None, "rank 0 has a plan, or the check was left out"
    plan, layout = seen.plan, seen.plan.layout
    need = in_units(plan.memory.device_need)
    limit = in_units(plan.hardware.usable_bytes(layout.ranks_per_node))
    said = (
        f"ZeRO-{layout.zero_stage}, {layout.training_dtype}, global batch "
        f"{layout.global_batch_size} on {layout.nodes} x {layout.ranks_per_node} x "
        f"{plan.hardware.name}: {need} of {limit} a rank"
    )
    return compare(seen, said, _SAME_MACHINES)


def probe_base(context: RankContext) -> dict[str, str]:
    """Fingerprint of the base, from samples of its files."""
    return {"base": sampled_fingerprint(context.model_folder)}


def assess_base(seen: ProbeResults) -> Iterable[Finding]:
    """All machines have the same base."""
    first = next(iter(seen.answers.values()))["base"]
    return compare(seen, f"{first[:16]}, the same on all machines", _SAME_MODEL)


def probe_data_key(context: RankContext) -> dict[str, str]:
    """Keys of the prepared data as this rank sees it; none where nothing has been prepared."""
    data = context.folder / "data"
    if not (data / INDEX).is_file():
        return {}
    return {name: split.key for name, split in DataIndex.load(data).splits.items()}


def assess_data_key(seen: ProbeResults) -> Iterable[Finding]:
    """All ranks see the same prepared data, or none."""
    keys: dict[str, Any] = seen.answers[0]
    said = ", ".join(f"{split} {key}" for split, key in keys.items())
    none = "not prepared yet; rank 0 does it at the start, launch/prepare.py before"
    return compare(seen, said or none, _SHARED)
