"""hpZ, parameter offload and limits of live parameters do not change the numbers."""

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups

from pipeline.adapter.gather import OptimizerState, gather_moments, gather_weights, restore
from pipeline.model.adapter import attach_adapter
from pipeline.model.base import load_base
from pipeline.plan.cost.gathers import gathers
from pipeline.train.engine import Engine
from tests import train_tiny as tiny
from tests.adapter.test_gather import MORE, STEPS, train_steps
from tests.plans import with_layout
from tests.ranks import run_groups_once, run_ranks
from tests.tiny import CONFIG, Documents, make_model, make_plan
from tests.train.test_equality import NF4, assert_same, reference
from tests.train_tiny import train_tiny, work

pytestmark = pytest.mark.engine

NOT_GATHERED = ZeroParamStatus.NOT_AVAILABLE


def changed_plan(folder, world_size, documents, changes, **settings):
    """A plan with a changed layout and DeepSpeed config, as `auto` may choose them."""
    return with_layout(make_plan(folder, world_size, documents, **settings), **changes)


def build(session, folder, settings, changes):
    plan = changed_plan(folder, session.placement.world_size, 40, changes, **settings)
    return plan, Engine(attach_adapter(load_base(plan, session.device), plan), plan)


def train_changed(session, folder, runs):
    """Results of several runs, each with settings and changes of its plan."""
    results = []
    for settings, changes in runs:

        def make(folder, world_size, documents=None, *, _changes=changes, **settings):
            return changed_plan(folder, world_size, documents, _changes, **settings)

        tiny.make_plan = make
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed expects one engine in a process
        results.append(train_tiny(session, folder, {"zero_stage": 3, "batch_size": 2} | settings))
    return results


HPZ, OFFLOAD = {"hpz_partition_size": 2}, {"offload_param": "cpu"}
CHECKPOINTED = {"gradient_checkpointing": True}
# Kind of the base, number of ranks, and the runs that these ranks train one after the other.
GROUPS = {
    "2 ranks": (
        {}, 2,
        [
            ({}, OFFLOAD),
            (CHECKPOINTED, OFFLOAD),
            (CHECKPOINTED, {"checkpointed_layers": 1}),
            ({"zero_stage": 2} | CHECKPOINTED, {"checkpointed_layers": 1}),
        ],
    ),
    "4 ranks": ({}, 4, [({}, HPZ), ({"batch_size": 1} | CHECKPOINTED, HPZ)]),
    "nf4": (NF4, 2, [({}, OFFLOAD), ({}, {"loads_through_host": True})]),
    "nf4, 4 ranks": (NF4, 4, [({}, HPZ), ({}, HPZ | OFFLOAD)]),
}  # fmt: skip
RUNS = [(name, number) for name, (*_, runs) in GROUPS.items() for number in range(len(runs))]


@pytest.fixture(scope="module")
def results_of(tiny_model, tmp_path_factory):
    """Function: name of a group -> the results of its runs; the ranks start once."""
    groups = {
        name: (world_size, [(kind | settings, changes) for settings, changes in runs])
        for name, (kind, world_size, runs) in GROUPS.items()
    }
    return run_groups_once(groups, train_changed, tiny_model, tmp_path_factory)


@pytest.mark.parametrize(("group", "number"), RUNS)
def test_losses_gradients_and_weights_equal_those_of_the_reference(
    tiny_model, tmp_path, results_of, group, number
):
    kind, *_ = GROUPS[group]
    assert_same(results_of(group)[number], reference(tiny_model, tmp_path, kind))


def restore_unchanged(session, folder, settings, changes):
    """Losses of continued training, and of training after the same state is restored."""
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed expects one engine in a process
    plan, engine = build(session, folder, settings, changes)
    train_steps(session, plan, engine, 0, STEPS)
    weights = gather_weights(engine.parameters, keep=True)
    moments = gather_moments(engine.parameters, keep=True)
    continued = train_steps(session, plan, engine, STEPS, MORE)
    zero = engine.deepspeed.optimizer
    frozen = [p for p in engine.deepspeed.module.parameters() if not p.requires_grad]
    assert zero.offload_param is (changes == OFFLOAD)
    assert {p.ds_secondary_tensor is not None for p in frozen} == {changes == HPZ}
    state = OptimizerState(moments=moments, step=STEPS)
    restore(engine.deepspeed, engine.parameters, weights, state)
    for restored, saved in (
        (gather_weights(engine.parameters, keep=True), weights),
        (gather_moments(engine.parameters, keep=True), moments),
    ):
        assert all(torch.equal(restored[key], saved[key]) for key in saved)
    return continued, train_steps(session, plan, engine, STEPS, MORE)


