"""At ZeRO-3 a base is sharded while it is loaded, and never whole on any rank."""

import os

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, core_model_loading

from pipeline.errors import UserError
from pipeline.model.base import load_base
from pipeline.model.sharded_loading import sharded_while_loading
from pipeline.plan.cost.memory import base_bytes
from pipeline.train.live_bytes import LiveBytes
from tests.messages import assert_mentions
from tests.model.kinds import KINDS
from tests.model.models import cache_shape
from tests.ranks import run_groups_once, run_ranks
from tests.tiny import CONFIG, make_model, make_plan

pytestmark = pytest.mark.engine

BF16, NF4 = {"bf16": True}, {"bf16": True, "load_in_4bit": True}
CASES = {
    "fp32": {},
    "bf16": BF16,
    "nf4": NF4,
    "nf4 without double quantisation": NF4 | {"bnb_4bit_use_double_quant": False},
    "fp4 in bf16 storage": NF4
    | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
}


def tensors_of(model):
    """Name -> (class of a parameter, its values and quantisation constants)."""
    tensors = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        constants = state.as_dict() if state else {}
        if state:  # a bias has none
            assert state is model.get_submodule(name.rpartition(".")[0]).quant_state
        tensors[name] = (type(parameter), {"values": parameter.detach().clone()} | constants)
    tensors |= {name: (torch.Tensor, {"values": x.clone()}) for name, x in model.named_buffers()}
    return tensors


def loaded_whole_and_sharded(session, folder, cases):
    results = []
    for settings in cases:
        ranks = session.placement.world_size
        whole = load_base(make_plan(folder, ranks, 40, zero_stage=2, **settings), session.device)
        sharded = load_base(make_plan(folder, ranks, 40, zero_stage=3, **settings), session.device)
        assert all(parameter.numel() == 0 for parameter in sharded.parameters())
        with GatheredParameters(list(sharded.parameters())):
            results.append((tensors_of(whole), tensors_of(sharded)))
    return results


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Function: name of a group of runs -> on rank 0, the base of each case, loaded in two ways."""
    folder = make_model(tmp_path_factory.mktemp("untied") / "model", tied=False)
    groups = {"4 ranks": (4, list(CASES.values()))}
    return run_groups_once(groups, loaded_whole_and_sharded, folder, tmp_path_factory)


@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_a_base_sharded_by_four_ranks_is_bitwise_the_base_loaded_whole(loaded, number):
    whole, sharded = loaded("4 ranks")[number]
    assert sharded.keys() == whole.keys()
    for name, (kind, tensors) in whole.items():
        assert sharded[name][0] is kind
        assert sharded[name][1].keys() == tensors.keys()
        for key, value in tensors.items():
            assert content(sharded[name][1][key]) == content(value), f"{name}: {key}"


@pytest.mark.parametrize("difference", [0, 1])
def test_a_head_that_the_config_ties_is_tied_only_if_its_values_are_equal(tmp_path, difference):
    """Some programs train a tied pair separately, and save both. transformers then loads both."""
    folder = make_model(tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += difference  # in the shard of the last rank, which has padding
    save_file(tensors | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    arguments = (loaded_whole_and_sharded, folder, [{"global_batch_size": 9}])
    ((whole, sharded),) = run_ranks(*arguments, tmp_path=tmp_path, world_size=3)[0]
    assert ("lm_head.weight" in whole) == bool(difference)
    assert sharded.keys() == whole.keys()
    for name, (_, tensors) in whole.items():
        assert torch.equal(sharded[name][1]["values"], tensors["values"]), name


def content(value):
    """The bytes of a tensor, because packed values may look like NaN; else the value itself."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.dtype, value.shape, value.reshape(-1).view(torch.uint8).tolist()


def loading_peaks(session, folder, cases):
    """Measured and predicted peak bytes while this rank loads the base, and the whole base's."""
    peaks = []
    for settings in cases:
        plan = make_plan(folder, session.placement.world_size, 40, zero_stage=3, **settings)
        with LiveBytes() as live:
            load_base(plan, session.device)
        whole = base_bytes(plan.shape, plan.settings, plan.training_dtype)
        peaks.append((live.peak, plan.memory.loading_tensor_bytes, whole))
    return peaks


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """A model whose largest parameter is small compared with the base, as in a large model."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"hidden_size": 256, "intermediate_size": 512}.items():
            patch.setitem(CONFIG, key, value)
        patch.setitem(CONFIG, "num_hidden_layers", 12)
        return make_model(tmp_path_factory.mktemp("deep") / "model", tied=False, dtype="bfloat16")


def test_no_rank_ever_holds_the_whole_base_and_the_predicted_memory_suffices(deep_model, tmp_path):
    arguments = (loading_peaks, deep_model, [BF16, NF4])
    for by_rank in zip(*run_ranks(*arguments, tmp_path=tmp_path, world_size=4), strict=True):
        for peak, predicted, whole in by_rank:
            assert 0.9 * predicted < peak <= 1.05 * predicted < 0.5 * whole


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """A model of two blocks whose largest parameters are those of an MLP, which follow another."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"hidden_size": 256, "intermediate_size": 2048}.items():
            patch.setitem(CONFIG, key, value)
        return make_model(tmp_path_factory.mktemp("wide") / "model", dtype="bfloat16")


def test_a_rank_holds_at_most_two_parameters_beside_its_shard(wide_model, tmp_path):
    arguments = (loading_peaks, wide_model, [BF16, NF4])
    for by_rank in zip(*run_ranks(*arguments, tmp_path=tmp_path, world_size=4), strict=True):
        for peak, predicted, _ in by_rank:
            assert peak <= 1.05 * predicted


@pytest.fixture(scope="module")
def embedded_model(tmp_path_factory):
    """A model whose largest parameter is outside its blocks: the embeddings of all blocks."""
    folder = tmp_path_factory.mktemp("embedded") / "model"
    model_type, keys = KINDS["gemma3n_text"]
    config = AutoConfig.for_model(model_type, **keys | {"vocab_size_per_layer_input": 2**15})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    cache_shape(folder)
    return folder


def test_large_embeddings_of_the_blocks_are_predicted(embedded_model, tmp_path):
    arguments = (loading_peaks, embedded_model, [BF16])
    for by_rank in zip(*run_ranks(*arguments, tmp_path=tmp_path, world_size=4), strict=True):
        for peak, predicted, _ in by_rank:
            assert 0.9 * predicted < peak <= 1.05 * predicted


def variable_set_while_loading(session, folder):
    with sharded_while_loading(make_plan(folder, 1, 40, zero_stage=3), session.device):
        os.environ["SET_WHILE_LOADING"] = "1"
    return os.environ.get("SET_WHILE_LOADING")


def test_loading_keeps_environment_variables_that_are_set_meanwhile(tiny_model, tmp_path):
    arguments = (variable_set_while_loading, tiny_model)
    assert run_ranks(*arguments, tmp_path=tmp_path, world_size=1) == ["1"]


def refusal_if_rank_1_cannot_read(session, folder):
    if session.placement.rank == 1:

        def fail(*arguments):
            raise OSError("input/output error")

        core_model_loading._materialize_copy = fail
    with pytest.raises(UserError) as caught:
        load_base(make_plan(folder, 2, 40, zero_stage=3), session.device)
    return str(caught.value)


def test_an_error_of_the_rank_that_reads_a_parameter_is_raised_on_all(tiny_model, tmp_path):
    messages = run_ranks(refusal_if_rank_1_cannot_read, tiny_model, tmp_path=tmp_path)
    assert messages[0] == messages[1]
    assert_mentions(messages[0], tiny_model, "input/output error", "weight")
