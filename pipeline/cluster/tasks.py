"""Task: rank and world size of a process that srun or mpirun started.

They are read from environment variables of these two launchers, which do not set the variables
that torch and DeepSpeed read (RANK, WORLD_SIZE and so on).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UserError

# Names of the variables for rank, size, local rank and local size: those of Open MPI, of Hydra
# (MPICH, Intel MPI) and of Cray's mpiexec.
_MPI_VARIABLES = (
    (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)  # fmt: skip
_SLURM_VARIABLES = (
    "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE",
)  # fmt: skip
# First of the step ids that Slurm reserves for batch scripts and interactive shells (slurm.h).
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Range of rendezvous ports: above the ports of most services, below the node ports of Kubernetes
# (from 30000) and the ephemeral ports (from 32768).
_FIRST_PORT, _NUM_PORTS = 15000, 15000
_STEP_OFFSET = 31  # distance between the ports of consecutive steps of a job
_RETRY_OFFSET = 1871  # distance between the ports to try, so that they are not those of next jobs


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rank and world size (`size`) of this process in srun or mpirun.

    `local_rank` and `local_size`: rank among, and number of, the tasks on this node. `source`: the
    variable that has the world size, with its value, for messages.
    """

    launcher: Literal["srun", "mpirun"]
    source: str
    rank: int
    size: int
    local_rank: int
    local_size: int


def detect_task(env: Mapping[str, str]) -> Task | None:
    """The task of this process; None if neither srun nor mpirun started it.

    In a Slurm job mpirun may start one helper per node with srun. The ranks of mpirun then have the
    variables of both launchers, and those of mpirun are used.
    """
    slurm_task = _slurm_task(env)
    mpi_task = _mpi_task(env if slurm_task is None else _without_pmi_of(slurm_task, env))
    if slurm_task is None or mpi_task is None:
        return slurm_task or mpi_task
    if slurm_task.local_size > 1:
        raise UserError(
            f"environment: two launchers at once: srun started {slurm_task.size} tasks "
            f"({slurm_task.source}), {slurm_task.local_size} of them on this node, and mpirun "
            f"started {mpi_task.size} ({mpi_task.source}); use one of them"
        )
    return mpi_task


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `n01` for `n[01-03,07]`, `a1b3` for `a[1-2]b3,c1`.

    It is the first line that `scontrol show hostnames` would print.
    """
    first = re.split(r",(?![^\[]*\])", nodes.strip())[0]  # split at commas outside brackets
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)  # brackets -> the first number in them


def rendezvous_port(job: int, step: int) -> int:
    """The rendezvous port of a step of a Slurm job, which all of its tasks compute."""
    return _FIRST_PORT + (job + _STEP_OFFSET * step) % _NUM_PORTS


def ports_after(port: int, count: int) -> list[int]:
    """`count` ports to try in this order: `port`, and others in case it is in use."""
    offsets = [port - _FIRST_PORT + _RETRY_OFFSET * i for i in range(count)]
    return [_FIRST_PORT + offset % _NUM_PORTS for offset in offsets]


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
    _require_variables(env, _SLURM_VARIABLES)
    size = whole_number(env, "SLURM_STEP_NUM_TASKS")
    tasks_per_node = env["SLURM_STEP_TASKS_PER_NODE"]
    per_node = _parse_tasks_per_node(tasks_per_node)
    if sum(per_node) != size:
        raise UserError(
            f"environment: SLURM_STEP_NUM_TASKS={size}, but the sum of "
            f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node} is {sum(per_node)}"
        )
    if len(set(per_node)) > 1:
        raise UserError(
            f"environment: SLURM_STEP_TASKS_PER_NODE={tasks_per_node}: every node must start the "
            "same number of ranks; set srun's option --ntasks-per-node"
        )
    return Task(
        launcher="srun",
        source=f"SLURM_STEP_NUM_TASKS={size}",
        rank=whole_number(env, "SLURM_PROCID"),
        size=size,
        local_rank=whole_number(env, "SLURM_LOCALID"),
        local_size=per_node[0],
    )


def _without_pmi_of(slurm_task: Task, env: Mapping[str, str]) -> Mapping[str, str]:
    """The environment without PMI_RANK and PMI_SIZE if srun has set them (--mpi=pmi2).

    They are then equal to the numbers of srun's task, and no mpirun is involved.
    """
    numbers = (str(slurm_task.rank), str(slurm_task.size))
    if (env.get("PMI_RANK"), env.get("PMI_SIZE")) != numbers:
        return env
    return {name: value for name, value in env.items() if name not in ("PMI_RANK", "PMI_SIZE")}


def _parse_tasks_per_node(text: str) -> list[int]:
    """Parse Slurm's numbers of tasks per node: `4(x2),3` is [4, 4, 3]."""
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            raise UserError(
                f"environment: SLURM_STEP_TASKS_PER_NODE={text!r} is not a number of tasks per node"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _mpi_task(env: Mapping[str, str]) -> Task | None:
    """The task of a process that mpirun started, from the set of names with the most variables."""
    present = [names for names in _MPI_VARIABLES if names[0] in env or names[1] in env]
    if not present:
        return None
    names = max(present, key=lambda names: sum(name in env for name in names))
    _require_variables(env, names)
    rank, size, local_rank, local_size = (whole_number(env, name) for name in names)
    size_name = names[1]
    for _, other_size_name, *_ in present:
        if other_size_name in env and whole_number(env, other_size_name) != size:
            raise UserError(
                f"environment: two launchers at once: {size_name}={size}, but "
                f"{other_size_name}={env[other_size_name]}; start the ranks with one mpirun"
            )
    return Task(
        launcher="mpirun", source=f"{size_name}={size}", rank=rank, size=size,
        local_rank=local_rank, local_size=local_size,
    )  # fmt: skip


def _require_variables(env: Mapping[str, str], names: tuple[str, ...]) -> None:
    """Raise UserError if some of a launcher's variables are not set."""
    if missing := [name for name in names if name not in env]:
        present = [name for name in names if name in env] or ["SLURM_STEP_ID"]
        raise UserError(
            f"environment: {', '.join(present)} set, but not {', '.join(missing)}, so the "
            "placement of this rank is not known; pass all of these variables to the task"
        )
