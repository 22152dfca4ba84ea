"""The placement of a rank (its rank, local rank, world size and master) from the environment.

Each launcher sets other variables. They may be complete, contradictory, or missing.
"""

from dataclasses import replace

import pytest

from pipeline.cluster.placement import Placement, from_environment
from pipeline.cluster.tasks import first_host, ports_after, rendezvous_port
from tests.messages import refused

pytestmark = pytest.mark.unit

# All environments of launchers below are those of rank 5 of 8. It has local rank 1 on the second of
# two nodes with four ranks each.
DEEPSPEED = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "CROSS_RANK": "1",
    "CROSS_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip
TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip
# Environment of the sixth task of a real srun (2 nodes, 4 tasks each): the variables that are read.
SRUN = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NNODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_NODELIST": "gpu[07-08]",
}  # fmt: skip
ONE_TASK_PER_NODE = SRUN | {
    "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip
ONE_TASK = SRUN | {
    "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
}  # fmt: skip
TWO_TASKS_ON_ONE_NODE = ONE_TASK_PER_NODE | {
    "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "1",
}  # fmt: skip
# The shell of a batch script has the variables of a task, but srun did not start it.
BATCH = {
    "SLURM_JOB_ID": "1234", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_JOB_NODELIST": "gpu[07-08]",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_RANK": "5",
}  # fmt: skip
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}


def changed(env: dict[str, str], change: dict[str, str | None]) -> dict[str, str]:
    """The environment with changed variables; None removes one."""
    return {key: value for key, value in (env | change).items() if value is not None}


def test_no_launcher_is_one_process():
    assert from_environment({"PATH": "/bin"}) == Placement()
    assert from_environment({"MASTER_PORT": "29500"}) == Placement()  # a variable left in the shell


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        (DEEPSPEED, "deepspeed"),
        (TORCHRUN, "torchrun"),
        (TORCHRUN | {"LOCAL_SIZE": "2"}, "torchrun"),  # set by DeepSpeed on a CPU
    ],
)
def test_the_rank_variables_of_deepspeed_and_torchrun_are_read(env, launcher):
    placement = from_environment(env)
    assert (placement.rank, placement.local_rank, placement.nodes) == (5, 1, 2)
    assert placement.launcher == launcher
    assert placement.variables() == DEEPSPEED
    assert placement.rendezvous_id == ""


def test_a_task_of_srun_is_a_rank():
    placement = from_environment(SRUN)
    assert placement.launcher == "srun"
    port = str(15_000 + 1234)  # depends on the id of the job
    assert placement.variables() == DEEPSPEED | {"MASTER_ADDR": "gpu07", "MASTER_PORT": port}
    assert placement.rendezvous_id == "Slurm step 1234.0, start 0"


def test_every_task_of_a_step_has_the_same_rendezvous():
    def task(number):
        own = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number % 4)}
        return from_environment(SRUN | own)

    placements = [task(number) for number in range(8)]
    assert [placement.rank for placement in placements] == list(range(8))
    rendezvous = {(p.master_addr, p.master_port, p.rendezvous_id, p.world_size) for p in placements}
    assert len(rendezvous) == 1


def test_another_job_or_step_has_another_port_and_a_requeued_job_another_rendezvous_id():
    first = from_environment(SRUN)
    other_job = from_environment(SRUN | {"SLURM_JOB_ID": "1235"})
    other_step = from_environment(SRUN | {"SLURM_STEP_ID": "1"})
    requeued = from_environment(SRUN | {"SLURM_RESTART_COUNT": "1"})
    assert len({p.master_port for p in (first, other_job, other_step)}) == 3
    assert requeued.rendezvous_id == "Slurm step 1234.0, start 1"
    assert requeued.master_port == first.master_port


