"""Placement: rank and world size of this process, from the environment. Pure, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.cluster.tasks import Tasks, first_host, port_of, tasks_of, whole_number
from pipeline.errors import UserError

# DeepSpeed's launcher and torchrun set all of these for every rank. With some of them missing
# DeepSpeed falls back to MPI discovery (DeepSpeed 0.19.8, comm/comm.py:844).
_RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_MASTER_NAMES = ("MASTER_ADDR", "MASTER_PORT")
_LOCAL_SIZES = ["LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE"]
# What `accelerate launch` sets for its own configuration (accelerate 1.15.0, utils/launch.py).
_ACCELERATE_NAMES = (
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)  # fmt: skip

Launcher = Literal["one process", "deepspeed", "torchrun", "srun", "mpirun", "pods"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Rank, world size and rendezvous address of this process.

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
        """Number of nodes; every node has the same number of ranks."""
        return self.world_size // self.local_size

    def variables(self) -> dict[str, str]:
        """All environment variables that DeepSpeed reads, so that its MPI discovery never runs."""
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
    """The placement from a launcher's variables; without a launcher, a single process.

    `may_be_alone`: a single process is allowed in a job of several nodes or tasks. Raises UserError
    if variables contradict each other, or if each process would train alone.
    """
    _require_nothing_of_accelerate(env)
    tasks = tasks_of(env)
    is_numbered = any(name in env for name in _RANK_NAMES)
    if is_numbered and (tasks is None or not _agrees(env, tasks)):
        placement = _from_rank_variables(env)
        _require_one_launcher(placement, tasks)
    elif tasks is None or tasks.size == 1:
        placement = Placement()
    else:
        placement = _from_tasks(env, tasks)
    if not (may_be_alone and placement.world_size == 1):
        _require_all_started(env, placement, tasks)
    _require_order(placement)
    _require_devices(env, placement)
    return placement


def _agrees(env: Mapping[str, str], tasks: Tasks) -> bool:
    """Whether RANK and similar variables only repeat those of the task: a single launcher.

    Container hooks and user scripts set them in this way. torchrun and DeepSpeed inside a task are
    separate launchers, even with one rank per task.
    """
    if "TORCHELASTIC_RUN_ID" in env or "CROSS_RANK" in env:
        return False
    expected = {
        "RANK": tasks.rank, "WORLD_SIZE": tasks.size, "LOCAL_RANK": tasks.local_rank,
        "LOCAL_SIZE": tasks.local_size, "LOCAL_WORLD_SIZE": tasks.local_size,
    }  # fmt: skip
    return all(env.get(name, str(value)) == str(value) for name, value in expected.items())


def _from_rank_variables(env: Mapping[str, str]) -> Placement:
    is_torchrun, is_pod = "TORCHELASTIC_RUN_ID" in env, _is_pod(env)
    if is_pod:
        env = {**env, "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    names = (*_RANK_NAMES, *_MASTER_NAMES)
    if missing := [name for name in names if name not in env]:
        present = [name for name in names if name in env]
        raise UserError(
            f"environment: {', '.join(present)} set but not {', '.join(missing)}; start with "
            "`deepspeed launch/train.py RUN.yaml`, or unset them all for one process"
        )
    # Users also set LOCAL_SIZE, to tell DeepSpeed the number of ranks on a CPU machine.
    sizes = ["LOCAL_WORLD_SIZE", "WORLD_SIZE"] if is_torchrun else _LOCAL_SIZES
    return Placement(
        launcher="torchrun" if is_torchrun else "pods" if is_pod else "deepspeed",
        rank=whole_number(env, "RANK"),
        local_rank=whole_number(env, "LOCAL_RANK"),
        world_size=whole_number(env, "WORLD_SIZE"),
        local_size=whole_number(env, next(name for name in sizes if name in env)),
        master_addr=env["MASTER_ADDR"],
        master_port=_master_port(env),
    )


def _is_pod(env: Mapping[str, str]) -> bool:
    """Whether RANK and WORLD_SIZE number the pods of a Kubernetes PyTorchJob, one rank in each.

    Its operator sets no LOCAL_RANK (kubeflow/training-operator, pkg/controller.v1/pytorch/envvar.go
    at 5fa872f), and PET_* for torchrun, which the pod's command did not start.
    """
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in env or any(n.startswith("PET_") for n in env)
    return in_kubernetes and "LOCAL_RANK" not in env and {"RANK", "WORLD_SIZE"} <= env.keys()


def _from_tasks(env: Mapping[str, str], tasks: Tasks) -> Placement:
    """The placement of a task as a rank; MASTER_ADDR and MASTER_PORT are used if set."""
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
        port, rendezvous_id = _master_port(env), ""
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


def _master_port(env: Mapping[str, str]) -> int:
    port = whole_number(env, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise UserError(f"environment: MASTER_PORT={port}: a port is from 1 to 65535")
    return port


def _require_nothing_of_accelerate(env: Mapping[str, str]) -> None:
    """Refuse options of `accelerate launch` other than starting ranks: they have no effect."""
    asked = [name for name in _ACCELERATE_NAMES if env.get(name, "").lower() == "true"]
    if asked:
        raise UserError(
            f"environment: {asked[0]}=true: accelerate's own DeepSpeed, FSDP or parallelism "
            "configuration is not read; set zero_stage and precision in the run file, and start "
            "with `accelerate launch --multi_gpu --num_processes N launch/train.py RUN.yaml`"
        )
    is_cpu = env.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if is_cpu and env.get("DS_ACCELERATOR") != "cpu":
        raise UserError(
            "environment: ACCELERATE_USE_CPU=True (`accelerate launch --cpu`) is not read; set "
            "DS_ACCELERATOR=cpu to train on the CPU"
        )
    # Then accelerate starts one process and expects the script to start the others (1.15.0).
    if "ACCELERATE_USE_CPU" in env and "MASTER_ADDR" in env and "RANK" not in env:
        raise UserError(
            f"environment: MASTER_ADDR={env['MASTER_ADDR']} but no RANK: `accelerate launch` was "
            "asked for several processes and has started one; give it --multi_gpu, or on CPU use "
            "`torchrun --nproc-per-node N launch/train.py RUN.yaml`"
        )


def _require_one_launcher(placement: Placement, tasks: Tasks | None) -> None:
    """Require one torchrun or deepspeed per node inside srun or mpirun, or equal ranks."""
    if tasks is None or tasks.size == 1:
        return
    task = (tasks.rank, tasks.size, tasks.local_rank, tasks.local_size)
    is_same = task == (
        placement.rank, placement.world_size, placement.local_rank, placement.local_size
    )  # fmt: skip
    is_one_per_node = task == (placement.rank // placement.local_size, placement.nodes, 0, 1)
    if not is_same and not is_one_per_node:
        raise UserError(
            f"environment: two launchers at once: RANK={placement.rank} "
            f"WORLD_SIZE={placement.world_size} LOCAL_RANK={placement.local_rank} with "
            f"{placement.local_size} ranks on this node, in task {tasks.rank} of {tasks.source} "
            f"with local rank {tasks.local_rank} of {tasks.local_size} on this node; "
            f"let {tasks.launcher} start every rank (`{tasks.launcher} ... python "
            "launch/train.py RUN.yaml`), or one torchrun or deepspeed per node for all nodes"
        )


def _require_all_started(env: Mapping[str, str], placement: Placement, tasks: Tasks | None) -> None:
    """Refuse a process that would leave the other tasks, nodes or pods of its job idle."""
    processes = env.get("PET_NPROC_PER_NODE", "")
    pods = env.get("PET_NNODES", "").rpartition(":")[2]
    is_multiple = processes not in ("", "1", "auto", "gpu", "cpu") and placement.local_size == 1
    is_alone = pods not in ("", "1") and placement.world_size == 1
    if tasks is None and "TORCHELASTIC_RUN_ID" not in env and (is_multiple or is_alone):
        raise UserError(
            f"environment: PET_NNODES={pods or 1} PET_NPROC_PER_NODE={processes or 1}, which "
            "torchrun reads, but python was started: the pod's command must be `torchrun "
            "launch/train.py RUN.yaml`"
        )
    nodes = env.get("SLURM_JOB_NUM_NODES", env.get("SLURM_NNODES", ""))
    if tasks is None and nodes.isdigit() and placement.nodes < int(nodes):
        raise UserError(
            f"environment: a Slurm job of {nodes} nodes but ranks on {placement.nodes}, started "
            "without srun: the others would idle; use `sbatch slurm/train.sbatch RUN.yaml`, `srun "
            "python launch/train.py RUN.yaml`, `deepspeed` with a hostfile, or `srun --nodes=1 "
            "--ntasks=1` for one process"
        )
    number = env.get("SLURM_NTASKS", "1")
    if placement.world_size == 1 and tasks is None and number not in ("", "1"):
        raise UserError(
            f"environment: SLURM_NTASKS={number} but one rank, started without srun: the job's "
            "other tasks would idle or train the same alone; use `srun python launch/train.py "
            "RUN.yaml`, one `torchrun` or `deepspeed` per node, or `srun --ntasks=1` for one "
            "process"
        )


def _require_order(placement: Placement) -> None:
    """Require ranks below their sizes, equally many per node, numbered node by node."""
    rank, world = placement.rank, placement.world_size
    local_rank, local_size = placement.local_rank, placement.local_size
    if not 0 <= rank < world or not 0 <= local_rank < local_size:
        raise UserError(
            f"environment: RANK={rank} of WORLD_SIZE={world}, LOCAL_RANK={local_rank} of "
            f"{local_size} on this node: a rank must be below its size"
        )
    if world % local_size:
        raise UserError(
            f"environment: WORLD_SIZE={world} is not a multiple of the {local_size} ranks on this "
            "node; every node must start the same number of ranks"
        )
    if rank % local_size != local_rank:
        raise UserError(
            f"environment: rank {rank} is number {local_rank} of {local_size} on its node: "
            "ranks must fill one node after the other (`srun --distribution=block`, "
            "`mpirun --map-by slot`)"
        )


def _require_devices(env: Mapping[str, str], placement: Placement) -> None:
    """Require a GPU for each rank of this node, as far as the environment shows.

    srun and mpirun may make only one GPU visible to each task. Then Slurm has allocated one per
    task; under mpirun preflight checks that the devices differ.
    """
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or visible.startswith("-") or env.get("DS_ACCELERATOR") == "cpu":
        return  # no restriction, or CPU ranks
    entries, ranks = len(visible.split(",")), placement.local_size
    granted = env.get("SLURM_GPUS_ON_NODE", "")
    is_own = entries == 1 and (
        placement.launcher == "mpirun"
        or (placement.launcher == "srun" and granted.isdigit() and int(granted) >= ranks)
    )
    if entries < ranks and not is_own:
        slurm = f", SLURM_GPUS_ON_NODE={granted}" if granted else ""
        raise UserError(
            f"environment: {ranks} ranks on this node and "
            f"CUDA_VISIBLE_DEVICES={visible}{slurm}: each needs a GPU of its own; start one rank "
            "per GPU, or set DS_ACCELERATOR=cpu"
        )
