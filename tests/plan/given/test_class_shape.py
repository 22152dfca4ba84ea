"""Shapes that are derived from a model class, for model types without a table of formulas.

For the types of the table of families (plan/given/families.py) the formulas and the count must be
equal. A count builds the class without weights, in a separate process, and is cached in a file.
"""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoConfig

from pipeline.model import class_shape as class_count
from pipeline.model.small_copy import small_copies
from pipeline.plan.cost import activations
from pipeline.plan.given import class_shape as shape_cache
from pipeline.plan.given import torch_process
from pipeline.plan.given.families import FAMILIES
from pipeline.plan.given.layout import Layout, SequenceProfile
from pipeline.plan.given.shape import read_shape
from pipeline.plan.render import plan_json
from tests.messages import assert_mentions, refused
from tests.model.kinds import VISION, small
from tests.model.models import make_own_code
from tests.models.kinds import ALL
from tests.plan.given.test_shape import EXPERTS, SMALL, save_config
from tests.tiny import make_plan

pytestmark = pytest.mark.tensor

WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64,
        "moe_intermediate_size": 256, "shared_expert_intermediate_size": 512}  # fmt: skip
MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "head_dim": None,
}  # fmt: skip
# Model types that the table of families does not have -> keys of a small config.json.
UNKNOWN = {
    "olmo2": {},
    "granite": {},
    "cohere2": {},
    "glm4": {},
    "gpt_oss": EXPERTS,
    "deepseek_v3": MLA,
    "gemma4_text": EXPERTS | {  # full attention has another head width
        "num_experts": 4, "top_k_experts": 2, "num_experts_per_tok": None, "enable_moe_block": True,
        "moe_intermediate_size": 64, "head_dim": 16, "global_head_dim": 32, "num_hidden_layers": 6,
        "num_global_key_value_heads": 1, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
    "qwen3_next": EXPERTS | {
        "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
        "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
}  # fmt: skip


def write(folder, model_type, changes):
    """Write a small config.json with these changes; None removes a key."""
    keys = {key: value for key, value in (SMALL | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(keys | {"model_type": model_type}))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Use an empty cache, and count classes in this process, which is faster."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RANKZERO_CACHE", str(folder))
    monkeypatch.setattr(shape_cache, "_count_in_subprocess", class_count.shape_or_reason)
    return folder


@pytest.fixture
def remove_family(monkeypatch):
    """Function that removes a model type from the table of families, so that it is counted."""

    def remove(model_type):
        others = {name: family for name, family in FAMILIES.items() if name != model_type}
        monkeypatch.setattr("pipeline.plan.given.shape.FAMILIES", others)

    return remove


def sizes_of_linears(shape):
    return {
        name: (linear.d_in, linear.d_out, linear.has_bias) for name, linear in shape.linears.items()
    }


def adaptability_of_linears(shape):
    """For each block, name of a linear layer -> whether it can be adapted; in any order."""
    return [{each.name: each.is_adaptable for each in block.linears} for block in shape.blocks]


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_the_count_on_the_class_equals_the_formulas_of_the_table(
    tmp_path, remove_family, model_type
):
    save_config(tmp_path, model_type, WIDE)
    by_formulas = read_shape(str(tmp_path))
    remove_family(model_type)
    counted = read_shape(str(tmp_path))
    assert counted.is_from_class
    for name in ("parameters", "layers_name", "layer_kinds", "vocab_size", "is_tied",
                 "has_head_bias", "required_vocab_size", "quantised_parameters",
                 "num_experts"):  # fmt: skip
        assert getattr(counted, name) == getattr(by_formulas, name), name
    assert sizes_of_linears(counted) == sizes_of_linears(by_formulas)
    assert counted.other_parameters == 0
    for name in ("num_heads", "num_kv_heads", "head_dim", "norm_kind", "num_norms",
                 "experts", "experts_per_token"):  # fmt: skip
        counted_value = getattr(counted.blocks[0], name)
        assert counted_value == getattr(by_formulas.blocks[0], name), name
    assert adaptability_of_linears(counted) == adaptability_of_linears(by_formulas)


def saved_bytes(folder, remove_family, model_type, dtype):
    """Bytes that a block saves for backward: by the formulas, and derived from the class."""
    save_config(folder, model_type, WIDE)
    one_layer = read_shape(str(folder)).default_targets[:1]
    plan = make_plan(folder, lora_r=4, packing=False, lora_target_modules=one_layer)
    # The count does not materialise soft-capped scores either.
    settings = plan.settings.model_copy(update={"use_flash_attention": True})
    layout = Layout(
        zero_stage=2, micro_batch_size=1, accumulation_steps=1, checkpointed_layers=0, nodes=1,
        ranks_per_node=1, training_dtype=dtype,
    )  # fmt: skip

    def saved(shape):
        profile = SequenceProfile(tokens=64)
        needed = activations.activations(shape, settings, layout, plan.hardware, profile)
        return needed.blocks[0].saved

    by_formulas = saved(plan.shape)
    remove_family(model_type)
    return by_formulas, saved(read_shape(str(folder)))


# The formulas of these families are above the count, and above measured peaks (docs/memory.md).
OVERESTIMATED = ["mixtral", "phi3", "qwen2_moe", "qwen3_moe"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() - OVERESTIMATED))
def test_saved_bytes_derived_from_the_class_equal_those_of_the_formulas(
    tmp_path, remove_family, model_type, dtype
):
    by_formulas, counted = saved_bytes(tmp_path, remove_family, model_type, dtype)
    assert counted == pytest.approx(by_formulas, rel=0.04)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model_type", OVERESTIMATED)
def test_saved_bytes_derived_from_the_class_are_at_most_20_percent_below_the_formulas(
    tmp_path, remove_family, model_type, dtype
):
    by_formulas, counted = saved_bytes(tmp_path, remove_family, model_type, dtype)
    assert 0.8 * by_formulas < counted <= by_formulas


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_every_parameter_of_a_class_outside_the_table_is_counted(tmp_path, model_type):
    write(tmp_path, model_type, UNKNOWN[model_type])
    shape, model = read_shape(str(tmp_path)), class_count._build(tmp_path, trust_remote_code=False)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    modules = dict(model.named_modules())
    for name, linear in shape.linears.items():
        assert tuple(modules[name].weight.shape) == (linear.d_out, linear.d_in)
    num_kinds_of_blocks = {"deepseek_v3": 2, "qwen3_next": 2, "gemma4_text": 2}
    assert len(shape.blocks) == num_kinds_of_blocks.get(model_type, 1)
    # A router that is a linear layer is counted in `linears` and in `router_parameters`, so that
    # the number of other parameters may be negative.
    assert all(block.other_parameters >= -block.router_parameters for block in shape.blocks)
    assert all(block.saved[0] > 0 for block in shape.blocks)


def shape_of_kind(folder, kind):
    """The shape counted for a small config of tests/models/kinds.py."""
    model_type, keys = ALL[kind]
    AutoConfig.for_model(model_type, **keys).save_pretrained(folder)
    return read_shape(str(folder))


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        ("lfm2", 128),  # its last layer is w2
        ("starcoder2", 128),  # c_proj
        ("granitemoeshared", 64),  # output_linear, of the shared expert
    ],
)
def test_the_inner_width_of_an_mlp_is_read_from_its_last_layer(tmp_path, kind, width):
    shape = shape_of_kind(tmp_path, kind)
    assert [block.intermediate_size for block in shape.blocks] == [width] * len(shape.blocks)


