"""hpZ, parameter offload and limits of live parameters do not change the numbers."""

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from pipeline.adapter.gather import OptimizerState, gather_moments, gather_weights, restore
from pipeline.model.adapter import attach_adapter
from pipeline.model.base import load_base
from pipeline.plan.cost.gathers import gathers
from pipeline.train.engine import Engine
from tests import train_tiny as tiny
from tests.adapter.test_gather import MORE, STEPS, train_steps
from tests.plans import with_layout
from tests.ranks import run_ranks
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


def train_changed(session, folder, settings, changes):
    def make(folder, world_size, documents=None, **settings):
        return changed_plan(folder, world_size, documents, changes, **settings)

    tiny.make_plan = make
    return train_tiny(session, folder, settings)


HPZ, OFFLOAD = {"hpz_partition_size": 2}, {"offload_param": "cpu"}
CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("kind", "world_size", "settings", "changes"),
    [
        ({}, 4, {"batch_size": 2}, HPZ),
        ({}, 4, {"batch_size": 1} | CHECKPOINTED, HPZ),
        (NF4, 4, {"batch_size": 2}, HPZ),
        ({}, 2, {"batch_size": 2}, OFFLOAD),
        ({}, 2, {"batch_size": 2} | CHECKPOINTED, OFFLOAD),
        (NF4, 2, {"batch_size": 2}, OFFLOAD),
        (NF4, 4, {"batch_size": 2}, HPZ | OFFLOAD),
        (NF4, 2, {"batch_size": 2}, {"loads_through_host": True}),
        ({}, 2, {"batch_size": 2} | CHECKPOINTED, {"checkpointed_layers": 1}),
        ({}, 2, {"batch_size": 2, "zero_stage": 2} | CHECKPOINTED, {"checkpointed_layers": 1}),
    ],
)
def test_losses_gradients_and_weights_equal_those_of_the_reference(
    tiny_model, tmp_path, kind, world_size, settings, changes
):
    expected = reference(tiny_model, tmp_path, kind)
    settings = {"zero_stage": 3} | kind | settings
    arguments = (train_changed, tiny_model, settings, changes)
    results = run_ranks(*arguments, tmp_path=tmp_path, world_size=world_size)
    assert_same(results[0], expected)


def restore_unchanged(session, folder, settings, changes):
    """Losses of continued training, and of training after the same state is restored."""
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


@pytest.mark.parametrize(("world_size", "changes"), [(4, HPZ), (2, OFFLOAD)])
@pytest.mark.parametrize("kind", [{}, NF4], ids=["lora", "nf4"])
def test_the_adapter_is_gathered_and_restored_exactly(
    tiny_model, tmp_path, kind, world_size, changes
):
    settings = kind | {"zero_stage": 3, "batch_size": 2, "bf16": True}
    continued, again = run_ranks(
        restore_unchanged, tiny_model, settings, changes, tmp_path=tmp_path, world_size=world_size
    )[0]
    assert again == continued


def watch_gathers(session, folder, settings, changes):
    """Peak of gathered elements, elements gathered in step 2, and the plan's prediction."""
    plan, engine = build(session, folder, settings, changes)
    modules = engine.deepspeed.module.parameters()
    base = [p for p in modules if not p.requires_grad and not p.ds_persist]
    watch = GatherWatch(base)
    fetch, release = (
        PartitionedParameterCoordinator.fetch_sub_module,
        (PartitionedParameterCoordinator.release_sub_module),
    )

    def fetch_and_update(self, *arguments, **named):
        fetch(self, *arguments, **named)
        watch.update()

    def release_and_update(self, *arguments, **named):
        release(self, *arguments, **named)
        watch.update()

    PartitionedParameterCoordinator.fetch_sub_module = fetch_and_update
    PartitionedParameterCoordinator.release_sub_module = release_and_update
    gathered = []
    for step in range(4):
        watch.total = 0
        batches, supervised = work(plan, Documents(), step, session.placement.rank)
        if step == 3:
            engine.evaluate(batches[0].batch)
        engine.optimizer_step(batches, supervised, 1e-3)
        gathered.append(watch.total / len(batches))
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


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {}),
        (CHECKPOINTED, {}),
        (CHECKPOINTED, {"checkpointed_layers": 4}),
        (NF4, {}),
    ],
)
def test_zero3_gathers_the_planned_elements_and_each_block_twice(
    deep_model, tmp_path, settings, changes
):
    settings = {"zero_stage": 3, "batch_size": 2, "lora_r": 2} | settings
    most, gathered, planned = run_ranks(
        watch_gathers, deep_model, settings, changes, tmp_path=tmp_path
    )[0]
    assert planned.head < most <= planned.peak < 4 * planned.block
    once = 8 * planned.block + planned.head  # twice this includes the embedding and the head once
    assert 2 * once - planned.block < gathered <= 2 * once
