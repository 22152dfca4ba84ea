"""Collective probes of preflight on gloo ranks."""

import json

import pytest

from pipeline.cluster.sequence_group import SequenceGroup
from pipeline.preflight import host
from pipeline.preflight.context import RankContext
from pipeline.preflight.rates import _SENT_BYTES, ALL_REDUCE, ALL_TO_ALL, LINKS
from tests.plans import CPU
from tests.ranks import run_ranks
from tests.tiny import make_plan

pytestmark = pytest.mark.group


def gather(session):
    rank = session.placement.rank
    first = session.gather_objects({"rank": rank, "text": "ü"})
    second = session.gather_objects(rank * 2)  # must not be confused with the first
    return first, second


def test_rank_zero_gets_every_ranks_value_in_order(tmp_path):
    results = run_ranks(gather, tmp_path=tmp_path, world_size=3)
    values = [{"rank": rank, "text": "ü"} for rank in range(3)]
    assert results == [(values, [0, 2, 4]), (None, None), (None, None)]


def probe(session, model, folder, blind_rank):
    plan = make_plan(model, 3, output_dir=str(folder), global_batch_size=6)
    context = RankContext(
        placement=session.placement, hardware=CPU, session=session, settings=plan.settings,
        plan=plan,
    )  # fmt: skip
    if session.placement.rank == blind_rank:
        host._is_visible = lambda path, token: False
    return [check.probe(context) for check in (host.CLOCK, host.RUN_FOLDER, ALL_REDUCE, LINKS)]


def test_all_ranks_together_probe_the_clocks_the_run_folder_and_the_rates(tmp_path, tiny_model):
    results = run_ranks(probe, tiny_model, tmp_path / "a/b/run", 2, tmp_path=tmp_path, world_size=3)
    clocks, folders, rates, links = zip(*results, strict=True)
    assert clocks[0] == 0.0
    assert all(0 <= skew < 30 for skew in clocks)
    assert [folder["is_visible"] for folder in folders] == [True, True, False]
    assert folders[0]["folder"] == str(tmp_path)  # the nearest parent that exists
    assert not list(tmp_path.glob(".preflight*"))
    assert not (tmp_path / "a").exists()
    assert all(result["rate"] > 0 for result in rates)
    assert [sorted(partners) for partners in links] == [["1"], ["0", "2"], ["1"]]
    assert all(link["is_local"] for partners in links for link in partners.values())
    json.dumps([rates, links])


def probe_groups(session, model, size):
    plan = make_plan(model, 4, global_batch_size=4, sequence_parallel_size=size)
    context = RankContext(
        placement=session.placement, hardware=CPU, session=session, settings=plan.settings,
        plan=plan,
    )  # fmt: skip
    sizes, exchange = [], SequenceGroup.all_to_all
    SequenceGroup.all_to_all = lambda *args: sizes.append(args[1].nbytes) or exchange(*args)
    result = ALL_TO_ALL.probe(context)
    return result, set(sizes)


def test_an_all_to_all_of_each_planned_group_has_a_rate(tmp_path, tiny_model):
    calls = run_ranks(probe_groups, tiny_model, 2, tmp_path=tmp_path, world_size=4)
    results = [result for result, _ in calls]
    assert all(sizes == {_SENT_BYTES["cpu"]} for _, sizes in calls)  # of which the rate is
    assert [result["size"] for result in results] == [2] * 4
    assert all(result["rate"] > 0 and result["planned"] > 0 for result in results)
