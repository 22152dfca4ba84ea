"""Which rank of how many this process is, from the environment alone. Pure, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.cluster.tasks import Tasks, first_host, port_of, tasks_of, whole_number
from pipeline.errors import UserError

# What DeepSpeed's launcher and torchrun both set for every rank; some of them without the others
# is what makes DeepSpeed fall back to MPI discovery (DeepSpeed 0.19.8, comm/comm.py:844).
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_OF_THE_FIRST = ("MASTER_ADDR", "MASTER_PORT")

Launcher = Literal["one process", "deepspeed", "torchrun", "srun", "mpirun"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """This process among all processes of the run.

    Under mpirun the address and port are empty until the rendezvous (session.py). A non-empty
    `rendezvous_id` means that `master_port` was derived, not reserved: rank 0 may have to take
    another port, and the ranks recognise it by this id.
    """

    launcher: Launcher = "one process"
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    rendezvous_id: str = ""

    @property
    def nodes(self) -> int:
        """Machines of the run; every one starts the same number of ranks."""
        return self.world_size // self.local_size

    def variables(self) -> dict[str, str]:
        """What DeepSpeed reads; complete, so that its MPI discovery never runs unasked."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_SIZE": str(self.local_size),
            "CROSS_RANK": str(self.rank // self.local_size),
            "CROSS_SIZE": str(self.nodes),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def from_environment(env: Mapping[str, str], *, may_be_alone: bool = False) -> Placement:
    """Placement as DeepSpeed's launcher, torchrun, srun or mpirun set it, or one process.

    `may_be_alone`: one process in a job of several nodes or tasks is what the user wants.
    Raises UserError where the environment contradicts itself, rather than training N times alone.
    """
    tasks = tasks_of(env)
    if any(name in env for name in _OF_A_RANK):
        placement = _as_set(env)
        _require_one_launcher(placement, tasks)
    elif tasks is None or tasks.size == 1:
        placement = Placement()
    else:
        placement = _of_tasks(env, tasks)
    if not (may_be_alone and placement.world_size == 1):
        _require_company(env, placement, tasks)
    _require_order(placement)
    _require_devices(env, placement)
    return placement


def _as_set(env: Mapping[str, str]) -> Placement:
    names = (*_OF_A_RANK, *_OF_THE_FIRST)
    if missing := [name for name in names if name not in env]:
        there = [name for name in names if name in env]
        raise UserError(
            f"environment: {', '.join(there)} set but not {', '.join(missing)}; start with "
            "`deepspeed launch/train.py RUN.yaml`, or unset them all for one process"
        )
    is_torchrun = "TORCHELASTIC_RUN_ID" in env
    # LOCAL_SIZE is also what a user sets to tell DeepSpeed how many ranks a CPU is to have.
    sizes = ["LOCAL_WORLD_SIZE", "WORLD_SIZE"]
    if not is_torchrun:
        sizes.insert(0, "LOCAL_SIZE")
    return Placement(
        launcher="torchrun" if is_torchrun else "deepspeed",
        rank=whole_number(env, "RANK"),
        local_rank=whole_number(env, "LOCAL_RANK"),
        world_size=whole_number(env, "WORLD_SIZE"),
        local_size=whole_number(env, next(name for name in sizes if name in env)),
        master_addr=env["MASTER_ADDR"],
        master_port=whole_number(env, "MASTER_PORT"),
    )


def _of_tasks(env: Mapping[str, str], tasks: Tasks) -> Placement:
    """The ranks are the tasks themselves. MASTER_ADDR and MASTER_PORT of the user's are kept."""
    address, port, rendezvous_id = env.get("MASTER_ADDR", ""), 0, ""
    if tasks.launcher == "srun":
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        address = address or first_host(nodes)
        if not address:
            raise UserError("environment: a step of Slurm without SLURM_JOB_NODELIST; pass it on")
        job, step = whole_number(env, "SLURM_JOB_ID"), whole_number(env, "SLURM_STEP_ID")
        port = port_of(job, step)
        rendezvous_id = f"Slurm step {job}.{step}, start {env.get('SLURM_RESTART_COUNT', '0')}"
    if "MASTER_PORT" in env:
        port, rendezvous_id = whole_number(env, "MASTER_PORT"), ""
    return Placement(
        launcher=tasks.launcher,
        rank=tasks.rank,
        local_rank=tasks.local_rank,
        world_size=tasks.size,
        local_size=tasks.local_size,
        master_addr=address,
        master_port=port,
        rendezvous_id=rendezvous_id,
    )


def _require_one_launcher(placement: Placement, tasks: Tasks | None) -> None:
    """Inside srun or mpirun: one torchrun or deepspeed a node, or a script that numbers alike."""
    if tasks is None or tasks.size == 1:
        return
    here = (tasks.rank, tasks.size, tasks.local_rank, tasks.local_size)
    is_same = here == (
        placement.rank, placement.world_size, placement.local_rank, placement.local_size
    )  # fmt: skip
    is_one_a_node = here == (placement.rank // placement.local_size, placement.nodes, 0, 1)
    if not is_same and not is_one_a_node:
        raise UserError(
            f"environment: two launchers at once: RANK={placement.rank} "
            f"WORLD_SIZE={placement.world_size} with {placement.local_size} ranks on this machine, "
            f"in task {tasks.rank} of {tasks.size_name} with {tasks.local_size} on this machine; "
            f"let {tasks.launcher} start every rank (`{tasks.launcher} ... python "
            "launch/train.py RUN.yaml`), or one torchrun or deepspeed a node for all nodes"
        )


def _require_company(env: Mapping[str, str], placement: Placement, tasks: Tasks | None) -> None:
    """A job of many tasks or nodes of which a process started beside them would use one."""
    number = env.get("SLURM_NTASKS", "1")
    nodes = env.get("SLURM_JOB_NUM_NODES", env.get("SLURM_NNODES", ""))
    if tasks is None and nodes.isdigit() and placement.nodes < int(nodes):
        raise UserError(
            f"environment: a Slurm job of {nodes} nodes but ranks on {placement.nodes}, started "
            "without srun: the others would idle; use `sbatch slurm/train.sbatch RUN.yaml`, `srun "
            "python launch/train.py RUN.yaml`, `deepspeed` with a hostfile, or `srun --nodes=1 "
            "--ntasks=1` for one process"
        )
    if placement.world_size == 1 and tasks is None and number not in ("", "1"):
        raise UserError(
            f"environment: SLURM_NTASKS={number} but one rank, started without srun: the job's "
            "other tasks would idle or train the same alone; use `srun python launch/train.py "
            "RUN.yaml`, one `torchrun` or `deepspeed` a node, or `srun --ntasks=1` for one process"
        )


def _require_order(placement: Placement) -> None:
    """Ranks below their sizes, as many on every machine, machine after machine."""
    rank, world = placement.rank, placement.world_size
    local_rank, local_size = placement.local_rank, placement.local_size
    if not 0 <= rank < world or not 0 <= local_rank < local_size:
        raise UserError(
            f"environment: RANK={rank} of WORLD_SIZE={world}, LOCAL_RANK={local_rank} of "
            f"{local_size} on this machine: a rank must be below its size"
        )
    if world % local_size:
        raise UserError(
            f"environment: WORLD_SIZE={world} is not a multiple of the {local_size} ranks on this "
            "machine; every machine must start the same number of ranks"
        )
    if rank % local_size != local_rank:
        raise UserError(
            f"environment: rank {rank} is number {local_rank} of {local_size} on its machine: "
            "ranks must fill one machine after the other (`srun --distribution=block`, "
            "`mpirun --map-by slot`)"
        )


def _require_devices(env: Mapping[str, str], placement: Placement) -> None:
    """A GPU for each rank of this machine, as far as the environment can tell.

    srun and mpirun may show each task one GPU of its own; then Slurm has granted as many, and
    under mpirun only asking the devices can tell (preflight).
    """
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or visible.startswith("-") or env.get("DS_ACCELERATOR") == "cpu":
        return  # nothing is said, or that CPUs do it
    entries, ranks = len(visible.split(",")), placement.local_size
    granted = env.get("SLURM_GPUS_ON_NODE", "")
    is_own = entries == 1 and (
        placement.launcher == "mpirun"
        or (placement.launcher == "srun" and granted.isdigit() and int(granted) >= ranks)
    )
    if entries < ranks and not is_own:
        slurm = f", SLURM_GPUS_ON_NODE={granted}" if granted else ""
        raise UserError(
            f"environment: {ranks} ranks on this machine and "
            f"CUDA_VISIBLE_DEVICES={visible}{slurm}: each needs a GPU of its own; start one rank a "
            "GPU, or set DS_ACCELERATOR=cpu"
        )