def test_a_users_address_and_port_are_kept_under_srun():
    placement = from_environment(SRUN | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"})
    assert (placement.master_addr, placement.master_port) == ("10.0.0.7", 4000)
    assert placement.rendezvous_id == ""  # the port may not be changed


# `outer` starts one process on each node, and its child, the launcher `inner`, starts the ranks.
@pytest.mark.parametrize("inner", [DEEPSPEED, TORCHRUN], ids=["deepspeed", "torchrun"])
@pytest.mark.parametrize(
    "outer",
    [
        ONE_TASK_PER_NODE,
        BATCH,
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
         "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
    ],
    ids=["srun, one a node", "batch script", "mpirun, one a node"],
)  # fmt: skip
def test_a_launcher_on_each_node_inside_srun_or_mpirun_defines_the_ranks(inner, outer):
    assert from_environment(outer | inner).variables() == DEEPSPEED


def test_variables_of_ranks_that_agree_with_srun_are_accepted():
    assert from_environment(SRUN | DEEPSPEED).variables() == DEEPSPEED


def test_a_step_of_one_task_is_a_run_of_one_process():
    assert from_environment(ONE_TASK) == Placement()
    # In the shell of `srun --pty bash`, the user starts deepspeed with a hostfile.
    rank_of_deepspeed = DEEPSPEED | {"RANK": "1"}
    assert from_environment(ONE_TASK | rank_of_deepspeed).rank == 1


@pytest.mark.parametrize("env", [OPEN_MPI, HYDRA], ids=["Open MPI", "Hydra"])
def test_a_process_of_mpirun_is_a_rank(env):
    placement = from_environment(env)
    assert placement.launcher == "mpirun"
    assert (placement.rank, placement.local_rank) == (5, 1)
    assert (placement.world_size, placement.local_size, placement.nodes) == (8, 4, 2)
    assert (placement.master_addr, placement.master_port) == ("", 0)  # known after the rendezvous
    with_address = from_environment(env | {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
    assert with_address.variables() == DEEPSPEED


def test_mpirun_with_one_process_is_a_run_of_one_process():
    ranks = {name: "0" for name in OPEN_MPI if name.endswith("RANK")}
    sizes = {name: "1" for name in OPEN_MPI if name.endswith("SIZE")}
    assert from_environment(ranks | sizes) == Placement()


def test_mpirun_inside_a_slurm_job_defines_the_ranks():
    """mpirun's helpers are tasks of srun, one on each node."""
    placement = from_environment(ONE_TASK_PER_NODE | OPEN_MPI)
    assert (placement.launcher, placement.rank, placement.world_size) == ("mpirun", 5, 8)


def test_srun_that_sets_variables_of_pmi_is_not_detected_as_mpirun():
    """With --mpi=pmi2, the default of many clusters, Slurm sets PMI_RANK and PMI_SIZE only."""
    pmi = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_FD": "9", "PMI_JOBID": "1234.0"}
    placement = from_environment(SRUN | pmi)
    assert (placement.launcher, placement.master_addr) == ("srun", "gpu07")
    inner = ONE_TASK_PER_NODE | {"PMI_RANK": "1", "PMI_SIZE": "2"} | TORCHRUN
    assert from_environment(inner).variables() == DEEPSPEED


def test_mpirun_in_a_step_of_one_task_with_pmi_defines_the_ranks():
    placement = from_environment(ONE_TASK | {"PMI_RANK": "0", "PMI_SIZE": "1"} | OPEN_MPI)
    assert (placement.launcher, placement.rank, placement.world_size) == ("mpirun", 5, 8)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"RANK": None}, ["RANK"]),
        ({"MASTER_PORT": None}, ["MASTER_PORT"]),
        ({"RANK": "8"}, ["RANK=8", "WORLD_SIZE=8"]),
        ({"LOCAL_RANK": "4"}, ["LOCAL_RANK=4"]),
        ({"WORLD_SIZE": "seven"}, ["WORLD_SIZE='seven'"]),
        ({"WORLD_SIZE": "7"}, ["WORLD_SIZE=7", "4 ranks"]),
        ({"LOCAL_SIZE": "0"}, ["LOCAL_RANK=1 of 0"]),
        ({"LOCAL_RANK": "2"}, ["rank 5", "2 of 4", "--map-by slot"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, ["4 ranks", "CUDA_VISIBLE_DEVICES=0,1"]),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ["4 ranks", "DS_ACCELERATOR=cpu"]),
    ],
)
def test_contradictory_variables_are_refused(change, facts):
    with refused("environment", *facts):
        from_environment(changed(DEEPSPEED, change))


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"SLURM_STEP_NUM_TASKS": "16"}, ["SLURM_STEP_NUM_TASKS=16", "4(x2)"]),
        ({"SLURM_STEP_TASKS_PER_NODE": "5,3"}, ["5,3", "--ntasks-per-node"]),
        ({"SLURM_STEP_TASKS_PER_NODE": "four"}, ["'four'"]),
        ({"SLURM_LOCALID": None}, ["SLURM_LOCALID"]),
        ({"SLURM_LOCALID": "2", "SLURM_PROCID": "1"}, ["srun --distribution=block"]),
        ({"SLURM_STEP_NODELIST": None, "SLURM_JOB_NODELIST": None}, ["SLURM_JOB_NODELIST"]),
        (
            {"SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "0"},
            ["4 ranks", "CUDA_VISIBLE_DEVICES=0", "SLURM_GPUS_ON_NODE=1"],
        ),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ["4 ranks"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"}, ["4 ranks"]),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, ["two launchers", "mpirun", "4"]),
        ({"SLURM_HET_SIZE": "2"}, ["SLURM_HET_SIZE=2", "heterogeneous"]),
    ],
)
def test_contradictory_variables_of_srun_are_refused(change, facts):
    with refused("environment", *facts):
        from_environment(changed(SRUN, change))


