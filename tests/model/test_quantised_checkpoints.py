"""Checkpoints in mxfp4 or fp8 are loaded, sharded and merged as if they had 16 bits."""

import json

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from pipeline.adapter.publish import model_card
from pipeline.model.base import load_base, load_plain
from pipeline.model.fingerprint import Fingerprint
from pipeline.model.quantised_files import checkpoint_files
from pipeline.plan.given.shape import read_shape
from tests.adapter.merged import merge_adapter, tensors
from tests.messages import refused
from tests.model.kinds import QUANTISED_CHECKPOINTS
from tests.model.models import cache_shape
from tests.model.quantised_checkpoints import make_quantised_checkpoint
from tests.ranks import run_ranks
from tests.tiny import make_plan, make_tokenizer

pytestmark = pytest.mark.engine

CONFIGS = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}


@pytest.fixture(scope="module", params=QUANTISED_CHECKPOINTS)
def quantised(request, tmp_path_factory):
    """The folder of a model in mxfp4 or fp8."""
    folder = make_quantised_checkpoint(
        request.param, tmp_path_factory.mktemp("quantised") / "model"
    )
    make_tokenizer().save_pretrained(folder)
    cache_shape(folder)
    return folder


def dequantised_by_transformers(folder):
    """The parameters by name."""
    method = read_shape(str(folder)).quantization
    config = CONFIGS[method](dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config
    )
    return dict(model.named_parameters())


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("name", QUANTISED_CHECKPOINTS)
def test_a_quantised_checkpoint_is_loaded_as_transformers_dequantises_it(tmp_path, name):
    folder = make_quantised_checkpoint(name, tmp_path, block=(8, 16))  # only whole blocks
    model = load_plain(folder, dtype=torch.bfloat16)
    assert_equal(dict(model.named_parameters()), dequantised_by_transformers(folder))
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("block", [(48, 32), (1, 10**6), (10**6, 10**6)])
def test_fp8_values_are_multiplied_with_the_scales_of_their_blocks(tmp_path, block):
    """A matrix of 64 rows has a smaller last block of 16; a block may also be a whole row."""
    folder = make_quantised_checkpoint("deepseek_v3/fp8", tmp_path, block=block)
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    name = "model.layers.1.self_attn.o_proj.weight"
    values, scales = stored[name], stored[f"{name}_scale_inv"]
    rows = torch.arange(values.shape[0]) // block[0]
    columns = torch.arange(values.shape[1]) // block[1]
    expected = (values.float() * scales[rows[:, None], columns]).bfloat16()
    assert len(expected.unique()) > 100  # the weight is not trivial
    loaded = load_plain(folder, dtype=torch.bfloat16).get_parameter(name)
    assert torch.equal(loaded, expected)


def test_the_card_of_an_adapter_loads_a_quantised_base_dequantised(quantised):
    plan = make_plan(quantised, 1, 40)
    card = model_card(plan, 1, Fingerprint({}))
    name = CONFIGS[plan.shape.quantization].__name__
    assert f"AutoTokenizer, {name}\n" in card
    assert f"quantization_config={name}(dequantize=True)" in card


def gathered_base(session, folder, changes):
    base = load_base(make_plan(folder, 2, 40, bf16=False, **changes), session.device)
    with GatheredParameters([p for p in base.parameters() if hasattr(p, "ds_id")]):
        return {name: weight.detach().clone() for name, weight in base.named_parameters()}


def test_a_quantised_checkpoint_that_is_sharded_while_it_loads_has_the_same_weights(
    quantised, tmp_path
):
    expected = dict(load_plain(quantised, dtype=torch.float32).named_parameters())
    for loaded in run_ranks(gathered_base, quantised, {"zero_stage": 3}, tmp_path=tmp_path):
        assert_equal(loaded, expected)


