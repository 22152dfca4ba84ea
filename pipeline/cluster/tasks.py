"""Tasks: rank and size of a process started by srun or mpirun, from their variables. Pure.

Neither launcher sets the variables that torch and DeepSpeed read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UserError

# Rank, size, local rank and local size: Open MPI and Hydra (MPICH, Intel MPI) as documented, and
# PMI as Cray's mpiexec sets it.
_MPI = (
    (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)  # fmt: skip
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
# Slurm reserves the step ids from here on: batch script, interactive shell (slurm.h).
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Above the ports of most services, below the ephemeral ports (from 32768) and the node ports of
# Kubernetes (from 30000).
_FIRST_PORT, _NUM_PORTS = 15000, 15000
_PORTS_PER_JOB = 31  # the first steps of a job, and of the next job, have different ports


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Rank and size of this task. `source`: the variable from which the size was read."""

    launcher: Literal["srun", "mpirun"]
    source: str
    rank: int
    size: int
    local_rank: int
    local_size: int


def tasks_of(env: Mapping[str, str]) -> Tasks | None:
    """The task of this process; None if neither srun nor mpirun started it.

    Inside a Slurm job mpirun starts its helpers with srun, one per node. Its ranks then have the
    variables of both launchers, and those of mpirun are used.
    """
    step = _slurm_task(env)
    task = _mpi_task(env if step is None else _without_pmi_of(step, env))
    if step is None or task is None:
        return step or task
    if step.local_size > 1:
        raise UserError(
            f"environment: two launchers at once: srun started {step.size} tasks "
            f"({step.source}), {step.local_size} of them on this node, and mpirun "
            f"{task.size} ({task.source}); use one of them"
        )
    return task


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: n01 of n[01-03,07] or of n01,m[1-2], a1b3 of a[1-2]b3.

    `scontrol show hostnames` prints it first; this needs no Slurm.
    """
    first = re.split(r",(?![^\[]*\])", nodes.strip())[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def port_of(job: int, step: int) -> int:
    """The rendezvous port of a job's step, the same on all of its tasks."""
    return _FIRST_PORT + (job + _PORTS_PER_JOB * step) % _NUM_PORTS


def ports_after(port: int, count: int) -> list[int]:
    """`port`, then the ports to try if it is taken; far from the ports of the next jobs."""
    return [_FIRST_PORT + (port - _FIRST_PORT + 1871 * i) % _NUM_PORTS for i in range(count)]


def whole_number(env: Mapping[str, str], name: str) -> int:
    """Value of a variable, which must be set; UserError unless it is a whole number."""
    if not re.fullmatch("[0-9]{1,10}", env[name]):
        raise UserError(f"environment: {name}={env[name]!r} is not a whole number")
    return int(env[name])


def _slurm_task(env: Mapping[str, str]) -> Tasks | None:
    step = env.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= _FIRST_SPECIAL_STEP:
        return None
    if (components := env.get("SLURM_HET_SIZE", "1")) not in ("", "1"):
        raise UserError(
            f"environment: SLURM_HET_SIZE={components}: a heterogeneous job, whose components "
            "number their tasks apart; submit a job of equal nodes"
        )
    _require_all(env, _SLURM)
    rank, size, local_rank = (whole_number(env, name) for name in _SLURM[:3])
    per_node = _tasks_per_node(env[_SLURM[3]])
    if sum(per_node) != size:
        raise UserError(
            f"environment: {_SLURM[1]}={size} but {_SLURM[3]}={env[_SLURM[3]]} is {sum(per_node)}"
        )
    if len(set(per_node)) > 1:
        raise UserError(
            f"environment: {_SLURM[3]}={env[_SLURM[3]]}: every node must start the same number "
            "of ranks; give srun --ntasks-per-node"
        )
    return Tasks(
        launcher="srun", source=f"{_SLURM[1]}={size}", rank=rank, size=size,
        local_rank=local_rank, local_size=per_node[0],
    )  # fmt: skip


def _without_pmi_of(step: Tasks, env: Mapping[str, str]) -> Mapping[str, str]:
    """The environment without srun's own PMI variables (--mpi=pmi2)."""
    if (env.get("PMI_RANK"), env.get("PMI_SIZE")) != (str(step.rank), str(step.size)):
        return env
    return {name: value for name, value in env.items() if name not in ("PMI_RANK", "PMI_SIZE")}


def _tasks_per_node(text: str) -> list[int]:
    """Parse Slurm's task counts: 4(x2),3 is [4, 4, 3]."""
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            raise UserError(f"environment: {_SLURM[3]}={text!r} is not a number of tasks per node")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _mpi_task(env: Mapping[str, str]) -> Tasks | None:
    present = [names for names in _MPI if names[0] in env or names[1] in env]
    if not present:
        return None
    names = max(present, key=lambda names: sum(name in env for name in names))
    _require_all(env, names)
    rank, size, local_rank, local_size = (whole_number(env, name) for name in names)
    others = {whole_number(env, other[1]) for other in present if other[1] in env} - {size}
    if others:
        raise UserError(
            f"environment: two launchers at once: {names[1]}={size}, and another has "
            f"{others.pop()}; start the ranks with one mpirun"
        )
    return Tasks(
        launcher="mpirun", source=f"{names[1]}={size}", rank=rank, size=size,
        local_rank=local_rank, local_size=local_size,
    )  # fmt: skip


def _require_all(env: Mapping[str, str], names: tuple[str, ...]) -> None:
    if missing := [name for name in names if name not in env]:
        present = [name for name in names if name in env] or ["SLURM_STEP_ID"]
        raise UserError(
            f"environment: {', '.join(present)} set but not {', '.join(missing)}, so this rank's "
            "placement is not known; pass all of them on"
        )
