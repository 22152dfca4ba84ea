"""A run that starts from an adapter has its outputs; an adapter that does not fit is refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.adapter.adapter_file import read_adapter
from pipeline.adapter.initial import (
    RECORD,
    initial_adapter_of,
    record_initial_adapter,
    require_startable,
)
from pipeline.adapter.initial_weights import initial_weights
from pipeline.adapter.publish import publish_adapter
from pipeline.adapter.trained_on import TRAINED_ON, adapter_sha256
from pipeline.files import read_json
from pipeline.model.adapter import attach_adapter, expected_shapes, trainable
from pipeline.model.fingerprint import base_fingerprint
from tests.adapter.merged import edit_json
from tests.messages import assert_mentions, refused
from tests.tiny import make_model, make_plan

pytestmark = pytest.mark.tensor

IDS = torch.arange(3, 43).reshape(2, 20)  # token ids of two sequences, whose logits are compared


def publish(plan, folder):
    """Publish an adapter of this plan with random matrices."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        key: 0.1 * torch.randn(shape, generator=generator)
        for key, shape in expected_shapes(plan).items()
    }
    publish_adapter(
        plan, tensors, folder, step=7, base=base_fingerprint(plan.settings.model_folder)
    )
    return folder


@pytest.fixture(scope="module")
def first(tiny_model, tmp_path_factory):
    """The adapter of a first run: r 4, alpha 8."""
    return publish(make_plan(tiny_model), tmp_path_factory.mktemp("first") / "adapter")


@pytest.fixture
def copied(first, tmp_path):
    """A copy of the adapter `first`, which a test may change."""
    return shutil.copytree(first, tmp_path / "adapter")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("settings", [
    {},
    {"lora_r": 8, "init_adapter_resize": True},
    {"lora_r": 6, "lora_alpha": 3.0, "use_rslora": True, "init_adapter_resize": True},
    {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3.0}, "init_adapter_resize": True},
])  # fmt: skip
def test_outputs_at_step_0_equal_those_of_the_adapter(tiny_model, first, settings):
    plan = make_plan(tiny_model, init_adapter=str(first), **settings)
    require_startable(plan)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = logits(PeftModel.from_pretrained(base, first))
    model = attach_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), plan)
    untrained = logits(model)
    parameters = trainable(model)
    initial_values = {key: p.detach().clone() for key, p in parameters.items()}
    weights = initial_weights(read_adapter(first), plan, initial_values)
    assert weights.keys() == parameters.keys()
    for key, parameter in parameters.items():
        parameter.data = weights[key]
    assert (logits(model) - expected).norm() < 1e-6 * expected.norm()
    assert (untrained - expected).norm() > 0.1 * expected.norm()
    # Rows of A beyond the r of the adapter have the initial values of a new run.
    larger = [key for key, t in weights.items() if t.shape[0] > 4 and key.endswith("A.weight")]
    assert all(torch.equal(weights[key][4:], initial_values[key][4:]) for key in larger)


def test_a_dora_run_starts_from_a_smaller_dora_adapter_with_its_outputs(tiny_model, tmp_path):
    first = publish(make_plan(tiny_model, use_dora=True), tmp_path / "adapter")
    settings = {"init_adapter": str(first), "lora_r": 6, "init_adapter_resize": True}
    plan = make_plan(tiny_model, use_dora=True, **settings)
    require_startable(plan)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = logits(PeftModel.from_pretrained(base, first))
    model = attach_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), plan)
    parameters = trainable(model)
    initial_values = {key: p.detach().clone() for key, p in parameters.items()}
    for key, value in initial_weights(read_adapter(first), plan, initial_values).items():
        parameters[key].data = value
    assert (logits(model) - expected).norm() < 1e-6 * expected.norm()
    with refused("init_adapter", "magnitude", "use_dora: true"):
        require_startable(make_plan(tiny_model, **settings))


def test_missing_r_and_alpha_have_the_defaults_of_peft(tiny_model, tmp_path):
    settings = {"lora_r": 8, "lora_alpha": 8.0}
    first = publish(make_plan(tiny_model, **settings), tmp_path / "adapter")
    config = read_json(first / "adapter_config.json")
    for key in ("r", "lora_alpha"):
        del config[key]
    (first / "adapter_config.json").write_text(json.dumps(config))
    require_startable(make_plan(tiny_model, init_adapter=str(first), **settings))


