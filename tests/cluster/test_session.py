"""Collective decisions, sums, and work of rank 0 for all, on gloo ranks."""

import time
from datetime import timedelta

import pytest

from pipeline.cluster import session as session_module
from pipeline.cluster.placement import Placement
from pipeline.cluster.session import Session, use_only_gpu
from pipeline.errors import UserError
from tests.messages import refused
from tests.plan.test_plan import CPU
from tests.plans import gpu
from tests.ranks import run_ranks

pytestmark = pytest.mark.group


def test_deepspeed_uses_the_only_visible_gpu_whatever_the_local_rank_is(monkeypatch):
    """A scheduler may make one GPU visible to each rank (srun --gpus-per-task=1)."""
    import torch
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    accelerator = CUDA_Accelerator()
    use_only_gpu(accelerator)
    accelerator.set_device(3)  # as DeepSpeed does with the local rank
    assert used == [0]
    assert accelerator.device_name("3") == "cuda:0"
    assert accelerator.device_name() == "cuda"


@pytest.mark.parametrize(("local_rank", "is_told"), [(0, False), (3, True)])
def test_deepspeed_is_told_of_the_only_visible_gpu_if_its_index_is_not_the_local_rank(
    monkeypatch, local_rank, is_told
):
    """Functions that need a GPU or other ranks are replaced."""
    import deepspeed
    import torch

    told = []
    monkeypatch.setattr(session_module, "use_only_gpu", told.append)
    monkeypatch.setattr(Session, "device", torch.device("cuda", 0))
    monkeypatch.setattr(Session, "import_deepspeed", lambda self: None)
    monkeypatch.setattr(Session, "_open_store", lambda self: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "new_group", lambda *_, **__: None)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda *_, **__: None)
    placement = Placement(rank=local_rank, local_rank=local_rank, world_size=4, local_size=4)
    Session(placement, gpu()).start()
    assert len(told) == is_told


def decide_and_add(session):
    """A decision that rank 1 requests, one that no rank requests, and two sums over ranks."""
    rank = session.placement.rank
    return (
        session.any_rank(rank == 1),
        session.any_rank(False),
        session.sum_over_ranks([rank, 0.5]),
    )


def test_decisions_and_sums_are_equal_on_all_ranks(tmp_path):
    results = run_ranks(decide_and_add, tmp_path=tmp_path, world_size=3)
    assert results == [(True, False, [3.0, 1.5])] * 3


def work_on_rank_zero(session):
    """The results of work on rank 0 with a result, and without one."""

    def work():
        time.sleep(0.3)
        return {"answer": 42, "rank": session.placement.rank}

    return session.rank_zero_first(work), session.rank_zero_first(lambda: None)


RESULT = ({"answer": 42, "rank": 0}, None)


def test_the_result_of_rank_zero_s_work_is_returned_on_all_ranks(tmp_path):
    assert run_ranks(work_on_rank_zero, tmp_path=tmp_path) == [RESULT] * 2


def work_longer_than_one_wait(session):
    session_module._ONE_WAIT_TIMEOUT = timedelta(milliseconds=50)
    return work_on_rank_zero(session)


def test_the_wait_for_rank_zero_has_no_time_out(tmp_path):
    assert run_ranks(work_longer_than_one_wait, tmp_path=tmp_path) == [RESULT] * 2


def fail_on_rank_zero(session):
    def work():
        raise UserError("line 3 is wrong")

    with refused("line 3"):
        session.rank_zero_first(work)
    return session.any_rank(True)  # the group still works


def work_meanwhile(session):
    done = []

    def meanwhile():
        time.sleep(0.3)  # longer than the work of rank 0
        done.append(session.placement.rank)

    return session.rank_zero_first(lambda: 1, meanwhile), done


def test_the_other_ranks_complete_the_work_that_they_do_meanwhile(tmp_path):
    assert run_ranks(work_meanwhile, tmp_path=tmp_path) == [(1, []), (1, [1])]


def fail_before_the_other_is_done(session):
    def work():
        raise UserError("line 3 is wrong")

    start = time.monotonic()
    with refused("line 3"):
        session.rank_zero_first(work, meanwhile=lambda: time.sleep(60))
    return time.monotonic() - start < 30


def test_an_error_of_rank_zero_does_not_wait_for_the_other_work(tmp_path):
    assert run_ranks(fail_before_the_other_is_done, tmp_path=tmp_path) == [True, True]


def test_an_error_of_rank_zero_is_raised_on_every_rank(tmp_path):
    assert run_ranks(fail_on_rank_zero, tmp_path=tmp_path) == [True, True]


def test_a_single_process_needs_no_group():
    with Session(Placement(), CPU) as session:
        assert session.rank_zero_first(lambda: 7) == 7
        assert session.sum_over_ranks([1, 2]) == [1.0, 2.0]
        assert session.is_rank_zero
