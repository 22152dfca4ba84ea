"""A run of 64 ranks on 8 nodes, rehearsed on one machine.

Placement, plan and data order are pure functions, called for every rank. DeepSpeed runs on single
ranks in torch's fake process group, whose collectives return their input.
"""

import json
import os
import traceback
from pathlib import Path

import pytest

from pipeline.cluster.placement import Placement, from_environment
from pipeline.config.settings import RunSettings
from tests.ranks import CONTEXT
from tests.tiny import Documents, make_plan

pytestmark = pytest.mark.group

NODES, PER_NODE = 8, 8
WORLD = NODES * PER_NODE
HOSTS = [f"gpu{node:02}" for node in range(NODES)]


# The environment of each rank by launcher; `local`: local rank on the node.


def deepspeed(node: int, local: int) -> dict[str, str]:
    return {
        "RANK": str(node * PER_NODE + local), "LOCAL_RANK": str(local), "WORLD_SIZE": str(WORLD),
        "LOCAL_SIZE": str(PER_NODE), "CROSS_RANK": str(node), "CROSS_SIZE": str(NODES),
        "MASTER_ADDR": HOSTS[0], "MASTER_PORT": "29500",
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(PER_NODE))),
    }  # fmt: skip


def torchrun(node: int, local: int) -> dict[str, str]:
    return {
        "RANK": str(node * PER_NODE + local), "LOCAL_RANK": str(local), "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(PER_NODE), "GROUP_RANK": str(node), "TORCHELASTIC_RUN_ID": "x",
        "MASTER_ADDR": HOSTS[0], "MASTER_PORT": "29500",
    }  # fmt: skip


def srun(node: int, local: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(node * PER_NODE + local),
        "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node), "SLURM_NTASKS": str(WORLD),
        "SLURM_STEP_NUM_TASKS": str(WORLD), "SLURM_STEP_TASKS_PER_NODE": f"{PER_NODE}(x{NODES})",
        "SLURM_STEP_NODELIST": f"gpu[00-{NODES - 1:02}]", "SLURM_GPUS_ON_NODE": str(PER_NODE),
        "MASTER_PORT": "29500", "CUDA_VISIBLE_DEVICES": "0",
    }  # fmt: skip


def srun_of_torchrun(node: int, local: int) -> dict[str, str]:
    one_task_per_node = {
        "SLURM_PROCID": str(node), "SLURM_LOCALID": "0", "SLURM_NTASKS": str(NODES),
        "SLURM_STEP_NUM_TASKS": str(NODES), "SLURM_STEP_TASKS_PER_NODE": f"1(x{NODES})",
    }  # fmt: skip
    outer = srun(node, local) | one_task_per_node
    del outer["CUDA_VISIBLE_DEVICES"]
    return outer | torchrun(node, local)


def mpirun(node: int, local: int) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(node * PER_NODE + local), "OMPI_COMM_WORLD_SIZE": str(WORLD),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local), "OMPI_COMM_WORLD_LOCAL_SIZE": str(PER_NODE),
        "MASTER_ADDR": HOSTS[0], "MASTER_PORT": "29500",
    }  # fmt: skip


@pytest.mark.parametrize("launcher", [deepspeed, torchrun, srun, srun_of_torchrun, mpirun])
def test_every_rank_has_its_placement(launcher):
    placements = [
        from_environment(launcher(node, local))
        for node in range(NODES)
        for local in range(PER_NODE)
    ]
    assert [p.rank for p in placements] == list(range(WORLD))
    assert {(p.world_size, p.local_size, p.nodes) for p in placements} == {(WORLD, PER_NODE, NODES)}
    assert {(p.master_addr, p.master_port) for p in placements} == {(HOSTS[0], 29500)}
    node_ranks = [p.variables()["CROSS_RANK"] for p in placements]
    assert node_ranks == [str(node) for node in range(NODES) for _ in range(PER_NODE)]


def test_every_rank_has_the_same_plan_and_only_one_writes(tmp_path):
    from pipeline.cluster.session import Session
    from pipeline.plan.given.shape import read_shape
    from pipeline.plan.plan import make_plan
    from pipeline.plan.render import plan_json
    from tests.plans import H100S, LLAMA_8B

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    settings = RunSettings(model=str(tmp_path), train_data="t.jsonl", output_dir="run")
    plans, writers = [], 0
    for node in range(NODES):
        for local in range(PER_NODE):
            placement = from_environment(srun(node, local))
            plan = make_plan(
                settings, read_shape(str(tmp_path)), H100S,
                nodes=placement.nodes, ranks_per_node=placement.local_size,
            )  # fmt: skip
            plans.append(plan_json(plan))
            writers += Session(placement, H100S).is_rank_zero
    assert all(plan == plans[0] for plan in plans)
    assert plan.layout.world_size == WORLD
    assert writers == 1  # only rank 0 writes to the run folder


