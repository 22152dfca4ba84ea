"""Merged weights equal those of peft's merge_and_unload; all other files are those of the base."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.adapter import merge_stream
from pipeline.adapter.merge_output import MARKER
from pipeline.adapter.merge_stream import MergeStream
from tests.adapter.merged import (
    CASES,
    SEVEN_PROJECTIONS,
    contents,
    edit_json,
    make_adapter,
    make_pair,
    merge_adapter,
    tensors,
)
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.tensor

IDS = torch.arange(3, 43).reshape(2, 20)  # token ids of two sequences, whose logits are compared


@pytest.fixture(scope="module")
def case_folder(tmp_path_factory):
    """Function: case -> folder with its base, adapter and merged model, built once."""
    folders = {}

    def make(case):
        if case not in folders:
            folder = make_pair(tmp_path_factory.mktemp(case), case)
            merge_adapter(folder / "base", folder / "adapter", folder / "merged")
            folders[case] = folder
        return folders[case]

    return make


@pytest.mark.parametrize("case", CASES)
def test_the_merge_equals_peft(case_folder, case):
    folder = case_folder(case)
    base, merged = tensors(folder / "base"), tensors(folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    by_peft = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().state_dict()
    assert merged.keys() == base.keys()
    for key, tensor in merged.items():
        assert tensor.dtype == base[key].dtype
        assert torch.equal(tensor, by_peft[key].to(tensor.dtype)), key
        is_adapted = key.split(".")[-2] in SEVEN_PROJECTIONS
        assert torch.equal(tensor, base[key]) != is_adapted, key


def test_other_tensors_of_any_shape_and_dtype_are_copied(pair):
    path = next((pair / "base").glob("*00001*.safetensors"))
    others = {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "flag": torch.tensor([True]),
        "codes": torch.ones(4).to(torch.float8_e4m3fn),
    }
    save_file(load_file(path) | others, path, metadata={"format": "pt"})
    index = pair / "base" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | dict.fromkeys(others, path.name))
    merge_adapter(pair / "base", pair / "adapter", pair / "merged")
    merged = tensors(pair / "merged")
    for name, tensor in others.items():
        assert merged[name].dtype == tensor.dtype
        assert torch.equal(merged[name].float(), tensor.float())


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_gives_the_logits_of_base_plus_adapter(case_folder, case):
    folder = case_folder(case)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    with torch.no_grad():
        logits, expected = merged(IDS).logits, adapted(IDS).logits
        with adapted.disable_adapter():  # the adapter has an effect
            assert (expected - adapted(IDS).logits).norm() > 0.1 * expected.norm()
    # Each merged weight is rounded once, to the dtype of the base.
    max_error = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}[CASES[case]["dtype"]]
    assert (logits - expected).norm() < max_error * expected.norm()
    stored = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert stored.dtype == getattr(torch, CASES[case]["dtype"])


@pytest.mark.parametrize("case", CASES)
def test_everything_except_the_adapted_weights_equals_the_base(case_folder, case):
    base, merged = contents(case_folder(case) / "base"), contents(case_folder(case) / "merged")
    assert merged.keys() - base.keys() == {MARKER}
    assert base.keys() <= merged.keys()
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json"} <= merged.keys()
    for name, data in base.items():
        if not name.endswith(".safetensors"):
            assert merged[name] == data, name
            continue
        with (
            safe_open(case_folder(case) / "base" / name, "pt") as old,
            safe_open(case_folder(case) / "merged" / name, "pt") as new,
        ):
            assert new.metadata() == old.metadata()
            assert new.keys() == old.keys()
    weights = [name for name in merged if name.endswith(".safetensors")]
    assert len(weights) >= CASES[case]["shards"]
    assert ("model.safetensors.index.json" in merged) == (len(weights) > 1)
    has_head = "lm_head.weight" in tensors(case_folder(case) / "merged")
    assert has_head != CASES[case]["tied"]


def test_weights_of_other_formats_and_the_readme_are_not_copied(pair):
    base = pair / "base"
    not_copied = (
        "pytorch_model.bin",
        "a.gguf",
        "pytorch_model.bin.index.json",
        "README.md",
        "x.pth",
    )
    for name in (*not_copied, "LICENSE", "modeling_own.py"):
        (base / name).write_text("text")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (base / "original").mkdir()
    (base / "original" / "consolidated.00.pth").write_text("text")
    merge_adapter(base, pair / "adapter", pair / "merged")
    merged = contents(pair / "merged")
    assert not merged.keys() & {*not_copied, "original/consolidated.00.pth"}
    assert {
        "LICENSE",
        "modeling_own.py",
        "additional_chat_templates/tool_use.jinja",
    } < merged.keys()


def test_an_adapter_in_the_folder_of_the_base_is_merged_and_not_copied(pair):
    merge_adapter(pair / "base", pair / "adapter", pair / "expected")
    shutil.copytree(pair / "adapter", pair / "base", dirs_exist_ok=True)
    merge_adapter(pair / "base", pair / "base", pair / "merged")
    assert contents(pair / "merged").keys() == contents(pair / "expected").keys()
    # transformers would add an adapter in this folder to the merged model.
    loaded = AutoModelForCausalLM.from_pretrained(pair / "merged").state_dict()
    assert loaded.keys() == tensors(pair / "expected").keys()
    for name, tensor in tensors(pair / "expected").items():
        assert torch.equal(loaded[name], tensor), name


def test_the_merged_model_has_the_chat_template_of_the_adapter(pair):
    (pair / "adapter" / "chat_template.jinja").write_text("{{ 'mine' }}")
    merge_adapter(pair / "base", pair / "adapter", pair / "merged")
    tokenizer = AutoTokenizer.from_pretrained(pair / "merged")
    assert tokenizer.chat_template == "{{ 'mine' }}"


def test_the_merged_model_has_the_tokenizer_and_the_template_with_which_the_adapter_was_trained(
    pair,
):
    """Another program may add tokens, and store the template in tokenizer_config.json only."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(pair / "adapter")
    (pair / "adapter" / "chat_template.jinja").unlink()
    edit_json(pair / "adapter" / "tokenizer_config.json", chat_template="{{ 'mine' }}")
    assert (pair / "base" / "chat_template.jinja").is_file()
    merge_adapter(pair / "base", pair / "adapter", pair / "merged")
    merged = AutoTokenizer.from_pretrained(pair / "merged")
    assert merged.chat_template == "{{ 'mine' }}"
    assert merged.encode("<tool>") == tokenizer.encode("<tool>") == [len(tokenizer) - 1]