def test_a_checkpoint_in_mxfp4_or_fp8_can_be_loaded_in_4_bits(quantised):
    plan = make_plan(quantised, 1, 40, load_in_4bit=True)
    model = load_base(plan, torch.device("cpu"))
    in_4_bits = {n for n, p in model.named_parameters() if hasattr(p, "quant_state")}
    names = {f"{name}.weight" for name, x in plan.shape.linears.items() if x.is_quantised}
    assert in_4_bits == names


def test_a_merge_into_a_quantised_base_equals_a_merge_into_its_dequantised_copy(
    quantised, tmp_path
):
    model = load_plain(quantised, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    adapter = make_adapter(model, tmp_path / "adapter")
    for base, out in ((quantised, "merged"), (tmp_path / "plain", "expected")):
        merge_adapter(base, adapter, tmp_path / out)
    assert_equal(tensors(tmp_path / "merged"), tensors(tmp_path / "expected"))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    loaded = load_plain(tmp_path / "merged", dtype=torch.bfloat16)
    changed = dict(loaded.named_parameters())
    before = dict(load_plain(quantised, dtype=torch.bfloat16).named_parameters())
    assert [n for n in changed if not torch.equal(changed[n], before[n])]


def make_adapter(model, folder):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["o_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", QUANTISED_CHECKPOINTS)
def test_quantised_values_without_scales_are_refused(tmp_path, name):
    folder = make_quantised_checkpoint(name, tmp_path)
    path = min(folder.glob("*.safetensors"))
    stored = load_file(path)
    scales = next(key for key in stored if "_scale" in key)
    del stored[scales]
    save_file(stored, path, metadata={"format": "pt"})
    with refused(scales, tmp_path, "download"):
        checkpoint_files(folder)


def test_scales_that_do_not_fit_their_blocks_are_refused(tmp_path):
    folder = make_quantised_checkpoint("deepseek_v3/fp8", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [16, 16]
    (folder / "config.json").write_text(json.dumps(config))
    with refused("weight_block_size", "(16, 16)", "_proj.weight"):
        checkpoint_files(folder)


@pytest.mark.parametrize("size", [128, [128], [0, 32], "12", [48, 32, 1]])
def test_a_block_size_that_is_not_two_positive_integers_is_refused(tmp_path, size):
    folder = make_quantised_checkpoint("deepseek_v3/fp8", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = size
    (folder / "config.json").write_text(json.dumps(config))
    with refused("weight_block_size", size, folder / "config.json"):
        checkpoint_files(folder)


def test_scales_with_fewer_dimensions_than_their_weight_are_refused(tmp_path):
    folder = make_quantised_checkpoint("deepseek_v3/fp8", tmp_path)
    for path in folder.glob("*.safetensors"):
        flat = {k: t.flatten() if "_scale" in k else t for k, t in load_file(path).items()}
        save_file(flat, path, metadata={"format": "pt"})
    with refused("_proj.weight", "weight_block_size"):
        checkpoint_files(folder)


def test_weights_in_another_quantised_format_are_refused(tmp_path):
    """For example two fp4 values in a byte: loaded as they are, they would be wrong weights."""
    folder = make_quantised_checkpoint("deepseek_v3/fp8", tmp_path)
    path = min(folder.glob("*.safetensors"))
    stored = load_file(path)
    fp8_key = next(key for key in stored if stored[key].dtype == torch.float8_e4m3fn)
    stored[fp8_key] = stored[fp8_key].view(torch.int8)
    save_file(stored, path, metadata={"format": "pt"})
    with refused(f"{fp8_key}_scale_inv", "fp8", "16-bit"):
        checkpoint_files(folder)


def test_quantised_experts_of_another_shape_are_refused(tmp_path):
    folder = make_quantised_checkpoint("gpt_oss/mxfp4", tmp_path)
    for path in folder.glob("*.safetensors"):
        stored = load_file(path)
        changed = {k: t[..., :8].contiguous() if k.endswith("_blocks") else t
                  for k, t in stored.items()}  # fmt: skip
        save_file(changed, path, metadata={"format": "pt"})
    with refused("_blocks", "16 bytes"):
        checkpoint_files(folder)
