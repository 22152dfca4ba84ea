"""Every option of an adapter is merged bitwise as peft merges it in a model of the same dtype."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pipeline.adapter.merge import merge_adapters
from pipeline.adapter.merge_plan import MergeOptions, WeightedAdapter
from tests.adapter.merged import (
    SEVEN_PROJECTIONS,
    contents,
    edit_json,
    merge_adapter,
    tensors,
)
from tests.messages import refused
from tests.tiny import make_model

pytestmark = pytest.mark.tensor

BASE_TOKENS = 259  # vocabulary of the Llama bases; adapters add rows for tokens 259 and 260
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LLAMA = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 8},
        "alpha_pattern": {"v_proj": 1.5},
    },
    "dora": {"use_dora": True},
    "dora-rslora": {"rank_pattern": {"o_proj": 2}, "use_rslora": True, "use_dora": True},
    "some-layers": {"layers_to_transform": [1]},
    "saved-modules": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "tokens": {"trainable_token_indices": [3, 5, BASE_TOKENS - 1]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding-dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "no-initial-values": {"init_lora_weights": None},
    "parameters": {
        "target_modules": ["o_proj"],
        "target_parameters": ["self_attn.q_proj.weight", "embed_tokens.weight"],
        "rank_pattern": {"self_attn.q_proj.weight": 2},
        "alpha_pattern": {"q_proj.weight": 3},
    },
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "unused-config": {"loftq_config": {"loftq_bits": 4}},  # init_lora_weights is not loftq
}
GPT2 = {
    "transposed": {"target_modules": ["c_attn", "c_proj"]},
    "transposed-dora": {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
    "parameters": {"target_modules": [], "target_parameters": ["c_attn.weight"]},
    "all-biases": {"target_modules": ["c_attn", "c_proj"], "bias": "all"},
    "lora-biases": {"target_modules": ["c_attn"], "bias": "lora_only"},
    "bias-of-b": {"target_modules": ["c_attn", "c_fc"], "lora_bias": True, "use_rslora": True},
    "patterns-of-biases": {
        "target_modules": ["c_attn", "c_fc"], "lora_bias": True,
        "rank_pattern": {"c_attn": 2}, "alpha_pattern": {"c_fc": 1.5},
    },
    "both-biases": {"target_modules": ["c_attn"], "lora_bias": True, "bias": "all"},
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder with the base models of all tests."""
    folder = tmp_path_factory.mktemp("bases")
    for dtype in DTYPES:
        name = str(DTYPES[dtype]).removeprefix("torch.")
        make_model(folder / f"llama-{dtype}", tied=False, dtype=name, shards=2)
        torch.manual_seed(0)
        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        model = GPT2LMHeadModel(config).to(DTYPES[dtype])
        model.save_pretrained(folder / f"gpt2-{dtype}")
    make_model(folder / "tied", tied=True)
    return folder


def make_adapter(base, folder, seed=1, **options):
    """Save an adapter with random values in every tensor that peft trains."""
    options = {"r": 4, "lora_alpha": 10, "target_modules": list(SEVEN_PROJECTIONS)} | options
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(base_model, LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base, adapter, dtype=None):
    """State dict of peft's merged model, for a base loaded in a dtype."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or "auto")
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def require_merged_as_by_peft(base, folder, **options):
    """Merge an adapter with these options, and compare the result with peft's."""
    adapter = make_adapter(base, folder / "adapter", **options)
    merge_adapter(base, adapter, folder / "merged")
    require_equal(folder / "merged", merged_by_peft(base, adapter), base)


def require_equal(folder, by_peft, base):
    """Check that merged tensors in a folder equal peft's bitwise, and some differ from the base.

    `by_peft`: the state dict of peft's merged model.
    """
    merged, before = tensors(folder), tensors(base)
    for name, tensor in merged.items():
        assert tensor.dtype == by_peft[name].dtype, name
        assert torch.equal(tensor, by_peft[name]), name
    assert any(not torch.equal(merged[name].float(), before[name].float()) for name in merged)


@pytest.mark.parametrize(("name", "dtype"), [
    *((name, "BF16") for name in LLAMA),
    *((name, "F16") for name in ("plain", "dora", "embedding")),
    *((name, "F32") for name in ("plain", "dora-rslora", "saved-modules")),
])  # fmt: skip
def test_an_option_is_merged_bitwise_as_by_peft(bases, tmp_path, name, dtype):
    require_merged_as_by_peft(bases / f"llama-{dtype}", tmp_path, **LLAMA[name])


@pytest.mark.parametrize(("name", "dtype"), [
    *((name, "BF16") for name in GPT2),
    ("both-biases", "F16"),
    ("transposed-dora", "F32"),
])  # fmt: skip
def test_transposed_layers_and_biases_are_merged_bitwise_as_by_peft(bases, tmp_path, name, dtype):
    require_merged_as_by_peft(bases / f"gpt2-{dtype}", tmp_path, **GPT2[name])