@pytest.mark.parametrize(("kind", "num_hidden_states"), [("gemma3n_text", 4), ("olmo2", 1)])
def test_the_input_of_a_block_may_be_several_hidden_states(tmp_path, kind, num_hidden_states):
    """Checkpointing saves all of them."""
    for block in shape_of_kind(tmp_path, kind).blocks:
        assert block.input_width == num_hidden_states * block.hidden_size


@pytest.mark.parametrize(
    ("kind", "uncalled_layers"),
    [
        ("gemma3n_text", {"correction_coefs", "prediction_coefs"}),  # one is clamped in place
        ("mamba", {"x_proj", "dt_proj", "out_proj"}),
        ("jamba", {"dt_proj", "out_proj"}),
        ("nemotron_h", {"out_proj"}),
        ("lfm2", set()),  # its out_proj is called
    ],
)
def test_layers_whose_weight_is_read_directly_are_neither_adapted_nor_quantised(
    tmp_path, kind, uncalled_layers
):
    """Their module is not called, so that neither an adapter nor bitsandbytes would have effect."""
    shape = shape_of_kind(tmp_path, kind)
    uncalled = [linear for linear in shape.linears.values() if not linear.is_called]
    assert {linear.name.rsplit(".", 1)[-1] for linear in uncalled} == uncalled_layers
    assert not uncalled_layers & set(shape.default_targets)
    num_weights = sum(linear.weights for linear in shape.linears.values())
    num_uncalled = sum(linear.weights for linear in uncalled)
    assert shape.quantised_parameters == num_weights - num_uncalled
    for name in uncalled_layers:
        with refused(name, "lora_target_modules", *shape.default_targets):
            shape.targeted([name])