def test_magnitudes_are_read_under_the_key_of_older_versions_of_peft(tiny_model, tmp_path):
    first = publish(make_plan(tiny_model, use_dora=True), tmp_path / "adapter")
    stored = load_file(first / "adapter_model.safetensors")
    magnitude = "lora_magnitude_vector"
    save_file(
        {key.replace(magnitude, f"{magnitude}.weight"): value for key, value in stored.items()},
        first / "adapter_model.safetensors",
    )
    plan = make_plan(tiny_model, use_dora=True, init_adapter=str(first))
    require_startable(plan)
    weights = initial_weights(read_adapter(first), plan, stored)
    for key, value in stored.items():
        assert torch.equal(weights[key], value), key


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_values_that_are_not_finite_is_refused(tiny_model, copied, value):
    path = copied / "adapter_model.safetensors"
    stored = load_file(path)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    stored[key][0, 0] = value
    save_file(stored, path)
    plan = make_plan(tiny_model, init_adapter=str(copied))
    with refused("init_adapter", path, key, "not finite"):
        initial_weights(read_adapter(copied), plan, stored)


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", f"1{400 * '0'}"])
def test_an_alpha_that_is_not_finite_is_refused(tiny_model, copied, alpha):
    config = copied / "adapter_config.json"
    text = json.dumps(json.loads(config.read_text()) | {"lora_alpha": "@"})
    config.write_text(text.replace('"@"', alpha))
    plan = make_plan(tiny_model, init_adapter=str(copied), init_adapter_resize=True)
    with refused("init_adapter", config, "lora_alpha"):
        require_startable(plan)


