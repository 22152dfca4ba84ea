"""Header comments of launch/runs/*.yaml: the machine of each run file, and its predicted cost."""

import re
from pathlib import Path

from pipeline.config.load import load_settings
from pipeline.plan.given.catalogue import cpu_of, gpu_named
from pipeline.plan.given.hardware import GIB
from pipeline.plan.given.published import published_shape
from pipeline.plan.plan import Plan, make_plan

_MACHINE = re.compile(
    r"^#   Machine    (\d+) x (\d+) x (\S+)$", re.MULTILINE
)  # nodes x ranks x GPU
_PREDICTED = re.compile(r"^#   Predicted  .*$", re.MULTILINE)
_CPU_CORES, _CPU_MEMORY_GIB = 2, 16
_TOKENS = 10_000_000
_FOLDER = Path(__file__).parents[1] / "launch/runs"


def planned_run_files() -> list[Path]:
    """The run files that name a machine; quickstart.yaml trains a model made in this checkout."""
    return sorted(path for path in _FOLDER.glob("*.yaml") if path.stem != "quickstart")


def plan_of(path: Path) -> Plan:
    """The plan of a run file on the machine in its header."""
    machine = _MACHINE.search(path.read_text(encoding="utf-8"))
    assert machine is not None, f"{path}: no machine in its header"
    nodes, ranks, name = int(machine[1]), int(machine[2]), machine[3]
    is_cpu = name == "cpu"
    hardware = cpu_of(_CPU_CORES, _CPU_MEMORY_GIB * GIB) if is_cpu else gpu_named(name)
    settings = load_settings(path)
    shape = published_shape(settings.model)
    return make_plan(settings, shape, hardware, nodes=nodes, ranks_per_node=ranks)


def with_prediction(path: Path) -> str:
    """The text of a run file with the memory and time of its plan in the header."""
    plan = plan_of(path)
    peak, limit = plan.memory.peak_bytes, plan.hardware.usable_bytes(plan.layout.ranks_per_node)
    speed, layout = plan.speed, plan.layout
    line = (
        f"#   Predicted  ZeRO-{layout.zero_stage}, {peak / GIB:.1f} of {limit / GIB:.1f} GiB "
        f"per rank, {speed.seconds_per_step:.2g} s per step; {_TOKENS // 10**6} million tokens: "
        f"{_time(_TOKENS / speed.tokens_per_second)}"
    )
    return _PREDICTED.sub(line, path.read_text(encoding="utf-8"), count=1)


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 2 * 3600 else f"{seconds / 60:.0f} min"