def test_a_weight_that_blocks_share_counts_once_as_quantised(tmp_path):
    """The layer is marked as quantised in every block, also in blocks that do not call it.

    In Zamba 2 each block calls another part of the shared layers.
    """
    shape = shape_of_kind(tmp_path, "zamba2/shared")
    model = class_count._build(tmp_path, trust_remote_code=False)
    modules = dict(model.named_modules())
    shared = [linear for name, linear in shape.linears.items() if "shared_transformer" in name]
    assert {linear.is_quantised for linear in shared} == {True}
    assert {linear.is_called for linear in shared} == {True, False}
    num_weights_by_tensor = {
        id(modules[name].weight): linear.weights
        for name, linear in shape.linears.items()
        if linear.is_quantised
    }
    assert shape.quantised_parameters == sum(num_weights_by_tensor.values())


def test_a_3d_tensor_without_the_name_or_class_of_experts_does_not_count_as_experts(
    tmp_path,
):
    shape = shape_of_kind(tmp_path, "recurrent_gemma")  # its gates are (heads, width, width)
    assert (shape.num_experts, shape.expert_parameters) == (0, 0)


def test_a_class_whose_blocks_read_token_ids_is_counted(tmp_path):
    """Gemma 4 has an embedding in each block (per-layer embeddings)."""
    shape = shape_of_kind(tmp_path, "gemma4_text/ple+shared")
    assert all(block.saved[0] > 0 for block in shape.blocks)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("deepseek_v32", "DeepseekV32Indexer"),
        ("glm_moe_dsa", "GlmMoeDsaIndexer"),
        ("deepseek_v4", "DeepseekV4CSACompressor"),
        ("gpt2", "Conv1D"),
        ("falcon", "attention"),
        ("bloom", "BloomAttention"),
        ("rwkv", "RwkvSelfAttention"),
        ("jetmoe", "expert_size.tolist()"),
        ("modernbert-decoder", "GradientCheckpointingLayer"),
    ],
)
def test_a_class_that_cannot_be_trained_is_refused_with_the_reason(tmp_path, kind, reason):
    with refused(reason, "config.json"):
        shape_of_kind(tmp_path, kind)


def test_a_class_that_needs_a_missing_package_is_refused_until_the_package_is_there(tmp_path):
    """Gemma 3n's vision tower needs timm, which is not installed here."""
    AutoConfig.for_model("gemma3n").save_pretrained(tmp_path)
    with refused("config.json", "transformers", "TimmWrapperModel", "pip install timm"):
        read_shape(str(tmp_path))
    assert not shape_cache.shape_file(tmp_path).is_file()


def test_a_cached_reason_has_no_path(tmp_path):
    """Two folders with the same config.json share the cached reason; a message has its own path."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        AutoConfig.for_model("gpt2", n_layer=2, n_embd=64, n_head=4).save_pretrained(folder)
        with refused(folder / "config.json", "Conv1D") as error:
            read_shape(str(folder))
    assert str(first) not in str(error.value)
    assert str(tmp_path) not in shape_cache.shape_file(first).read_text()


def test_a_layer_that_peft_renames_when_it_loads_an_adapter_is_not_a_target(tmp_path):
    """Laguna's conversion table also matches the names of its own class."""
    shape = shape_of_kind(tmp_path, "laguna")
    assert shape.default_targets == ["q_proj", "k_proj", "v_proj", "o_proj", "g_proj"]
    with refused("up_proj", "peft"):
        shape.targeted(["up_proj"])