# Settings of a run that starts from the adapter `first`, and facts of the message. That adapter has
# r 4, alpha 8, and seven modules in each of two layers.
REFUSED = {
    "r": ({"lora_r": 8}, ["r 4", "r 8", "init_adapter_resize"]),
    "smaller": ({"lora_r": 2, "init_adapter_resize": True}, ["r 4", "r 2", "lora_r: 4"]),
    "alpha": ({"lora_alpha": 4.0}, ["scaled by 2", "by 1", "lora_alpha: 8"]),
    "rslora": ({"use_rslora": True, "lora_alpha": 8.0}, ["scaled by 2", "by 4"]),
    "fewer": (
        {"lora_target_modules": ["q_proj"]},
        ["12 only in the adapter", "lora_target_modules"],
    ),
    "dora": ({"use_dora": True}, ["magnitude", "use_dora: false"]),
    "more": ({"layers_to_transform": [0]}, ["7 only in the adapter", "layers.1"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_differs_from_the_run_file_is_refused(tiny_model, first, name):
    settings, facts = REFUSED[name]
    with refused("init_adapter", *facts):
        require_startable(make_plan(tiny_model, init_adapter=str(first), **settings))


def test_the_patterns_of_an_adapter_are_in_the_message(tiny_model, tmp_path):
    pattern = {r"layers\.1\..*q_proj": 2}
    plan = make_plan(tiny_model, rank_pattern=pattern)
    adapter = publish(plan, tmp_path / "ranks")
    with refused("lora_r: 4", f"rank_pattern: {json.dumps(pattern)}"):
        require_startable(make_plan(tiny_model, init_adapter=str(adapter)))
    require_startable(make_plan(tiny_model, init_adapter=str(adapter), rank_pattern=pattern))
    plan = make_plan(tiny_model, alpha_pattern={"v_proj": 3.0})
    adapter = publish(plan, tmp_path / "alphas")
    with refused("lora_alpha: 8", 'alpha_pattern: {"v_proj": 3.0}'):
        require_startable(make_plan(tiny_model, init_adapter=str(adapter)))


# Functions that damage the folder of an adapter, and return facts of the message.


def change_sizes(folder):
    (folder / TRAINED_ON).unlink()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[4,64]', b'"shape":[8,32]'))
    return ["down_proj", "(8, 32)"]


def use_dora_config(folder):
    edit_json(folder / "adapter_config.json", use_dora=True)
    return ["magnitude"]


def pickle_only(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return ["adapter_model.bin", "pickle", "save_pretrained"]


def null_alpha(folder):
    edit_json(folder / "adapter_config.json", lora_alpha=None)
    return ["adapter_config.json", "lora_alpha", "null"]


def text_r(folder):
    edit_json(folder / "adapter_config.json", r="4")
    return ["adapter_config.json", "r is", "integer"]


def no_kind(folder):
    edit_json(folder / "adapter_config.json", peft_type=None)
    return ["adapter_config.json", "peft_type"]


def remove_folder(folder):
    shutil.rmtree(folder)
    return ["neither a folder nor a hub adapter"]


def remove_config(folder):
    (folder / "adapter_config.json").unlink()
    return ["adapter_config.json"]


@pytest.mark.parametrize(
    "damage",
    [
        change_sizes, use_dora_config, pickle_only, null_alpha, text_r, no_kind, remove_folder,
        remove_config,
    ],
)  # fmt: skip
def test_a_folder_that_is_not_a_usable_adapter_is_refused(tiny_model, copied, damage):
    facts = damage(copied)
    with refused("init_adapter", *facts):
        require_startable(make_plan(tiny_model, init_adapter=str(copied)))


def test_a_base_of_other_content_is_refused_unless_it_is_accepted(first, tmp_path):
    other = make_model(tmp_path / "other", dtype="bfloat16")
    with refused("init_adapter", "tensors differ", "accept_changes"):
        require_startable(make_plan(other, init_adapter=str(first)))
    require_startable(make_plan(other, init_adapter=str(first), accept_changes=["base"]))


def test_a_hub_name_is_resolved_to_its_folder_in_the_cache(
    tiny_model, first, tmp_path, monkeypatch
):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    plan = make_plan(tiny_model, init_adapter="org/adapter")
    with refused("init_adapter", "hf download org/adapter"):
        require_startable(plan)
    repository = tmp_path / "hub" / "models--org--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    shutil.copytree(first, repository / "snapshots" / "0123")
    require_startable(plan)


def test_all_earlier_adapters_are_in_the_record_and_on_the_card(tiny_model, first, tmp_path):
    second_run, third_run = tmp_path / "second", tmp_path / "third"
    for run, initial_adapter in ((second_run, first), (third_run, second_run / "adapter")):
        run.mkdir()
        plan = make_plan(tiny_model, init_adapter=str(initial_adapter))
        record_initial_adapter(run, plan.settings)
        publish(plan, run / "adapter")
    record = read_json(third_run / "adapter" / TRAINED_ON)["started_from"]
    assert record["adapter"] == str(second_run / "adapter")
    assert record["sha256"] == adapter_sha256(second_run / "adapter")
    assert record["started_from"]["adapter"] == str(first)
    assert "started_from" not in record["started_from"]
    assert record["base"] == str(tiny_model)
    card = (third_run / "adapter" / "README.md").read_text()
    assert_mentions(card, second_run / "adapter", first, "started from")
    # The record of the start is used even if the folder has changed or is missing.
    shutil.rmtree(second_run)
    assert initial_adapter_of(third_run, plan.settings) == json.loads(
        (third_run / RECORD).read_text()
    )


def test_a_run_starts_from_the_trained_embeddings_of_an_adapter(tiny_model, tmp_path):
    plan = make_plan(tiny_model, modules_to_save=["embed_tokens"])
    adapter = publish(plan, tmp_path / "adapter")
    expected = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    )
    plan = make_plan(tiny_model, modules_to_save=["lm_head"], init_adapter=str(adapter))
    require_startable(plan)
    model = attach_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), plan)
    parameters = trainable(model)
    weights = initial_weights(read_adapter(adapter), plan, parameters)
    assert weights.keys() == parameters.keys()
    for key, parameter in parameters.items():
        parameter.data = weights[key]
    assert (logits(model) - expected).norm() < 1e-6 * expected.norm()


def test_an_adapter_with_other_fully_trained_modules_is_refused(tiny_model, first, tmp_path):
    saved = publish(make_plan(tiny_model, modules_to_save=["embed_tokens"]), tmp_path / "saved")
    with refused("init_adapter", "modules_to_save: [lm_head, model.embed_tokens]"):
        require_startable(make_plan(tiny_model, init_adapter=str(saved)))
    with refused("init_adapter", "modules_to_save: []"):
        require_startable(
            make_plan(tiny_model, init_adapter=str(first), modules_to_save=["lm_head"])
        )


def test_untied_copies_of_a_tied_pair_are_refused(tiny_model, tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=["embed_tokens"]
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    model.save_pretrained(tmp_path / "untied")
    plan = make_plan(
        tiny_model, init_adapter=str(tmp_path / "untied"), modules_to_save=["embed_tokens"]
    )
    with refused("init_adapter", "ensure_weight_tying", "merge"):
        require_startable(plan)


def test_an_adapter_that_also_replaces_base_weights_is_refused(tiny_model, tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=["input_layernorm"]
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    model.save_pretrained(tmp_path / "saved")
    plan = make_plan(tiny_model, init_adapter=str(tmp_path / "saved"))
    with refused("init_adapter", "input_layernorm.weight", "only embeddings and head", "merge"):
        require_startable(plan)


def test_a_run_starts_from_an_adapter_with_the_same_new_tokens(tiny_model, tmp_path):
    tokens = {"new_tokens": ["<a>", "<b>"]}
    first = publish(make_plan(tiny_model, **tokens), tmp_path / "adapter")
    plan = make_plan(tiny_model, **tokens, seed=5, init_adapter=str(first))
    require_startable(plan)
    fresh = {key: torch.zeros(shape) for key, shape in expected_shapes(plan).items()}
    weights = initial_weights(read_adapter(first), plan, fresh)
    stored = load_file(first / "adapter_model.safetensors")
    for key, weight in weights.items():
        torch.testing.assert_close(weight, stored[key])


@pytest.mark.parametrize("tokens", [[], ["<b>", "<a>"], ["<a>"], ["<a>", "<c>"]])
def test_an_adapter_with_other_new_tokens_is_refused_with_its_tokens(tiny_model, tmp_path, tokens):
    first = publish(make_plan(tiny_model, new_tokens=["<a>", "<b>"]), tmp_path / "adapter")
    with refused("init_adapter", 'new_tokens: ["<a>", "<b>"]'):
        require_startable(make_plan(tiny_model, new_tokens=tokens, init_adapter=str(first)))