@pytest.mark.parametrize(
    "change",
    [
        {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"},
        {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "4"},  # --gpus-per-task=1
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cpu"},
    ],
)
def test_enough_visible_gpus_are_accepted(change):
    assert from_environment(SRUN | change).rank == 5


ONE_RANK = DEEPSPEED | {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "facts"),
    [
        ({"SLURM_NTASKS": "16"}, ["SLURM_NTASKS=16", "one rank", "srun"]),
        (BATCH, ["srun rankzero train"]),
        # the interactive shell of salloc is a special step
        (BATCH | {"SLURM_STEP_ID": "4294967290"}, ["SLURM_NTASKS=8"]),
        (ONE_RANK | {"SLURM_NTASKS": "16"}, ["SLURM_NTASKS=16"]),
        # Slurm sets no number of tasks if only nodes and GPUs were requested
        ({"SLURM_JOB_NUM_NODES": "2"}, ["2 nodes", "srun"]),
        (ONE_RANK | {"SLURM_JOB_NUM_NODES": "2"}, ["2 nodes"]),
        ({"SLURM_NNODES": "3"}, ["3 nodes"]),
        (SRUN | ONE_RANK, ["two launchers", "RANK=0", "WORLD_SIZE=1", "SLURM_STEP_NUM_TASKS=8"]),
        (SRUN | TORCHRUN | {"RANK": "3", "LOCAL_RANK": "3"}, ["two launchers", "RANK=3"]),
        (ONE_TASK_PER_NODE | ONE_RANK, ["two launchers"]),
        (TWO_TASKS_ON_ONE_NODE | TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}, ["two launchers"]),
        (OPEN_MPI | ONE_RANK, ["two launchers", "RANK=0", "OMPI_COMM_WORLD_SIZE=8"]),
        (OPEN_MPI | HYDRA | {"PMI_SIZE": "2"}, ["two launchers"]),
    ],
)
def test_ranks_that_would_train_alone_or_twice_are_refused(env, facts):
    with refused("environment", *facts):
        from_environment(env)


# RANK and others in addition to the variables of srun or mpirun: NVIDIA's container hook
# (enroot 50-slurm-pytorch.sh) and users' scripts set them.
HOOK = {  # those of a container hook
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "4711",
}  # fmt: skip


LAUNCHERS = pytest.mark.parametrize(
    "outer", [SRUN, OPEN_MPI, HYDRA], ids=["srun", "Open MPI", "Hydra"]
)


@LAUNCHERS
@pytest.mark.parametrize("names", [["RANK", "WORLD_SIZE", "LOCAL_RANK"], ["RANK"], ["WORLD_SIZE"]])
def test_rank_variables_that_agree_with_the_launcher_change_nothing(outer, names):
    placement = from_environment(outer | {name: HOOK[name] for name in names})
    assert placement == from_environment(outer)


@LAUNCHERS
def test_all_variables_of_a_container_hook_change_only_the_rendezvous(outer):
    placement = from_environment(outer | HOOK)
    rendezvous = {"master_addr": "gpu07", "master_port": 4711, "rendezvous_id": ""}
    assert placement == replace(from_environment(outer), **rendezvous)


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "4"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "0"}, {"LOCAL_WORLD_SIZE": "8"},
        {"LOCAL_SIZE": "2"},
    ],
)  # fmt: skip
def test_rank_variables_that_contradict_the_launcher_are_refused(change):
    ((name, value),) = change.items()
    local = {"LOCAL_SIZE", "LOCAL_WORLD_SIZE"} & {name}
    fact = f"{value} ranks on this node" if local else f"{name}={value}"
    with refused("environment", "two launchers", fact, "SLURM_STEP_NUM_TASKS=8"):
        from_environment(SRUN | HOOK | change)


def test_variables_of_a_hook_in_a_step_of_one_task_give_one_process():
    hook = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert from_environment(ONE_TASK | hook) == Placement()


