"""hpZ, parameter offload and partial checkpointing change no number, and ZeRO-3 gathers as planned.

hpZ keeps a second copy of the parameters in each group of ranks, so that gathers stay in the group.
"""

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
from tests import train_tiny as train_tiny_module
from tests.adapter.test_gather import MORE, STEPS, train_steps
from tests.plans import with_layout
from tests.ranks import run_groups_once, run_ranks
from tests.tiny import CONFIG, Documents, make_model, make_plan
from tests.train.test_equality import NF4, assert_same, reference
from tests.train_tiny import batches_of_step, train_tiny

pytestmark = pytest.mark.engine

NOT_GATHERED = ZeroParamStatus.NOT_AVAILABLE


def plan_with_layout(folder, world_size, documents, changes, **settings):
    """A plan whose layout has these values; they have no setting, the planner chooses them."""
    return with_layout(make_plan(folder, world_size, documents, **settings), **changes)


def build(session, folder, settings, changes):
    plan = plan_with_layout(folder, session.placement.world_size, 40, changes, **settings)
    return plan, Engine(attach_adapter(load_base(plan, session.device), plan), plan)


def train_with_layouts(session, folder, runs):
    """Results of `train_tiny` for several runs, each with settings and values of its layout."""
    results = []
    for settings, changes in runs:

        def make_changed_plan(folder, world_size, documents=None, *, _changes=changes, **settings):
            return plan_with_layout(folder, world_size, documents, _changes, **settings)

        train_tiny_module.make_plan = make_changed_plan
        forget_hpz_group()
        results.append(train_tiny(session, folder, {"zero_stage": 3, "batch_size": 2} | settings))
    return results


def forget_hpz_group():
    """Forget DeepSpeed's global hpZ group, because several engines are built in a process."""
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


HPZ, OFFLOAD = {"hpz_partition_size": 2}, {"offload_param": "cpu"}
CHECKPOINTED = {"gradient_checkpointing": True}
# Name of a group -> quantisation of its base, number of ranks, and the runs that these ranks train
# one after the other: settings, and values of the layout.
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
    "nf4": (NF4, 2, [({}, OFFLOAD), ({}, {})]),
    "nf4, 4 ranks": (NF4, 4, [({}, HPZ), ({}, HPZ | OFFLOAD)]),
}  # fmt: skip
RUNS = [(name, index) for name, (*_, runs) in GROUPS.items() for index in range(len(runs))]


@pytest.fixture(scope="module")
def results_of(tiny_model, tmp_path_factory):
    """Function: name of a group -> the results of its runs; the ranks start once."""
    runs_of_groups = {
        name: (world_size, [(quantisation | settings, changes) for settings, changes in runs])
        for name, (quantisation, world_size, runs) in GROUPS.items()
    }
    return run_groups_once(runs_of_groups, train_with_layouts, tiny_model, tmp_path_factory)


@pytest.mark.parametrize(("group", "index"), RUNS)
def test_losses_gradients_and_weights_equal_those_of_one_rank_without_sharding(
    tiny_model, tmp_path, results_of, group, index
):
    quantisation, *_ = GROUPS[group]
    assert_same(results_of(group)[index], reference(tiny_model, tmp_path, quantisation))


def restore_unchanged(session, folder, settings, changes):
    """Losses of continued training, and of training after the same state is restored."""
    forget_hpz_group()
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


def restore_each(session, folder, quantisations, changes):
    settings = {"zero_stage": 3, "batch_size": 2, "bf16": True}
    return [
        restore_unchanged(session, folder, settings | quantisation, changes)
        for quantisation in quantisations
    ]


@pytest.mark.parametrize(("world_size", "changes"), [(4, HPZ), (2, OFFLOAD)])
def test_the_adapter_is_gathered_and_restored_exactly(tiny_model, tmp_path, world_size, changes):
    arguments = (restore_each, tiny_model, [{}, NF4], changes)
    for continued, again in run_ranks(*arguments, tmp_path=tmp_path, world_size=world_size)[0]:
        assert again == continued


def watch_gathers(session, folder, settings, changes):
    """Peak of gathered elements, elements gathered for a micro-batch, and the plan's prediction."""
    plan, engine = build(session, folder, settings, changes)
    parameters = engine.deepspeed.module.parameters()
    base = [p for p in parameters if not p.requires_grad and not p.ds_persist]
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
    gathered = []  # elements a micro-batch, by step
    for step in range(3):
        watch.total = 0
        batches, supervised = batches_of_step(plan, Documents(), step, session.placement.rank)
        if step == 2:  # the peak includes an evaluation and a step after it
            engine.evaluate(batches[0].batch)
        engine.optimizer_step(batches, supervised, 1e-3)
        gathered.append(watch.total / len(batches))
    coordinator.fetch_sub_module, coordinator.release_sub_module = fetch, release
    # In step 0, DeepSpeed records the order of the modules and does not prefetch.
    return watch.peak, gathered[1], gathers(plan.shape, plan.settings)


class GatherWatch:
    """Gathered elements of the base: their peak, and the sum of all gathers."""

    def __init__(self, base):
        self.base, self.before, self.peak, self.total = base, set(), 0, 0

    def update(self):
        """Count the parameters that were gathered since the last call."""
        live = {p.ds_id: p.ds_numel for p in self.base if p.ds_status != NOT_GATHERED}
        self.peak = max(self.peak, sum(live.values()))
        self.total += sum(size for key, size in live.items() if key not in self.before)
        self.before = set(live)


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """A model of eight layers with an untied head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIG, "num_hidden_layers", 8)
        return make_model(tmp_path_factory.mktemp("deep") / "model", tied=False)


# Settings, and values of the layout, of the runs whose gathers are counted.
WATCHED = [({}, {}), (CHECKPOINTED, {}), (CHECKPOINTED, {"checkpointed_layers": 4}), (NF4, {})]


def watch_each(session, folder, runs):
    common = {"zero_stage": 3, "batch_size": 4, "lora_r": 2}
    return [
        watch_gathers(session, folder, common | settings, changes) for settings, changes in runs
    ]


@pytest.fixture(scope="module")
def watched(deep_model, tmp_path_factory):
    """Results of `watch_gathers` for the runs of WATCHED; the ranks start once."""
    return run_ranks(watch_each, deep_model, WATCHED, tmp_path=tmp_path_factory.mktemp("w"))[0]


@pytest.mark.parametrize("index", range(len(WATCHED)))
def test_zero3_gathers_the_planned_elements_and_each_decoder_layer_twice(watched, index):
    """`planned.block` and `planned.head` are the elements of a decoder layer and of the head."""
    peak, gathered, planned = watched[index]
    assert planned.head < peak <= planned.peak < 4 * planned.block
    # In the forward and in the backward pass: eight layers, and the embedding or the head, which
    # are equally large.
    pass_elements = 8 * planned.block + planned.head
    assert 2 * pass_elements - planned.block < gathered <= 2 * pass_elements
