"""Environment -> ranks: complete, contradictory, or none."""

import pytest

from pipeline.cluster.placement import Placement, from_environment
from pipeline.cluster.tasks import first_host, port_of, ports_after
from pipeline.errors import UserError

pytestmark = pytest.mark.unit

DEEPSPEED = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "CROSS_RANK": "1",
    "CROSS_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip
TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip
# What a real srun of two nodes with four tasks each gives to its sixth task, as far as it is read.
SRUN = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NNODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_NODELIST": "gpu[07-08]",
}  # fmt: skip
ONE_A_NODE = SRUN | {
    "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip
TWO_ON_ONE = ONE_A_NODE | {
    "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "1",
}  # fmt: skip
# The shell of sbatch's script has a task's variables, but is none of srun's.
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
    return {key: value for key, value in (env | change).items() if value is not None}


def test_no_launcher_is_one_process():
    assert from_environment({"PATH": "/bin"}) == Placement()
    assert from_environment({"MASTER_PORT": "29500"}) == Placement()  # left over in a shell


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        (DEEPSPEED, "deepspeed"),
        (TORCHRUN, "torchrun"),
        (TORCHRUN | {"LOCAL_SIZE": "2"}, "torchrun"),  # left over from DeepSpeed on a CPU
    ],
)
def test_what_a_launcher_of_ranks_set_is_taken(env, launcher):
    placement = from_environment(env)
    assert (placement.rank, placement.local_rank, placement.nodes) == (5, 1, 2)
    assert placement.launcher == launcher
    assert placement.variables() == DEEPSPEED
    assert placement.rendezvous_id == ""


def test_srun_one_task_a_gpu():
    placement = from_environment(SRUN)
    assert placement.launcher == "srun"
    assert placement.variables() == DEEPSPEED | {"MASTER_ADDR": "gpu07", "MASTER_PORT": "16234"}
    assert placement.rendezvous_id == "Slurm step 1234.0, start 0"


def test_every_task_of_a_step_looks_for_the_same_rendezvous():
    def task(number):
        own = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number % 4)}
        return from_environment(SRUN | own)

    everyone = [task(number) for number in range(8)]
    assert [place.rank for place in everyone] == list(range(8))
    assert (
        len({(p.master_addr, p.master_port, p.rendezvous_id, p.world_size) for p in everyone}) == 1
    )


def test_another_job_step_or_start_is_another_rendezvous():
    def rendezvous(**change):
        placement = from_environment(SRUN | change)
        return placement.rendezvous_id, placement.master_port

    here = rendezvous()
    assert rendezvous(SLURM_JOB_ID="1235")[1] != here[1]
    assert rendezvous(SLURM_STEP_ID="1")[1] not in (here[1], rendezvous(SLURM_JOB_ID="1235")[1])
    assert rendezvous(SLURM_RESTART_COUNT="1") == ("Slurm step 1234.0, start 1", here[1])