def restore_each(session, folder, kinds, changes):
    settings = {"zero_stage": 3, "batch_size": 2, "bf16": True}
    return [restore_unchanged(session, folder, settings | kind, changes) for kind in kinds]


@pytest.mark.parametrize(("world_size", "changes"), [(4, HPZ), (2, OFFLOAD)])
def test_the_adapter_is_gathered_and_restored_exactly(tiny_model, tmp_path, world_size, changes):
    arguments = (restore_each, tiny_model, [{}, NF4], changes)
    for continued, again in run_ranks(*arguments, tmp_path=tmp_path, world_size=world_size)[0]:
        assert again == continued


def watch_gathers(session, folder, settings, changes):
    """Peak of gathered elements, elements gathered in step 2, and the plan's prediction."""
    plan, engine = build(session, folder, settings, changes)
    modules = engine.deepspeed.module.parameters()
    base = [p for p in modules if not p.requires_grad and not p.ds_persist]
    watch = GatherWatch(base)
    coordinator = PartitionedParameterCoordinator
    fetch, release = coordinator.fetch_sub_module, coordinator.release_sub_module

    def fetch_and_update(self, *arguments, **named):
        fetch(self, *arguments, **named)
        watch.update()

    def release_and_update(self, *arguments, **named):
        release(self, *arguments, **named)
        watch.update()

    coordinator.fetch_sub_module = fetch_and_update
    coordinator.release_sub_module = release_and_update
    gathered = []
    for step in range(3):
        watch.total = 0
        batches, supervised = work(plan, Documents(), step, session.placement.rank)
        if step == 2:
            engine.evaluate(batches[0].batch)
        engine.optimizer_step(batches, supervised, 1e-3)
        gathered.append(watch.total / len(batches))
    coordinator.fetch_sub_module, coordinator.release_sub_module = fetch, release
    return watch.most, gathered[1], gathers(plan.shape, plan.settings)


class GatherWatch:
    """Gathered elements of the base: their peak, and the sum of all gathers."""

    def __init__(self, base):
        self.base, self.before, self.most, self.total = base, set(), 0, 0

    def update(self):
        live = {p.ds_id: p.ds_numel for p in self.base if p.ds_status != NOT_GATHERED}
        self.most = max(self.most, sum(live.values()))
        self.total += sum(size for key, size in live.items() if key not in self.before)
        self.before = set(live)


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """A model of eight layers with an untied head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIG, "num_hidden_layers", 8)
        return make_model(tmp_path_factory.mktemp("deep") / "model", tied=False)


WATCHED = [({}, {}), (CHECKPOINTED, {}), (CHECKPOINTED, {"checkpointed_layers": 4}), (NF4, {})]


def watch_each(session, folder, runs):
    common = {"zero_stage": 3, "batch_size": 4, "lora_r": 2}
    return [
        watch_gathers(session, folder, common | settings, changes) for settings, changes in runs
    ]


@pytest.fixture(scope="module")
def watched(deep_model, tmp_path_factory):
    """Gathers of the runs of WATCHED; the ranks start once."""
    return run_ranks(watch_each, deep_model, WATCHED, tmp_path=tmp_path_factory.mktemp("w"))[0]


@pytest.mark.parametrize("number", range(len(WATCHED)))
def test_zero3_gathers_the_planned_elements_and_each_block_twice(watched, number):
    most, gathered, planned = watched[number]
    assert planned.head < most <= planned.peak < 4 * planned.block
    once = 8 * planned.block + planned.head  # twice this includes the embedding and the head once
    assert 2 * once - planned.block < gathered <= 2 * once