# lora_alpha is 12 and r is 4: 12 / 4, or with rsLoRA 12 / sqrt(4).
@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 3.0), (True, 6.0)])
def test_the_product_is_scaled_and_the_report_has_the_largest_change(pair, use_rslora, scaling):
    shutil.rmtree(pair / "adapter")
    make_adapter(pair / "base", pair / "adapter", ["q_proj"], use_rslora=use_rslora)
    report = merge_adapter(pair / "base", pair / "adapter", pair / "merged")
    old, new = tensors(pair / "base"), tensors(pair / "merged")
    lora = tensors(pair / "adapter")
    changes = {}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (lora[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert torch.allclose(new[f"{name}.weight"], old[f"{name}.weight"] + scaling * (b @ a))
        changes[f"{name}.weight"] = (scaling * (b @ a).norm() / old[f"{name}.weight"].norm()).item()
    assert report.tensors_merged == 2
    assert report.shards == len(list((pair / "base").glob("*.safetensors")))
    files = (pair / "base").glob("*.safetensors")
    assert report.num_bytes == sum(path.stat().st_size for path in files)
    assert report.largest_change == pytest.approx(max(changes.values()), rel=1e-5)
    assert report.most_changed == max(changes, key=changes.get)


def test_all_tensors_of_the_base_are_read_into_two_buffers(pair, monkeypatch):
    sizes, addresses = [], set()
    init, read = MergeStream.__init__, merge_stream._read

    def record_sizes(self, arithmetic, largest, *rest):
        init(self, arithmetic, largest, *rest)
        sizes.extend(buffer.nbytes for buffer in self._buffers)

    def record_address(file, task, buffer=None):
        tensor = read(file, task, buffer)
        if buffer is not None:
            addresses.add(tensor.untyped_storage().data_ptr())
        return tensor

    monkeypatch.setattr(MergeStream, "__init__", record_sizes)
    monkeypatch.setattr(merge_stream, "_read", record_address)
    merge_adapter(pair / "base", pair / "adapter", pair / "merged")
    largest = max(tensor.nbytes for tensor in tensors(pair / "base").values())
    assert sizes == [largest, largest]
    assert len(addresses) == 2