def test_torchrun_with_one_rank_per_task_defines_the_ranks():
    inner = TORCHRUN | {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    placement = from_environment(ONE_TASK_PER_NODE | inner)
    assert (placement.launcher, placement.rank, placement.world_size) == ("torchrun", 1, 2)


# Environment of the third of four pods of a Kubernetes PyTorchJob.
POD = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1", "RANK": "2", "WORLD_SIZE": "4",
    "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
# Arguments of torchrun as variables (PET: PyTorch elastic), which Kubeflow's operator sets.
PET = {"PET_NNODES": "4", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "auto"}


# ids: an operator of version 1.6, which sets no arguments of torchrun, and a later one
@pytest.mark.parametrize("env", [POD, POD | PET], ids=["1.6", "with torchrun's arguments"])
def test_a_pod_that_starts_python_is_one_rank(env):
    placement = from_environment(env)
    assert (placement.launcher, placement.rank, placement.local_rank) == ("pods", 2, 0)
    assert (placement.world_size, placement.local_size, placement.nodes) == (4, 1, 4)
    assert (placement.master_addr, placement.master_port) == ("job-master-0", 23456)


def test_torchrun_in_a_pod_defines_the_ranks():
    assert from_environment(POD | PET | TORCHRUN).variables() == DEEPSPEED


@pytest.mark.parametrize(
    "env",
    [
        POD | PET | {"PET_NPROC_PER_NODE": "8", "WORLD_SIZE": "32"},
        PET,  # Kubeflow Trainer 2 and elastic jobs set only torchrun's arguments
        PET | {"PET_NNODES": "1:4"},
        {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "8"},
    ],
)
def test_pods_with_several_ranks_that_start_python_instead_of_torchrun_are_refused(env):
    with refused("environment", "PET_NPROC_PER_NODE", "torchrun --module pipeline.cli.train"):
        from_environment(env)


def test_a_job_of_one_pod_is_one_process():
    env = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "1"}
    assert from_environment(env) == Placement()


@pytest.mark.parametrize(
    ("env", "facts"),
    [
        ({"ACCELERATE_USE_FSDP": "true"} | TORCHRUN, ["ACCELERATE_USE_FSDP", "--multi_gpu"]),
        ({"ACCELERATE_USE_DEEPSPEED": "true"} | TORCHRUN, ["zero_stage", "--multi_gpu"]),
        ({"ACCELERATE_USE_CPU": "True"}, ["DS_ACCELERATOR=cpu"]),
        (
            {"ACCELERATE_USE_CPU": "True", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"},
            ["MASTER_ADDR=127.0.0.1", "RANK", "torchrun --nproc-per-node"],
        ),
    ],
)
def test_options_of_accelerate_that_the_run_would_ignore_are_refused(env, facts):
    with refused("environment", *facts):
        from_environment(env)


def test_ranks_that_accelerate_starts_without_such_options_are_read_like_torchrun():
    env = TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "no"}
    assert from_environment(env).launcher == "torchrun"
    one_process = {"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no"}
    assert from_environment(one_process) == Placement()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-2]", "node1"),
        ("gpu[007-012,020]", "gpu007"),
        ("a[3,5-7]", "a3"),
        ("b2,node[1-2]", "b2"),
        ("rack[1-2]n[03-04]", "rack1n03"),
        ("n[1-2]-ib.cluster.example", "n1-ib.cluster.example"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_ports_of_jobs_differ_and_are_below_the_ephemeral_range():
    """Ports are 15,000 to 29,999. The first and the last one are those of jobs 0 and 14,999."""
    ports_of_jobs = [rendezvous_port(job, step=0) for job in range(90_000, 91_000)]
    assert len(set(ports_of_jobs)) == 1000
    for first_port in (
        rendezvous_port(0, step=0),
        rendezvous_port(14_999, step=0),
        rendezvous_port(2**31, step=40),
    ):
        ports = ports_after(first_port, 8)
        assert ports[0] == first_port
        assert len(set(ports)) == 8
        assert all(15_000 <= port < 30_000 for port in ports)


def test_a_single_process_in_a_job_of_several_tasks_is_allowed_for_a_preflight():
    assert from_environment({"SLURM_JOB_NUM_NODES": "2"}, allow_single_process=True) == Placement()
    assert from_environment(BATCH, allow_single_process=True) == Placement()


@pytest.mark.parametrize("env", [DEEPSPEED, TORCHRUN, SRUN])
@pytest.mark.parametrize("port", ["0", "65536", "9" * 5000])
def test_an_invalid_port_is_refused(env, port):
    with refused("MASTER_PORT"):
        from_environment(env | {"MASTER_PORT": port})
