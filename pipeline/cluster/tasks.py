"""Task: rank and world size of a process that srun or mpirun started, from their variables.

These two launchers do not set the variables that torch and DeepSpeed read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UserError

# Names of the variables for rank, size, local rank and local size, of Open MPI, Hydra (MPICH, Intel
# MPI) and Cray's mpiexec.
_MPI = (
    (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)  # fmt: skip
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
# First of the step ids that Slurm reserves for batch scripts and interactive shells (slurm.h).
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Range of rendezvous ports: above the ports of most services, below the node ports of Kubernetes
# (from 30000) and the ephemeral ports (from 32768).
_FIRST_PORT, _NUM_PORTS = 15000, 15000
_PORT_OFFSET = 31  # offset between the ports of consecutive steps of a job


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rank and size of this task. `source`: variable and value that gave the size."""

    launcher: Literal["srun", "mpirun"]
    source: str
    rank: int
    size: int
    local_rank: int
    local_size: int


def task_of(env: Mapping[str, str]) -> Task | None:
    """The task of this process; None if neither srun nor mpirun started it.

    In a Slurm job mpirun may start one helper per node with srun. Its ranks then have the variables
    of both launchers; the variables of mpirun are used.
    """
    step = _slurm_task(env)
    task = _mpi_task(env if step is None else _without_pmi_of(step, env))
    if step is None or task is None:
        return step or task
    if step.local_size > 1:
        raise UserError(
            f"environment: two launchers at once: srun started {step.size} tasks ({step.source}), "
            f"{step.local_size} of them on this node, and mpirun started {task.size} "
            f"({task.source}); use one of them"
        )
    return task


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `n01` for `n[01-03,07]`, `a1b3` for `a[1-2]b3`.

    It is the first line that `scontrol show hostnames` would print.
    """
    first = re.split(r",(?![^\[]*\])", nodes.strip())[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def port_of(job: int, step: int) -> int:
    """The rendezvous port of a step of a Slurm job, which all of its tasks compute."""
    return _FIRST_PORT + (job + _PORT_OFFSET * step) % _NUM_PORTS


def ports_after(port: int, count: int) -> list[int]:
    """`port` and further ports to try if it is in use, far from the ports of the next jobs."""
    return [_FIRST_PORT + (port - _FIRST_PORT + 1871 * i) % _NUM_PORTS for i in range(count)]


def whole_number(env: Mapping[str, str], name: str) -> int:
    """Value of a variable that is set. Raises UserError if it is not a whole number."""
    if not re.fullmatch("[0-9]{1,10}", env[name]):
        raise UserError(f"environment: {name}={env[name]!r} is not a whole number")
    return int(env[name])


def _slurm_task(env: Mapping[str, str]) -> Task | None:
    step = env.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= _FIRST_SPECIAL_STEP:
        return None
    if (components := env.get("SLURM_HET_SIZE", "1")) not in ("", "1"):
        raise UserError(
            f"environment: SLURM_HET_SIZE={components}: this is a heterogeneous job, in which each "
            "component numbers its tasks from 0; submit a job of equal nodes"
        )
    _require_variables(env, _SLURM)
    rank, size, local_rank = (whole_number(env, name) for name in _SLURM[:3])
    per_node = _tasks_per_node(env[_SLURM[3]])
    if sum(per_node) != size:
        raise UserError(
            f"environment: {_SLURM[1]}={size}, but the sum of {_SLURM[3]}={env[_SLURM[3]]} is "
            f"{sum(per_node)}"
        )
    if len(set(per_node)) > 1:
        raise UserError(
            f"environment: {_SLURM[3]}={env[_SLURM[3]]}: every node must start the same number "
            "of ranks; set srun's option --ntasks-per-node"
        )
    return Task(
        launcher="srun", source=f"{_SLURM[1]}={size}", rank=rank, size=size,
        local_rank=local_rank, local_size=per_node[0],
    )  # fmt: skip


def _without_pmi_of(step: Task, env: Mapping[str, str]) -> Mapping[str, str]:
    """The environment without the PMI variables that srun itself sets (--mpi=pmi2)."""
    if (env.get("PMI_RANK"), env.get("PMI_SIZE")) != (str(step.rank), str(step.size)):
        return env
    return {name: value for name, value in env.items() if name not in ("PMI_RANK", "PMI_SIZE")}


def _tasks_per_node(text: str) -> list[int]:
    """Parse Slurm's numbers of tasks per node: `4(x2),3` is [4, 4, 3]."""
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            raise UserError(f"environment: {_SLURM[3]}={text!r} is not a number of tasks per node")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _mpi_task(env: Mapping[str, str]) -> Task | None:
    present = [names for names in _MPI if names[0] in env or names[1] in env]
    if not present:
        return None
    names = max(present, key=lambda names: sum(name in env for name in names))
    _require_variables(env, names)
    rank, size, local_rank, local_size = (whole_number(env, name) for name in names)
    others = {whole_number(env, other[1]) for other in present if other[1] in env} - {size}
    if others:
        raise UserError(
            f"environment: two launchers at once: {names[1]}={size}, but another size variable is "
            f"{others.pop()}; start the ranks with one mpirun"
        )
    return Task(
        launcher="mpirun", source=f"{names[1]}={size}", rank=rank, size=size,
        local_rank=local_rank, local_size=local_size,
    )  # fmt: skip


def _require_variables(env: Mapping[str, str], names: tuple[str, ...]) -> None:
    if missing := [name for name in names if name not in env]:
        present = [name for name in names if name in env] or ["SLURM_STEP_ID"]
        raise UserError(
            f"environment: {', '.join(present)} set, but not {', '.join(missing)}, so the "
            "placement of this rank is not known; pass all of these variables to the task"
        )