def test_address_and_port_of_the_users_are_kept_under_srun():
    placement = from_environment(SRUN | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"})
    assert (placement.master_addr, placement.master_port) == ("10.0.0.7", 4000)
    assert placement.rendezvous_id == ""  # nobody may move it


@pytest.mark.parametrize("inner", [DEEPSPEED, TORCHRUN], ids=["deepspeed", "torchrun"])
@pytest.mark.parametrize(
    "outer",
    [
        ONE_A_NODE,
        BATCH,
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
         "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
    ],
    ids=["srun, one a node", "batch script", "mpirun, one a node"],
)  # fmt: skip
def test_a_launcher_a_node_inside_srun_or_mpirun(inner, outer):
    assert from_environment(outer | inner).variables() == DEEPSPEED


def test_a_script_that_numbers_ranks_as_srun_does():
    assert from_environment(SRUN | DEEPSPEED).variables() == DEEPSPEED


def test_one_task_of_srun_is_one_process():
    one = {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1",
           "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # fmt: skip
    assert from_environment(SRUN | one) == Placement()
    alone = DEEPSPEED | {"RANK": "1"}  # `srun --pty bash`, and deepspeed --hostfile from there
    assert from_environment(SRUN | one | alone).rank == 1


@pytest.mark.parametrize("env", [OPEN_MPI, HYDRA], ids=["Open MPI", "Hydra"])
def test_mpirun(env):
    placement = from_environment(env)
    assert placement.launcher == "mpirun"
    assert (placement.rank, placement.local_rank) == (5, 1)
    assert (placement.world_size, placement.local_size, placement.nodes) == (8, 4, 2)
    assert (placement.master_addr, placement.master_port) == ("", 0)  # MPI will tell
    told = from_environment(env | {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
    assert told.variables() == DEEPSPEED


def test_one_process_of_mpirun_is_one_process():
    env = {name: "1" if "SIZE" in name else "0" for name in OPEN_MPI}
    assert from_environment(env) == Placement()


def test_mpirun_inside_a_slurm_job():
    """Its helpers are tasks of srun, one a node; the rank's own numbers are mpirun's."""
    placement = from_environment(ONE_A_NODE | OPEN_MPI)
    assert (placement.launcher, placement.rank, placement.world_size) == ("mpirun", 5, 8)


def test_srun_that_speaks_pmi_is_srun():
    """Slurm's PMI says rank and size, and no more (--mpi=pmi2, on many clusters the default)."""
    pmi = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_FD": "9", "PMI_JOBID": "1234.0"}
    placement = from_environment(SRUN | pmi)
    assert (placement.launcher, placement.master_addr) == ("srun", "gpu07")
    inner = ONE_A_NODE | {"PMI_RANK": "1", "PMI_SIZE": "2"} | TORCHRUN
    assert from_environment(inner).variables() == DEEPSPEED


def test_mpirun_in_a_shell_of_srun_that_speaks_pmi():
    one = {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1",
           "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "PMI_RANK": "0", "PMI_SIZE": "1"}  # fmt: skip
    placement = from_environment(SRUN | one | OPEN_MPI)
    assert (placement.launcher, placement.rank, placement.world_size) == ("mpirun", 5, 8)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"RANK": None}, "RANK"),
        ({"MASTER_PORT": None}, "MASTER_PORT"),
        ({"RANK": "8"}, "below its size"),
        ({"LOCAL_RANK": "4"}, "below its size"),
        ({"WORLD_SIZE": "seven"}, "WORLD_SIZE='seven' is not a whole number"),
        ({"WORLD_SIZE": "7"}, "not a multiple"),
        ({"LOCAL_SIZE": "0"}, "below its size"),
        ({"LOCAL_RANK": "2"}, "rank 5 is number 2 of 4 on its machine"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "4 ranks on this machine and CUDA_VISIBLE_DEVICES=0,1"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "each needs a GPU of its own"),
    ],
)
def test_contradictions_are_named(change, part):
    with pytest.raises(UserError, match=part):
        from_environment(changed(DEEPSPEED, change))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"SLURM_STEP_NUM_TASKS": "16"}, r"STEP_NUM_TASKS=16 but SLURM_STEP_TASKS_PER_NODE=4\(x2"),
        ({"SLURM_STEP_TASKS_PER_NODE": "5,3"}, "5,3: every machine must start the same number"),
        ({"SLURM_STEP_TASKS_PER_NODE": "four"}, "'four' is not a number of tasks a node"),
        ({"SLURM_LOCALID": None}, "set but not SLURM_LOCALID"),
        ({"SLURM_LOCALID": "2", "SLURM_PROCID": "1"}, "srun --distribution=block"),
        ({"SLURM_STEP_NODELIST": None, "SLURM_JOB_NODELIST": None}, "without SLURM_JOB_NODELIST"),
        (
            {"SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "0"},
            "4 ranks on this machine and CUDA_VISIBLE_DEVICES=0, SLURM_GPUS_ON_NODE=1",
        ),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "each needs a GPU of its own"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"}, "each needs a GPU"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "two launchers at once.*mpirun 4"),
    ],
)
def test_contradictions_under_srun(change, part):
    with pytest.raises(UserError, match=part):
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
def test_gpus_that_are_enough(change):
    assert from_environment(SRUN | change).rank == 5


ALONE = DEEPSPEED | {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "part"),
    [
        ({"SLURM_NTASKS": "16"}, "SLURM_NTASKS=16 but one rank, started without srun"),
        (BATCH, "use `srun python"),
        # salloc with an interactive shell is a step of Slurm's own
        (BATCH | {"SLURM_STEP_ID": "4294967290"}, "SLURM_NTASKS=8 but one rank"),
        (ALONE | {"SLURM_NTASKS": "16"}, "SLURM_NTASKS=16 but one rank"),
        # Slurm says nothing of tasks where only nodes and GPUs were asked for
        ({"SLURM_JOB_NUM_NODES": "2"}, "a Slurm job of 2 nodes but ranks on 1, started without"),
        (ALONE | {"SLURM_JOB_NUM_NODES": "2"}, "a Slurm job of 2 nodes"),
        ({"SLURM_NNODES": "3"}, "a Slurm job of 3 nodes"),
        (SRUN | ALONE, "two launchers at once: RANK=0 WORLD_SIZE=1.*STEP_NUM_TASKS=8"),
        (SRUN | TORCHRUN | {"RANK": "3", "LOCAL_RANK": "3"}, "two launchers at once"),
        (ONE_A_NODE | ALONE, "two launchers at once"),
        (TWO_ON_ONE | TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}, "two launchers at once"),
        (OPEN_MPI | ALONE, "two launchers at once: RANK=0.*OMPI_COMM_WORLD_SIZE=8"),
        (OPEN_MPI | HYDRA | {"PMI_SIZE": "2"}, "two launchers at once"),
    ],
)
def test_ranks_that_would_train_alone_or_twice_are_refused(env, part):
    with pytest.raises(UserError, match=part):
        from_environment(env)


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


def test_ports_are_high_apart_and_below_the_systems_own():
    jobs = [port_of(job, 0) for job in range(90_000, 91_000)]
    assert len(set(jobs)) == len(jobs)
    for port in (port_of(0, 0), port_of(14_999, 0), port_of(2**31, 40)):
        tried = ports_after(port, 8)
        assert tried[0] == port
        assert len(set(tried)) == 8
        assert all(15_000 <= p < 30_000 for p in tried)


def test_preflight_may_look_at_one_machine_of_a_job():
    assert from_environment({"SLURM_JOB_NUM_NODES": "2"}, may_be_alone=True) == Placement()
    assert from_environment(BATCH, may_be_alone=True) == Placement()