def documents_of(batches) -> list[tuple[int, ...]]:
    """Token ids of each document in the batches, without padding, which is token 0."""
    return [
        tuple(row[row > 0].tolist())
        for seeded in batches
        for row in seeded.batch.input_ids
        if bool((row > 0).any())
    ]


@pytest.mark.parametrize("documents", [300, 64, 5])
def test_64_ranks_together_train_on_the_same_documents_as_a_single_rank(tiny_model, documents):
    from tests.train_tiny import batches_of_step

    split = Documents(documents)
    wide = make_plan(tiny_model, WORLD, documents, global_batch_size=128)
    alone = make_plan(tiny_model, 1, documents, global_batch_size=128)
    assert wide.layout.global_batch_size == alone.layout.global_batch_size == 128
    assert wide.steps == alone.steps
    for step in range(min(3, wide.steps.total_steps)):
        work_of_ranks = [batches_of_step(wide, split, step, rank) for rank in range(WORLD)]
        expected, supervised = batches_of_step(alone, split, step, 0)
        assert {len(batches) for batches, _ in work_of_ranks} == {wide.layout.accumulation_steps}
        assert {num_supervised for _, num_supervised in work_of_ranks} == {supervised}
        trained = [row for batches, _ in work_of_ranks for row in documents_of(batches)]
        assert sorted(trained) == sorted(documents_of(expected))
        seeds = [seeded.seed for batches, _ in work_of_ranks for seeded in batches]
        assert len(set(seeds)) == len(seeds)  # each forward pass has its own dropout


def send_one_step(rank: int, folder: Path, settings: dict, send) -> None:
    """Send the result of `one_step`, or its error, as JSON to the test's process."""
    try:
        send.send(json.dumps(one_step(rank, folder, settings)))
    except BaseException:
        send.send(json.dumps({"error": traceback.format_exc()}))


def one_step(rank: int, folder: Path, settings: dict) -> dict:
    """Train a step on one of 64 ranks in a fake process group; numbers of steps and weights."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pipeline.adapter.gather import gather_weights
    from pipeline.cluster.session import Session
    from pipeline.model import sharded_loading
    from tests.plans import CPU
    from tests.train_tiny import batches_of_step, build_engine

    torch.set_num_threads(1)
    placement = Placement(
        rank=rank, local_rank=rank % PER_NODE, world_size=WORLD, local_size=PER_NODE
    )
    os.environ.update(placement.variables())
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    # The assertion compares with a broadcast of rank 0, which does not exist here.
    coordinator.assert_ints_same_as_other_ranks = lambda numbers: None
    # Each rank reads the whole base, because no other rank sends parameters.
    sharded_loading._shared_conversions = lambda conversions, device: conversions
    plan, engine = build_engine(Session(placement, CPU), folder, settings, documents=256)
    batches, supervised = batches_of_step(plan, Documents(256), 0, rank)
    engine.optimizer_step(batches, supervised, 1e-3)
    weights = gather_weights(engine.parameters, keep=rank == 0)
    optimizer = engine.deepspeed.optimizer
    shards = optimizer.single_partition_of_fp32_groups if settings["zero_stage"] < 3 else (
        optimizer.fp32_partitioned_groups_flat
    )  # fmt: skip
    return {
        "global_batch_size": engine.deepspeed.train_batch_size(),
        "num_steps": engine.deepspeed.global_steps,
        "num_weights": sum(getattr(p, "ds_numel", p.numel()) for p in engine.parameters.values()),
        "num_in_partition": sum(shard.numel() for shard in shards),
        "num_gathered": sum(tensor.numel() for tensor in weights.values()),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 3, "hpz_partition_size": PER_NODE},
    ],
    ids=["ZeRO-2", "ZeRO-3", "hpZ"],
)
def test_deepspeed_accepts_the_config_and_shards_by_64(tiny_model, settings):
    for rank in (0, WORLD - 1):
        receive, send = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=send_one_step,
            args=(rank, tiny_model, settings | {"global_batch_size": 128}, send),
        )
        process.start()
        assert receive.poll(90), f"rank {rank} of {WORLD} hangs"
        result = json.loads(receive.recv())
        process.kill()
        process.join()
        assert "error" not in result, result["error"]
        assert (result["global_batch_size"], result["num_steps"]) == (128, 1)
        num_per_rank = result["num_weights"] / WORLD
        # DeepSpeed pads partitions, so a rank can have more than a 64th of the weights.
        assert num_per_rank <= result["num_in_partition"] <= num_per_rank * 1.5 + WORLD
        assert result["num_gathered"] == (result["num_weights"] if rank == 0 else 0)