@pytest.mark.parametrize(("stored", "dtype"), [("F32", "BF16"), ("BF16", "F32"), ("F32", "F16")])
def test_a_merge_in_another_dtype_equals_peft_on_a_base_loaded_in_it(
    bases, tmp_path, stored, dtype
):
    base = bases / f"llama-{stored}"
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    merge_adapter(base, adapter, tmp_path / "merged", dtype=dtype)
    require_equal(tmp_path / "merged", merged_by_peft(base, adapter, DTYPES[dtype]), base)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert loaded.dtype == DTYPES[dtype]


@pytest.mark.parametrize(("dtype", "options"), [
    ("BF16", {}), ("F32", {"use_rslora": True}), ("BF16", {"use_dora": True}),
])  # fmt: skip
def test_several_adapters_are_merged_bitwise_as_by_peft(bases, tmp_path, options, dtype):
    base = bases / f"llama-{dtype}"
    weights = {"first": 0.7, "second": -0.4}
    if options.get("use_dora"):  # DoRA has no meaning with another weight than 1
        weights = {"first": 1.0, "second": 1.0}
    targets = {"first": SEVEN_PROJECTIONS, "second": ("q_proj", "down_proj")}
    for seed, name in enumerate(weights):
        targets_and_r = {"r": 4 + 2 * seed, "target_modules": list(targets[name])}
        make_adapter(base, tmp_path / name, seed=seed, **targets_and_r, **options)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = PeftModel.from_pretrained(model, tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", "second")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in weights.items():
                module.set_scale(name, weight)
    by_peft = model.merge_and_unload(adapter_names=list(weights)).state_dict()
    adapters = [WeightedAdapter(tmp_path / name, weight) for name, weight in weights.items()]
    merge_adapters(base, adapters, tmp_path / "merged", MergeOptions())
    require_equal(tmp_path / "merged", by_peft, base)


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama-F32", {}), ("gpt2-F32", {"target_modules": ["c_attn"], "lora_bias": True})],
)
def test_the_changes_of_each_adapter_are_multiplied_by_its_weight_and_added(
    bases, tmp_path, name, options
):
    base = bases / name
    changes = []
    for seed in range(2):
        make_adapter(base, tmp_path / f"{seed}", seed=seed, use_rslora=bool(seed), **options)
        merge_adapter(base, tmp_path / f"{seed}", tmp_path / f"merged{seed}")
        before, after = tensors(base), tensors(tmp_path / f"merged{seed}")
        changes.append({name: after[name] - before[name] for name in before})
    adapters = [WeightedAdapter(tmp_path / "0", 2.0), WeightedAdapter(tmp_path / "1", -0.5)]
    merge_adapters(base, adapters, tmp_path / "merged", MergeOptions())
    for name, tensor in tensors(tmp_path / "merged").items():
        expected = before[name] + 2 * changes[0][name] - 0.5 * changes[1][name]
        assert torch.allclose(tensor, expected, atol=1e-5), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_undoing_a_merge_gives_the_base_within_rounding(bases, tmp_path, dtype):
    base = bases / f"gpt2-{dtype}"
    options = {"target_modules": ["c_attn", "c_proj"], "lora_bias": True}
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    merge_adapter(base, adapter, tmp_path / "merged")
    merge_adapter(tmp_path / "merged", adapter, tmp_path / "undone", is_undone=True)
    merged, undone = tensors(tmp_path / "merged"), tensors(tmp_path / "undone")
    rounding = 2 * torch.finfo(DTYPES[dtype]).eps
    for name, tensor in tensors(base).items():
        size = torch.maximum(tensor.abs(), merged[name].abs()).float()
        assert ((undone[name] - tensor).abs() <= rounding * size + 1e-7).all(), name


