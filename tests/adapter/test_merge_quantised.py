"""Merges onto the base as training quantised it, and the check of a merge by its logits.

The check computes one decoder layer (block) at a time, so that the model need not fit in memory.
"""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.adapter.merge_plan import TrainedBase, WeightedAdapter
from pipeline.data.order.batches import Batch
from pipeline.evaluate.merge_check import (
    MergedModel,
    _difference,
    _logits,
    _quantise_and_dequantise,
)
from pipeline.model.base import Quantisation, _quantization, load_plain
from pipeline.model.checkpoint_names import model_on_meta
from pipeline.model.streamed import StreamedWeights, streamed_model
from pipeline.model.structure import blocks
from pipeline.plan.given.shape import read_shape
from tests.adapter.merged import make_adapter, merge_adapter, tensors
from tests.tiny import make_model, make_plan

pytestmark = pytest.mark.tensor

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_use_double_quant": False},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "fp4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base") / "base", dtype="bfloat16", shards=2)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (2, 20), generator=generator)
    labels = ids.clone()
    labels[:, :5] = -100
    return Batch(ids, labels, (labels.flatten() != -100).nonzero()[:, 0] - 1, ((20,), (20,)), 40)


def trained_base(base, **options):
    """The base of a run in bf16 with these settings."""
    settings = make_plan(base, load_in_8bit=False, **options).settings
    return TrainedBase(settings, "bfloat16")


def loaded_in_4bit(base, trained):
    """The model as transformers and bitsandbytes load it for training."""
    config = _quantization(trained.settings, read_shape(str(base)), torch.bfloat16)
    return load_plain(
        base, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
    )


def dequantised(layer):
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("kind", KINDS)
def test_quantising_and_dequantising_gives_bitwise_the_weights_of_training(base, kind):
    trained = trained_base(base, **KINDS[kind])
    quantisation = Quantisation(
        settings=trained.settings, shape=read_shape(str(base)), dtype=torch.bfloat16
    )
    model = loaded_in_4bit(base, trained)
    layers = {n: each for n, each in model.named_modules() if isinstance(each, Linear4bit)}
    assert quantisation.layers(model_on_meta(base)) == layers.keys()
    for name, layer in layers.items():
        weight = tensors(base)[f"{name}.weight"]
        before = weight.clone()
        quantisation.round_trip(weight)
        assert torch.equal(weight, dequantised(layer)), name
        assert not torch.equal(weight, before)


def test_parts_of_a_weight_are_quantised_as_the_whole(base, monkeypatch):
    trained = trained_base(base, **KINDS["nf4-double"])
    quantisation = Quantisation(
        settings=trained.settings, shape=read_shape(str(base)), dtype=torch.bfloat16
    )
    whole = torch.randn(160, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = whole.clone()
    quantisation.round_trip(whole)
    monkeypatch.setattr("pipeline.model.base._VALUES_PER_PART", 640)
    quantisation.round_trip(parts)
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_onto_the_quantised_base_is_bitwise_that_of_peft(base, adapter, tmp_path, kind):
    trained = trained_base(base, **KINDS[kind])
    merge_adapter(base, adapter, tmp_path / "merged", onto=trained)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    for name, layer in loaded_in_4bit(base, trained).named_modules():
        if isinstance(layer, Linear4bit):
            plain.get_submodule(name).weight.data = dequantised(layer)
    by_peft = PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    merged = tensors(tmp_path / "merged")
    assert all(torch.equal(tensor, by_peft[name]) for name, tensor in merged.items())


def streamed_logits(batch, folder, adapters, transform=None):
    """Logits of a model whose weights are read block by block, and changed by `transform`."""
    causal = streamed_model(folder)
    weights = StreamedWeights(folder, causal, lambda num_bytes: None, transform)
    with torch.no_grad():
        return _logits(batch, causal, weights, adapters)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"trainable_token_indices": [7, 2]}])
def test_logits_computed_block_by_block_equal_those_of_the_whole_model(
    base, batch, tmp_path, options
):
    folder = make_adapter(base, tmp_path / "adapter", **options)
    logits = streamed_logits(batch, base, [WeightedAdapter(folder)])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model, folder)(batch.input_ids).logits
    expected = expected[:, :-1][batch.labels[:, 1:] != -100]
    assert torch.equal(logits, expected)


def test_only_the_weights_of_one_block_are_in_memory_at_a_time(base, batch):
    causal = streamed_model(base)
    loaded = []

    def record_loaded_blocks(module, arguments):
        loaded.append([any(not p.is_meta for p in block.parameters()) for block in blocks(causal)])

    weights = StreamedWeights(base, causal, lambda size: None, None)
    with weights.attached(causal), torch.no_grad():
        for block in blocks(causal):
            block.mlp.register_forward_pre_hook(record_loaded_blocks)
        causal(batch.input_ids)
    assert loaded == [[True, False], [False, True]]
    assert all(parameter.is_meta for parameter in causal.parameters())


def test_logits_of_a_merge_are_nearest_to_the_adapter_on_the_base_of_that_merge(
    base, adapter, batch, tmp_path
):
    """The base of a merge is the original one, or the one that was quantised and dequantised."""
    trained = trained_base(base, **KINDS["nf4-double"])
    differences = {}  # (base of the merge, base that carries the adapter) -> differences
    for name, onto in (("original", None), ("dequantized", trained)):
        merged = tmp_path / name
        merge_adapter(base, adapter, merged, onto=onto)
        merged_model = MergedModel(
            folder=merged, base=base, adapters=[WeightedAdapter(adapter)], trained=trained
        )
        logits = streamed_logits(batch, merged, ())
        for base_name, transform in (
            ("original", None),
            ("dequantized", _quantise_and_dequantise(merged_model)),
        ):
            expected = streamed_logits(batch, base, merged_model.adapters, transform)
            difference = _difference(logits, expected, batch.labels[:, 5:].flatten())
            differences[name, base_name] = difference
    for name, other in (("original", "dequantized"), ("dequantized", "original")):
        for key in ("relative", "mean_logit", "largest_logit", "kl"):
            assert differences[name, name][key] < 0.3 * differences[name, other][key], key


def test_equal_logits_have_no_difference():
    logits = torch.randn(5, 9)
    measured = _difference(logits, copy.deepcopy(logits), torch.arange(5))
    assert {measured[key] for key in ("relative", "mean_logit", "largest_logit", "kl")} == {0.0}
