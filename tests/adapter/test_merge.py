"""Merged weights equal those of peft's merge_and_unload, and all else of the base is kept."""

import shutil
import weakref

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.adapter import merge
from pipeline.adapter.merge import MARKER, merge_adapter
from tests.adapter.merged import (
    CASES,
    SEVEN_PROJECTIONS,
    contents,
    make_adapter,
    make_pair,
    tensors,
)

pytestmark = pytest.mark.tensor

IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def merged_case(tmp_path_factory):
    """Folder with base, adapter and merged model of a case, built once."""
    folders = {}

    def make(case):
        if case not in folders:
            folder = make_pair(tmp_path_factory.mktemp(case), case)
            merge_adapter(folder / "base", folder / "adapter", folder / "merged")
            folders[case] = folder
        return folders[case]

    return make


@pytest.fixture
def pair(merged_case, tmp_path):
    """A copy of base and adapter that a test may change."""
    for name in ("base", "adapter"):
        shutil.copytree(merged_case("untied-shards") / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_those_of_peft(merged_case, case):
    folder = merged_case(case)
    base, merged = tensors(folder / "base"), tensors(folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    by_peft = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().state_dict()
    assert merged.keys() == base.keys()
    for key, tensor in merged.items():
        assert tensor.dtype == base[key].dtype
        assert torch.equal(tensor, by_peft[key].to(tensor.dtype)), key
        is_adapted = key.split(".")[-2] in SEVEN_PROJECTIONS
        assert torch.equal(tensor, base[key]) != is_adapted, key


@pytest.mark.parametrize("options", [
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 8}, "alpha_pattern": {"v_proj": 1.5}},
    {"rank_pattern": {"o_proj": 2}, "use_rslora": True, "use_dora": True},
    {"use_dora": True},
])  # fmt: skip
def test_the_merge_of_every_adapter_option_is_bitwise_that_of_peft(pair, options):
    shutil.rmtree(pair / "adapter")
    make_adapter(pair / "base", pair / "adapter", **options)
    merge_adapter(pair / "base", pair / "adapter", pair / "merged")
    model = AutoModelForCausalLM.from_pretrained(pair / "base")
    by_peft = PeftModel.from_pretrained(model, pair / "adapter").merge_and_unload().state_dict()
    base = tensors(pair / "base")
    for key, tensor in tensors(pair / "merged").items():
        assert torch.equal(tensor, by_peft[key]), key
        assert torch.equal(tensor, base[key]) == (key.split(".")[-2] not in SEVEN_PROJECTIONS)


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_in_plain_transformers_has_the_logits_of_the_adapter(merged_case, case):
    folder = merged_case(case)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    with torch.no_grad():
        ours, theirs = merged(IDS).logits, adapted(IDS).logits
        with adapted.disable_adapter():
            assert (theirs - adapted(IDS).logits).norm() > 0.1 * theirs.norm()
    # Only the rounding of each merged weight may differ.
    limit = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}[CASES[case]["dtype"]]
    assert (ours - theirs).norm() < limit * theirs.norm()
    stored = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert stored.dtype == getattr(torch, CASES[case]["dtype"])


@pytest.mark.parametrize("case", CASES)
def test_all_files_and_tensors_that_are_not_adapted_are_those_of_the_base(merged_case, case):
    base, merged = contents(merged_case(case) / "base"), contents(merged_case(case) / "merged")
    assert merged.keys() - base.keys() == {MARKER}
    assert base.keys() <= merged.keys()
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json"} <= merged.keys()
    for name, data in base.items():
        if not name.endswith(".safetensors"):
            assert merged[name] == data, name  # also the index of the shards
            continue
        with (
            safe_open(merged_case(case) / "base" / name, "pt") as old,
            safe_open(merged_case(case) / "merged" / name, "pt") as new,
        ):
            assert new.metadata() == old.metadata()
            assert new.keys() == old.keys()
    weights = [name for name in merged if name.endswith(".safetensors")]
    assert len(weights) >= CASES[case]["shards"]
    assert ("model.safetensors.index.json" in merged) == (len(weights) > 1)
    has_head = "lm_head.weight" in tensors(merged_case(case) / "merged")
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


def test_the_merged_model_has_the_chat_template_of_the_adapter(pair):
    (pair / "adapter" / "chat_template.jinja").write_text("{{ 'mine' }}")
    merge_adapter(pair / "base", pair / "adapter", pair / "merged")
    tokenizer = AutoTokenizer.from_pretrained(pair / "merged")
    assert tokenizer.chat_template == "{{ 'mine' }}"


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 3.0), (True, 6.0)])
def test_weights_are_scaled_and_the_report_has_the_largest_change(pair, use_rslora, scaling):
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


def test_a_merge_keeps_a_few_tensors_and_one_shard_in_memory(pair, monkeypatch):
    alive, live_bytes, folders = weakref.WeakSet(), [], []
    read, merge_shard = merge._read, merge._merge_shard

    def counting_read(file, entry):
        tensor = read(file, entry)
        alive.add(tensor)
        live_bytes.append(sum(t.nbytes for t in alive))
        return tensor

    def listing_merge(shard, adapter, target):
        folders.append(sorted(path.name for path in target.parent.iterdir()))
        return merge_shard(shard, adapter, target)

    monkeypatch.setattr(merge, "_read", counting_read)
    monkeypatch.setattr(merge, "_merge_shard", listing_merge)
    report = merge_adapter(pair / "base", pair / "adapter", pair / "merged")
    assert len(live_bytes) == 3 * report.tensors_merged == 3 * 14
    # A weight of the tiny model with its A and B, and those of the previous weight.
    assert max(live_bytes) <= 2 * 4 * (64 * 32 + 4 * 96)
    assert [len(names) for names in folders] == list(range(report.shards))