# Options of an adapter that replaces values, its weight, and facts of the message.
UNDEFINED = {
    "weight-of-dora": ({"use_dora": True}, 0.5, ["DoRA", "0.5"]),
    "weight-of-values": ({"modules_to_save": ["lm_head"]}, 0.5, ["lm_head.weight"]),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_a_weight_is_refused_for_values_that_replace_those_of_the_base(bases, tmp_path, name):
    options, weight, facts = UNDEFINED[name]
    adapter = make_adapter(bases / "llama-F32", tmp_path / "adapter", **options)
    adapters = [WeightedAdapter(adapter, weight)]
    with refused(*facts):
        merge_adapters(bases / "llama-F32", adapters, tmp_path / "merged", MergeOptions())


def test_two_adapters_that_replace_a_tensor_are_refused(bases, tmp_path):
    for name in ("first", "second"):
        make_adapter(bases / "llama-F32", tmp_path / name, modules_to_save=["lm_head"])
    adapters = [WeightedAdapter(tmp_path / name) for name in ("first", "second")]
    with refused(tmp_path / "first", tmp_path / "second", "lm_head.weight"):
        merge_adapters(bases / "llama-F32", adapters, tmp_path / "merged", MergeOptions())


def test_a_bias_of_b_is_refused_for_a_layer_without_a_bias(bases, tmp_path):
    adapter = make_adapter(bases / "llama-F32", tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", lora_bias=True)
    tensors_with_bias = tensors(adapter) | {
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.bias": torch.ones(64)
    }
    save_file(tensors_with_bias, adapter / "adapter_model.safetensors")
    with refused("model.layers.0.mlp.up_proj.bias", "lora_bias", "peft"):
        merge_adapter(bases / "llama-F32", adapter, tmp_path / "merged")


NOT_UNDONE = {"dora": {"use_dora": True}, "values": {"modules_to_save": ["input_layernorm"]}}


@pytest.mark.parametrize("name", NOT_UNDONE)
def test_a_merge_that_lost_values_of_the_base_cannot_be_undone(bases, tmp_path, name):
    adapter = make_adapter(bases / "llama-F32", tmp_path / "adapter", **NOT_UNDONE[name])
    merge_adapter(bases / "llama-F32", adapter, tmp_path / "merged")
    before = contents(tmp_path)
    with refused("--undo", "weight"):
        merge_adapter(tmp_path / "merged", adapter, tmp_path / "undone", is_undone=True)
    assert contents(tmp_path) == before


TIED = {
    "layer": {"target_modules": ["q_proj", "embed_tokens"]},
    "replaced": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("name", TIED)
def test_an_adapter_of_the_embedding_is_refused_if_the_head_is_tied_to_it(bases, tmp_path, name):
    adapter = make_adapter(bases / "tied", tmp_path / "adapter", **TIED[name])
    with refused("embed_tokens", "tie_word_embeddings", "merge_and_unload"):
        merge_adapter(bases / "tied", adapter, tmp_path / "merged")


def test_new_tokens_of_a_tied_base_are_merged_bitwise_as_by_peft(bases, tmp_path):
    require_merged_as_by_peft(bases / "tied", tmp_path, trainable_token_indices=[7, 2])


def test_new_tokens_of_a_tied_base_that_stores_the_head_too_are_in_both(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases / "tied", base)
    stored = tensors(base)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    require_merged_as_by_peft(base, tmp_path, trainable_token_indices=[7, 2])
    adapter = adapter_of_two_new_tokens(base, tmp_path / "added", [260, 4, 259])
    merge_adapter(base, adapter, tmp_path / "larger")
    for folder in (tmp_path / "merged", tmp_path / "larger"):
        merged = tensors(folder)
        assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def adapter_of_two_new_tokens(base, folder, indices):
    """Save an adapter that trains the rows with these indices, for the base with two more tokens.

    `indices`: those of the embeddings, or of each module with a row per token.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(BASE_TOKENS + 2, mean_resizing=False)
    config = LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=indices, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize(
    ("name", "dtype", "indices"),
    [
        ("tied", None, [260, 4, 259]),
        ("llama-BF16", None, {"embed_tokens": [259, 260, 7], "lm_head": [259, 260, 7]}),
        ("llama-BF16", "F32", {"embed_tokens": [259, 260], "lm_head": [259, 260]}),
    ],
)
def test_embedding_rows_of_new_tokens_are_merged_bitwise_as_by_peft(
    bases, tmp_path, name, dtype, indices
):
    base, merged = bases / name, tmp_path / "merged"
    adapter = adapter_of_two_new_tokens(base, tmp_path / "adapter", indices)
    merge_adapter(base, adapter, merged, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES.get(dtype, "auto"))
    model.resize_token_embeddings(BASE_TOKENS + 2, mean_resizing=False)
    by_peft = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    assert all(torch.equal(tensor, by_peft[key]) for key, tensor in tensors(merged).items())
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    assert loaded.config.vocab_size == loaded.lm_head.weight.shape[0] == BASE_TOKENS + 2


def test_embedding_rows_that_leave_a_gap_or_miss_the_head_are_refused(bases, tmp_path):
    base = bases / "llama-BF16"
    both = {"embed_tokens": [260], "lm_head": [260]}
    for indices, fact in ((both, "259"), ({"embed_tokens": [259]}, "embed_tokens")):
        adapter = adapter_of_two_new_tokens(base, tmp_path / fact, indices)
        with refused(fact, "lm_head", "merge_and_unload"):
            merge_adapter(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_tied_modules_that_stayed_tied_are_merged(bases, tmp_path):
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    require_merged_as_by_peft(bases / "tied", tmp_path, **options)


def test_transposed_layers_of_a_class_that_cannot_be_built_are_refused(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases / "gpt2-F32", base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["c_proj"])
    edit_json(base / "config.json", model_type="unheard_of")
    with refused("cannot be built", "fan_in_fan_out", "merge_and_unload"):
        merge_adapter(base, adapter, tmp_path / "merged")
