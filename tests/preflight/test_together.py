"""What ranks find out together, on real ranks."""

import json

import pytest

from pipeline.preflight import together
from pipeline.preflight.context import RankContext
from pipeline.preflight.rates import probe_pairs, probe_sum
from tests.planning import CPU
from tests.ranks import run_ranks
from tests.tiny import make_plan

pytestmark = pytest.mark.group


def gather(session):
    rank = session.placement.rank
    first = session.gather_objects({"rank": rank, "text": "ü"})
    second = session.gather_objects(rank * 2)  # not mixed up with the first
    return first, second


def test_rank_zero_gets_every_ranks_answer_in_order(tmp_path):
    results = run_ranks(gather, tmp_path=tmp_path, world_size=3)
    everyones = [{"rank": rank, "text": "ü"} for rank in range(3)]
    assert results == [(everyones, [0, 2, 4]), (None, None), (None, None)]


def _subject(session, model, folder) -> RankContext:
    plan = make_plan(model, 3, output_dir=str(folder), global_batch_size=6)
    return RankContext(
        placement=session.placement,
        hardware=CPU,
        session=session,
        settings=plan.settings,
        plan=plan,
    )


def meet(session, model, folder, blind):
    context = _subject(session, model, folder)
    if session.placement.rank == blind:
        together._read = lambda path, token: False
    return together.probe_clock(context), together.probe_folder(context)


def test_clock_and_folder(tmp_path, tiny_model):
    results = run_ranks(meet, tiny_model, tmp_path / "a/b/run", 2, tmp_path=tmp_path, world_size=3)
    clocks, folders = zip(*results, strict=True)
    assert clocks[0] == 0.0
    assert all(0 <= skew < 30 for skew in clocks)
    assert [folder["found"] for folder in folders] == [True, True, False]
    assert folders[0]["folder"] == str(tmp_path)  # the nearest that is there
    assert not list(tmp_path.glob(".preflight*"))
    assert not (tmp_path / "a").exists()


def measure(session, model):
    context = _subject(session, model, "run")
    return probe_sum(context), probe_pairs(context)


def test_sums_and_pairs(tmp_path, tiny_model):
    results = run_ranks(measure, tiny_model, tmp_path=tmp_path, world_size=3)
    sums, pairs = (dict(enumerate(column)) for column in zip(*results, strict=True))
    assert all(answer["rate"] > 0 for answer in sums.values())
    assert [sorted(found) for found in pairs.values()] == [["1"], ["0", "2"], ["1"]]
    assert all(link["is_near"] for found in pairs.values() for link in found.values())
    json.dumps([sums, pairs])
