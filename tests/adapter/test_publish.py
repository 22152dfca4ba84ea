"""A published adapter folder loads in plain peft; a failed publication keeps the previous one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.adapter import publish
from pipeline.adapter.publish import adapter_config, check_servable, publish_adapter
from pipeline.data.chat.encoder import chat_template_of
from pipeline.errors import RankZeroError
from pipeline.model.adapter import attach_adapter, expected_shapes, trainable
from pipeline.model.fingerprint import base_fingerprint
from tests.messages import assert_mentions, refused
from tests.tiny import make_plan

pytestmark = pytest.mark.tensor

IDS = torch.arange(3, 43).reshape(2, 20)  # token ids of two sequences, whose logits are compared


@pytest.fixture(scope="module")
def plan(tiny_model):
    return make_plan(tiny_model)


@pytest.fixture(scope="module")
def trained(tiny_model, plan):
    """The tensors of an adapter, none of them zero, and the logits of the model with it in memory.

    Tests that use only the tensors take them from the fixture `trained_tensors`.
    """
    model = attach_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), plan).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.1)
        logits = model(IDS).logits
    tensors = {key: p.detach().clone() for key, p in trainable(model).items()}
    return tensors, logits


@pytest.fixture
def trained_tensors(trained):
    return trained[0]


def write_adapter(plan, tensors, folder):
    base = base_fingerprint(plan.settings.model_folder)
    publish_adapter(plan, tensors, folder, step=7, base=base)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_has_the_chat_template_of_the_run_not_of_the_base(
    tiny_model, trained_tensors, tmp_path
):
    plan = make_plan(tiny_model, chat_template="chatml")
    write_adapter(plan, trained_tensors, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert tokenizer.chat_template == chat_template_of(plan.settings)
    assert tokenizer.chat_template != AutoTokenizer.from_pretrained(tiny_model).chat_template


@pytest.fixture
def published(plan, trained_tensors, tmp_path):
    """The folder of the published adapter."""
    write_adapter(plan, trained_tensors, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_plain_peft_gives_the_logits_of_the_trained_model(tiny_model, published, trained):
    _, logits = trained
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    loaded = PeftModel.from_pretrained(base, published).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, logits)


def test_plain_peft_gives_equal_logits_in_bf16_and_close_ones_by_default(tiny_model, tmp_path):
    plan = make_plan(tiny_model, bf16=True)

    def base():
        return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)

    model = attach_adapter(base(), plan).eval()
    torch.manual_seed(1)
    # The optimizer's fp32 copies of the bf16 parameters; an adapter is published from them.
    masters = {key: 0.03 * torch.randn(shape) for key, shape in expected_shapes(plan).items()}
    with torch.no_grad():
        for key, parameter in trainable(model).items():
            parameter.copy_(masters[key])
        logits = model(IDS).logits
        write_adapter(plan, masters, tmp_path / "adapter")
        in_bf16 = PeftModel.from_pretrained(
            base(), tmp_path / "adapter", autocast_adapter_dtype=False
        )
        assert torch.equal(in_bf16.eval()(IDS).logits, logits)
        by_default = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()(IDS).logits
    assert (by_default - logits).float().norm() < 0.01 * logits.float().norm()


def test_the_folder_has_config_tokenizer_and_card(tiny_model, published, plan):
    config = json.loads((published / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["inference_mode"] is True
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert config["target_modules"] == sorted(plan.settings.lora_target_modules)
    assert PeftConfig.from_pretrained(published).target_modules == set(config["target_modules"])
    tokenizer = AutoTokenizer.from_pretrained(published)
    original = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer("some text").input_ids == original("some text").input_ids
    assert tokenizer.chat_template == original.chat_template
    card = (published / "README.md").read_text()
    assert card.startswith("---\nbase_model: ")
    assert "library_name: peft" in card
    assert "| steps | 7 |" in card
    assert "train.jsonl" in card
    assert not {"config.json", "model.safetensors"} & contents(published).keys()


def test_the_card_names_trained_end_tokens_at_which_generation_does_not_stop(
    plan, trained_tensors, tmp_path
):
    count = {"rows": 3, "tokens": 4, "first": "train.jsonl:2", "is_last": True}
    (tmp_path / "data").mkdir()
    audit = {"train": {"ends_without_stop": {"<|eot|> (9)": count}}}
    (tmp_path / "data" / "audit.json").write_text(json.dumps(audit))
    write_adapter(plan, trained_tensors, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert_mentions(card, "<|eot|> (9)", "3 rows", "eos_token_id", "generation_config.json")


@pytest.mark.parametrize("targets", ["all-linear", r".*layers\.1\..*\.(q|v)_proj"])
def test_target_modules_are_published_as_names(tiny_model, targets, tmp_path):
    plan = make_plan(tiny_model, lora_target_modules=targets)
    tensors = {key: torch.ones(shape) for key, shape in expected_shapes(plan).items()}
    write_adapter(plan, tensors, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert trainable(loaded).keys() == tensors.keys()


def test_a_second_adapter_replaces_the_first(plan, trained_tensors, published):
    before = contents(published)
    doubled = {key: 2 * tensor for key, tensor in trained_tensors.items()}
    write_adapter(plan, doubled, published)
    after = contents(published)
    assert before.keys() == after.keys()
    assert before["adapter_model.safetensors"] != after["adapter_model.safetensors"]
    assert [path.name for path in published.parent.iterdir()] == ["adapter"]


# Failures of a publication: each patches a function or changes the tensors, which are returned.


def untrained(tensors, monkeypatch):
    del monkeypatch
    return {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in tensors.items()}


def badly_written(tensors, monkeypatch):
    save = publish.save_file

    def save_half(weights, path, metadata):
        save(weights, path, metadata)
        path.write_bytes(path.read_bytes()[:-4])

    monkeypatch.setattr(publish, "save_file", save_half)
    return tensors


def disk_full(tensors, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish, "copy_files", fail)
    return tensors


def other_config(tensors, monkeypatch):
    write = publish.dump_json
    monkeypatch.setattr(publish, "dump_json", lambda values: write(values | {"r": 1}))
    return tensors


@pytest.mark.parametrize("failure", [untrained, badly_written, disk_full, other_config])
def test_a_failure_keeps_the_previous_adapter(
    plan, trained_tensors, published, monkeypatch, failure
):
    before = contents(published)
    with pytest.raises(RankZeroError):
        write_adapter(plan, failure(trained_tensors, monkeypatch), published)
    assert contents(published) == before
    assert [path.name for path in published.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("new_name", [".adapter.old", "adapter"])
def test_a_kill_at_a_rename_keeps_the_previous_adapter(
    plan, trained_tensors, published, monkeypatch, new_name
):
    """The previous adapter is renamed to .adapter.old, and then the new one to adapter.

    A KeyboardInterrupt replaces the kill; the folder is copied as a real kill leaves it.
    """
    before = contents(published)
    left_by_kill = published.parent / "left"
    rename = Path.rename

    def rename_until_killed(self, target):
        if Path(target).name == new_name:
            monkeypatch.setattr(Path, "rename", rename)
            shutil.copytree(published.parent, left_by_kill)
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_until_killed)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(plan, trained_tensors, published)
    assert contents(published) == before
    # In the folder that a kill leaves, the next publication fails, and restores the first adapter.
    monkeypatch.setattr(publish, "verify_adapter_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_adapter(plan, trained_tensors, left_by_kill / "adapter")
    assert contents(left_by_kill / "adapter") == before
    assert [path.name for path in left_by_kill.iterdir()] == ["adapter"]


HEAD = "base_model.model.lm_head.weight"
# Name -> function that changes the tensors, changes of the config, and facts of the message.
UNSERVABLE = {
    "prefix": (
        lambda t: {key.removeprefix("base_model."): v for key, v in t.items()},
        {},
        ["model.layers"],
    ),
    "not LoRA": (lambda t: t | {HEAD: torch.ones(1, 1)}, {}, [HEAD]),
    "r": (lambda t: t, {"r": 2}, [4, 2, "adapter_config.json"]),
    "dtypes": (lambda t: t | {min(t): t[min(t)].bfloat16()}, {}, ["bfloat16", "float32"]),
}


@pytest.mark.parametrize("name", UNSERVABLE)
def test_an_adapter_that_serving_engines_reject_is_refused(plan, trained_tensors, name):
    change, config, facts = UNSERVABLE[name]
    with refused(*facts, error=RankZeroError):
        check_servable(change(trained_tensors), adapter_config(plan.settings) | config)
