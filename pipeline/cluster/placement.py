"""Placement: rank and world size of this process, from the variables of its launcher."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.cluster.tasks import Task, detect_task, first_host, rendezvous_port, whole_number
from pipeline.commands import command, script
from pipeline.errors import UserError

# DeepSpeed's launcher and torchrun set all of these variables for every rank. If some are missing,
# DeepSpeed asks MPI for the rank (DeepSpeed 0.19.8, comm/comm.py:844).
_RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_MASTER_NAMES = ("MASTER_ADDR", "MASTER_PORT")
# Variables with the number of ranks on this node, in order of precedence.
_LOCAL_SIZES = ["LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE"]
# Variables that `accelerate launch` sets for its own configuration (accelerate 1.15.0,
# utils/launch.py).
_ACCELERATE_NAMES = (
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)  # fmt: skip

Launcher = Literal["one process", "deepspeed", "torchrun", "srun", "mpirun", "pods"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Rank, world size and rendezvous address of this process.

    `local_rank` and `local_size`: rank among, and number of, the ranks on this node. `master_addr`
    and `master_port`: rendezvous address on rank 0's node; empty and 0 under mpirun until rank 0
    has broadcast it (rendezvous.py). `rendezvous_id`: set if the port was computed from the number
    of the Slurm job. Such a port may be in use. Rank 0 then uses another one, and the other ranks
    recognise rank 0 by this id (rendezvous.py).
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
        """Number of nodes; every node has the same number of ranks."""
        return self.world_size // self.local_size

    def variables(self) -> dict[str, str]:
        """All environment variables from which DeepSpeed learns rank and address.

        If all are set, DeepSpeed does not ask MPI.
        """
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


def from_environment(env: Mapping[str, str], *, allow_single_process: bool = False) -> Placement:
    """The placement from the variables of a launcher; without a launcher, a single process.

    `allow_single_process`: whether a single process is allowed in a job of several nodes or tasks.
    Raises UserError if variables contradict each other, or if each process would train alone.
    """
    _refuse_accelerate_options(env)
    task = detect_task(env)
    has_rank_variables = any(name in env for name in _RANK_NAMES)
    if has_rank_variables and (task is None or not _agrees(env, task)):
        placement = _from_rank_variables(env)
        _require_one_launcher(placement, task)
    elif task is None or task.size == 1:
        placement = Placement()
    else:
        placement = _from_task(env, task)
    if not (allow_single_process and placement.world_size == 1):
        _require_all_started(env, placement, task)
    _require_order(placement)
    _require_devices(env, placement)
    return placement


def device_index(placement: Placement, num_visible: int) -> int:
    """Index of this rank's GPU among the visible GPUs. Raises UserError if there are too few.

    A scheduler may make only one GPU visible to each process, which then has index 0.
    """
    index = 0 if num_visible == 1 and placement.local_size > 1 else placement.local_rank
    if index >= num_visible:
        raise UserError(
            f"{placement.local_size} ranks were started on this node, but only {num_visible} GPUs "
            "are visible; start one rank per GPU"
        )
    return index


def _agrees(env: Mapping[str, str], task: Task) -> bool:
    """Whether RANK and similar variables only repeat the numbers of a task of srun or mpirun.

    Container hooks and user scripts set such variables. torchrun and DeepSpeed inside a task are a
    second launcher, whose variables are used even if each task has one rank.
    """
    if "TORCHELASTIC_RUN_ID" in env or "CROSS_RANK" in env:  # set by torchrun and by DeepSpeed
        return False
    expected = {
        "RANK": task.rank, "WORLD_SIZE": task.size, "LOCAL_RANK": task.local_rank,
        "LOCAL_SIZE": task.local_size, "LOCAL_WORLD_SIZE": task.local_size,
    }  # fmt: skip
    return all(env.get(name, str(value)) == str(value) for name, value in expected.items())


def _from_rank_variables(env: Mapping[str, str]) -> Placement:
    """The placement from RANK, WORLD_SIZE and so on, which DeepSpeed, torchrun or a pod has set."""
    launcher: Launcher = "deepspeed"
    if "TORCHELASTIC_RUN_ID" in env:
        launcher = "torchrun"
    elif _is_pod(env):
        launcher = "pods"
        env = {**env, "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    names = (*_RANK_NAMES, *_MASTER_NAMES)
    if missing := [name for name in names if name not in env]:
        present = [name for name in names if name in env]
        raise UserError(
            f"environment: {', '.join(present)} set, but not {', '.join(missing)}; start with "
            f"`deepspeed {script('train')} RUN.yaml`, or unset all of them to start a single "
            "process"
        )
    local_sizes = _LOCAL_SIZES
    if launcher == "torchrun":  # does not set LOCAL_SIZE, which users set for DeepSpeed on CPUs
        local_sizes = ["LOCAL_WORLD_SIZE", "WORLD_SIZE"]
    return Placement(
        launcher=launcher,
        rank=whole_number(env, "RANK"),
        local_rank=whole_number(env, "LOCAL_RANK"),
        world_size=whole_number(env, "WORLD_SIZE"),
        local_size=whole_number(env, next(name for name in local_sizes if name in env)),
        master_addr=env["MASTER_ADDR"],
        master_port=_master_port(env),
    )


def _is_pod(env: Mapping[str, str]) -> bool:
    """Whether RANK and WORLD_SIZE count the pods of a Kubernetes PyTorchJob, with one rank each.

    The PyTorchJob operator sets no LOCAL_RANK (kubeflow/training-operator,
    pkg/controller.v1/pytorch/envvar.go at 5fa872f). It also sets PET_* variables, which are meant
    for torchrun.
    """
    has_torchrun_options = any(name.startswith("PET_") for name in env)
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in env or has_torchrun_options
    return in_kubernetes and "LOCAL_RANK" not in env and {"RANK", "WORLD_SIZE"} <= env.keys()


def _from_task(env: Mapping[str, str], task: Task) -> Placement:
    """The placement of a rank that is a task of srun or mpirun.

    MASTER_ADDR and MASTER_PORT are used if they are set.
    """
    address, port, rendezvous_id = env.get("MASTER_ADDR", ""), 0, ""
    if task.launcher == "srun":
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        address = address or first_host(nodes)
        if not address:
            raise UserError(
                "environment: SLURM_JOB_NODELIST is not set in this Slurm step; pass it to the task"
            )
        job, step = whole_number(env, "SLURM_JOB_ID"), whole_number(env, "SLURM_STEP_ID")
        port = rendezvous_port(job, step)
        rendezvous_id = f"Slurm step {job}.{step}, start {env.get('SLURM_RESTART_COUNT', '0')}"
    if "MASTER_PORT" in env:
        port, rendezvous_id = _master_port(env), ""
    return Placement(
        launcher=task.launcher,
        rank=task.rank,
        local_rank=task.local_rank,
        world_size=task.size,
        local_size=task.local_size,
        master_addr=address,
        master_port=port,
        rendezvous_id=rendezvous_id,
    )


def _master_port(env: Mapping[str, str]) -> int:
    port = whole_number(env, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise UserError(f"environment: MASTER_PORT={port}: a port is a number from 1 to 65535")
    return port


def _refuse_accelerate_options(env: Mapping[str, str]) -> None:
    """Raise UserError for options of `accelerate launch` that would have no effect."""
    options = [name for name in _ACCELERATE_NAMES if env.get(name, "").lower() == "true"]
    if options:
        raise UserError(
            f"environment: {options[0]}=true: accelerate's own DeepSpeed, FSDP or parallelism "
            "configuration is not read; set zero_stage and precision in the run file, and start "
            f"with `accelerate launch --multi_gpu --num_processes N {script('train')} RUN.yaml`"
        )
    is_cpu = env.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if is_cpu and env.get("DS_ACCELERATOR") != "cpu":
        raise UserError(
            "environment: ACCELERATE_USE_CPU=True (`accelerate launch --cpu`) is not read; set "
            "DS_ACCELERATOR=cpu to train on the CPU"
        )
    # In this case accelerate 1.15.0 starts one process and expects the script to start the others.
    if "ACCELERATE_USE_CPU" in env and "MASTER_ADDR" in env and "RANK" not in env:
        raise UserError(
            f"environment: MASTER_ADDR={env['MASTER_ADDR']} but no RANK: `accelerate launch` was "
            "to start several processes and has started one; add --multi_gpu, or on a CPU use "
            f"`torchrun --nproc-per-node N {script('train')} RUN.yaml`"
        )


def _require_one_launcher(placement: Placement, task: Task | None) -> None:
    """Raise UserError if torchrun or deepspeed runs inside srun or mpirun with other numbers.

    Two cases are allowed: one torchrun or deepspeed per node, and equal numbers in the variables of
    both launchers.
    """
    if task is None or task.size == 1:
        return
    task_numbers = (task.rank, task.size, task.local_rank, task.local_size)
    numbers = (placement.rank, placement.world_size, placement.local_rank, placement.local_size)
    node = placement.rank // placement.local_size
    is_one_per_node = task_numbers == (node, placement.nodes, 0, 1)
    if task_numbers != numbers and not is_one_per_node:
        raise UserError(
            f"environment: two launchers at once: RANK={placement.rank} "
            f"WORLD_SIZE={placement.world_size} LOCAL_RANK={placement.local_rank} with "
            f"{placement.local_size} ranks on this node, in task {task.rank} of {task.source} "
            f"with local rank {task.local_rank} of {task.local_size} on this node; "
            f"let {task.launcher} start every rank (`{task.launcher} ... "
            f"{command('train')} RUN.yaml`), or one torchrun or deepspeed per node for all nodes"
        )


def _require_all_started(env: Mapping[str, str], placement: Placement, task: Task | None) -> None:
    """Raise UserError if other tasks, nodes or pods of this job would be idle."""
    if task is not None:
        return
    # A Kubernetes PyTorchJob sets these variables for torchrun; PET_NNODES may be "min:max".
    processes = env.get("PET_NPROC_PER_NODE", "")
    pods = env.get("PET_NNODES", "").rpartition(":")[2]
    expects_processes = processes not in ("", "1", "auto", "gpu", "cpu")
    lacks_processes = expects_processes and placement.local_size == 1
    lacks_pods = pods not in ("", "1") and placement.world_size == 1
    if "TORCHELASTIC_RUN_ID" not in env and (lacks_processes or lacks_pods):
        raise UserError(
            f"environment: PET_NNODES={pods or 1} PET_NPROC_PER_NODE={processes or 1} are meant "
            "for torchrun, but the pod started python; set the pod's command to `torchrun "
            f"{script('train')} RUN.yaml`"
        )
    nodes = env.get("SLURM_JOB_NUM_NODES", env.get("SLURM_NNODES", ""))
    if nodes.isdigit() and placement.nodes < int(nodes):
        raise UserError(
            f"environment: this Slurm job has {nodes} nodes, but ranks were started on "
            f"{placement.nodes}, without srun, so the other nodes would be idle; use `sbatch "
            f"slurm/train.sbatch RUN.yaml`, `srun {command('train')} RUN.yaml`, `deepspeed` "
            "with a hostfile, or `srun --nodes=1 --ntasks=1` for one process"
        )
    num_tasks = env.get("SLURM_NTASKS", "1")
    if placement.world_size == 1 and num_tasks not in ("", "1"):
        raise UserError(
            f"environment: SLURM_NTASKS={num_tasks}, but one rank was started without srun, so the "
            "other tasks of the job would be idle or train the same model; use `srun "
            f"{command('train')} RUN.yaml`, one `torchrun` or `deepspeed` per node, or `srun "
            "--ntasks=1` for one process"
        )


def _require_order(placement: Placement) -> None:
    """Raise UserError unless each node has equally many ranks, numbered node by node."""
    rank, world = placement.rank, placement.world_size
    local_rank, local_size = placement.local_rank, placement.local_size
    if not 0 <= rank < world or not 0 <= local_rank < local_size:
        raise UserError(
            f"environment: RANK={rank} of WORLD_SIZE={world}, LOCAL_RANK={local_rank} of "
            f"{local_size} on this node: a rank must be below the number of ranks"
        )
    if world % local_size:
        raise UserError(
            f"environment: WORLD_SIZE={world} is not a multiple of the {local_size} ranks on this "
            "node; every node must start the same number of ranks"
        )
    if rank % local_size != local_rank:
        raise UserError(
            f"environment: rank {rank} has local rank {local_rank} of {local_size} on its node, "
            "but ranks must be numbered node by node (`srun --distribution=block`, `mpirun "
            "--map-by slot`)"
        )


def _require_devices(env: Mapping[str, str], placement: Placement) -> None:
    """Raise UserError if CUDA_VISIBLE_DEVICES has fewer GPUs than there are ranks on this node.

    srun and mpirun may make a single, different GPU visible to each task. Under srun this is
    accepted if Slurm allocated enough GPUs on the node. Under mpirun it is always accepted; the
    preflight check `gpus` compares the GPUs of the ranks.
    """
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or visible.startswith("-") or env.get("DS_ACCELERATOR") == "cpu":
        return  # no restriction, or CPU ranks
    num_visible, num_ranks = len(visible.split(",")), placement.local_size
    allocated = env.get("SLURM_GPUS_ON_NODE", "")
    may_differ_by_rank = placement.launcher == "mpirun"
    if placement.launcher == "srun" and allocated.isdigit():
        may_differ_by_rank = int(allocated) >= num_ranks
    if num_visible < num_ranks and not (num_visible == 1 and may_differ_by_rank):
        slurm = f", SLURM_GPUS_ON_NODE={allocated}" if allocated else ""
        raise UserError(
            f"environment: {num_ranks} ranks on this node, but "
            f"CUDA_VISIBLE_DEVICES={visible}{slurm}: each rank needs its own GPU; start one rank "
            "per GPU, or set DS_ACCELERATOR=cpu"
        )