def test_a_vision_tower_that_computes_attention_itself_does_not_make_blocks_mix_documents(tmp_path):
    """Blocks of a decoder keep documents separate only if transformers computes their attention."""
    assert shape_of_kind(tmp_path, "got_ocr2").separate_blocks == 4


def test_an_encoder_decoder_is_refused_with_the_entry_of_its_config(tmp_path):
    AutoConfig.for_model("bart", d_model=64, vocab_size=259).save_pretrained(tmp_path)
    with refused("encoder-decoder", "is_encoder_decoder: true", "config.json"):
        read_shape(str(tmp_path))


def test_a_class_whose_forward_pass_fails_without_weights_is_refused_with_the_source_line(tmp_path):
    keys = {"num_layers": 2, "num_hidden_layers": 4, "n_routed_experts": 4, "hidden_size": 64}
    AutoConfig.for_model("longcat_flash", **keys).save_pretrained(tmp_path)
    with refused("modeling_longcat_flash.py:", "forward pass", "config.json"):
        read_shape(str(tmp_path))


def test_a_class_with_blocks_that_are_not_called_for_text_is_refused(tmp_path):
    AutoConfig.for_model(
        "mllama",
        text_config=small(cross_attention_layers=[1]),
        vision_config={
            **VISION, "vision_output_dim": 64, "num_global_layers": 2, "attention_heads": 2,
            "intermediate_layers_indices": [0, 1], "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
    ).save_pretrained(tmp_path)  # fmt: skip
    with refused("1 of its 4 blocks", "1 (MllamaCrossAttentionDecoderLayer)", "config.json"):
        read_shape(str(tmp_path))


def test_layers_of_a_tower_inside_the_decoder_do_not_count_as_blocks(tmp_path):
    next(small_copies(AutoConfig.for_model("phi4_multimodal"))).save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    assert shape.num_layers == shape.separate_blocks == 4
    assert not [name for name in shape.linears if "img" in name or "encoder" in name]


def test_the_shape_of_a_model_with_its_own_code_is_derived_only_if_its_code_is_trusted(tmp_path):
    folder = make_own_code(tmp_path / "model")
    shape = read_shape(str(folder), trust_remote_code=True)
    assert shape.is_from_class
    assert (shape.num_layers, len(shape.linears)) == (4, 28)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - of transformers
        class_count.derive_shape(folder)
    assert re.search(r"own_code|trust_remote_code", str(error.value))


def test_a_plan_of_an_unchecked_class_has_the_command_that_checks_it(tmp_path):
    """A check trains a small copy of the class; its result is the `proof` of the plan."""
    write(tmp_path, "olmo2", {})
    plan = make_plan(tmp_path)
    [rule] = [rule for rule in plan.rules if rule.id == "class-not-proven"]
    assert_mentions(rule.message, "olmo2", "rankzero preflight")
    assert plan.proof is None
    assert plan_json(plan)["proof"] is None


def test_a_cached_shape_is_not_derived_again(tmp_path, monkeypatch):
    write(tmp_path, "olmo2", {})
    counted = read_shape(str(tmp_path))
    assert shape_cache.shape_file(tmp_path).is_file()
    monkeypatch.setattr(shape_cache, "_count_in_subprocess", None)
    assert read_shape(str(tmp_path)) == counted


def test_the_cache_file_depends_on_config_json_and_package_versions(tmp_path, monkeypatch):
    write(tmp_path, "olmo2", {})
    path = shape_cache.shape_file(tmp_path)
    write(tmp_path, "olmo2", {"num_hidden_layers": 3})
    assert shape_cache.shape_file(tmp_path) != path
    write(tmp_path, "olmo2", {})
    assert shape_cache.shape_file(tmp_path) == path
    monkeypatch.setattr(torch_process, "package_version", lambda package: "9")
    assert shape_cache.shape_file(tmp_path) != path


def test_a_shape_is_derived_again_if_its_cache_file_is_damaged(tmp_path):
    write(tmp_path, "olmo2", {})
    counted = read_shape(str(tmp_path))
    shape_cache.shape_file(tmp_path).write_text("{")
    assert read_shape(str(tmp_path)) == counted
    assert json.loads(shape_cache.shape_file(tmp_path).read_text())


def test_ranks_that_start_together_count_a_class_once(tmp_path, monkeypatch):
    write(tmp_path, "olmo2", {})
    counted_folders = []

    def count(folder, **options):
        counted_folders.append(folder)
        time.sleep(0.2)  # until the other ranks have started
        return {"layers_name": "model.layers"}

    monkeypatch.setattr(shape_cache, "_count_in_subprocess", count)
    with ThreadPoolExecutor(4) as ranks:
        shapes = list(ranks.map(shape_cache.class_shape, [tmp_path] * 4))
    assert len(counted_folders) == 1
    assert shapes == [{"layers_name": "model.layers"}] * 4


def test_without_a_cache_that_can_be_written_every_process_counts(tmp_path, monkeypatch):
    write(tmp_path, "olmo2", {})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RANKZERO_CACHE", str(tmp_path / "file"))
    assert read_shape(str(tmp_path)).num_layers == SMALL["num_hidden_layers"]


@pytest.fixture
def in_separate_process(tmp_path, monkeypatch):
    """Undo the change of the fixture `cache` by which classes are counted in this process."""
    monkeypatch.undo()
    monkeypatch.setenv("RANKZERO_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("in_separate_process")
def test_the_reason_of_a_refused_class_is_cached(tmp_path, monkeypatch):
    with refused("GlmMoeDsaIndexer"):
        shape_of_kind(tmp_path, "glm_moe_dsa")
    monkeypatch.setattr(shape_cache, "_count_in_subprocess", None)
    with refused("GlmMoeDsaIndexer", "config.json"):
        read_shape(str(tmp_path))


def test_without_torch_the_message_has_the_command_that_counts_and_the_path_for_its_result(
    tmp_path, monkeypatch
):
    write(tmp_path, "olmo2", {})
    versions = {"torch": None}
    monkeypatch.setattr(shape_cache, "package_version", lambda package: versions.get(package, "1"))
    with refused(f"python -m pipeline.model.class_shape {tmp_path}",
                 shape_cache.shape_file(tmp_path)):  # fmt: skip
        read_shape(str(tmp_path))


@pytest.mark.usefixtures("in_separate_process")
@pytest.mark.parametrize(
    ("model_type", "reason"), [("no_such_model", "no_such_model"), ("t5", "is_encoder_decoder")]
)
def test_a_class_without_a_derivable_shape_is_refused_with_the_reason(tmp_path, model_type, reason):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with refused("config.json", reason):
        read_shape(str(tmp_path))


@pytest.mark.usefixtures("in_separate_process")
def test_a_count_in_a_separate_process_equals_one_in_this_process(tmp_path):
    write(tmp_path, "olmo2", {})
    assert shape_cache.class_shape(tmp_path) == class_count.derive_shape(tmp_path)


def test_experts_per_token_are_read_from_the_key_of_the_class(tmp_path):
    """Gemma 4 has top_k_experts instead of num_experts_per_tok, and blocks of two kinds."""
    write(tmp_path, "gemma4_text", UNKNOWN["gemma4_text"])
    sliding, full = read_shape(str(tmp_path)).blocks
    assert (sliding.experts_per_token, full.experts_per_token) == (2, 2)
    assert (sliding.num_kv_heads, sliding.head_dim) == (2, 16)
    assert (full.num_kv_heads, full.head_dim) == (1, 32)


@pytest.mark.parametrize(
    ("kind", "module_class"),
    [("qwen3_next", "Qwen3NextGatedDeltaNet"), ("lfm2", "Lfm2ShortConv"), ("mamba", "MambaMixer")],
)
def test_sequence_parallelism_is_refused_with_the_class_of_modules_that_mix_tokens_otherwise(
    tmp_path, kind, module_class
):
    """Only attention of transformers can be split over ranks; these modules are recurrent."""
    shape_of_kind(tmp_path, kind)
    with refused("sequence_parallel_size", module_class, "of 4 blocks", "rule split-blocks"):
        make_plan(tmp_path, 2, sequence_parallel_size=2)
    make_plan(tmp_path, 2, sequence_parallel_size=1)
