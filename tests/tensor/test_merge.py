"""Merging against peft's own merge_and_unload, and everything that must be refused or kept."""

import json
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.adapter import merge
from pipeline.adapter.merge import MARKER, merge_adapter
from pipeline.config.settings import SEVEN_PROJECTIONS
from pipeline.errors import RankZeroError, UserError
from tests.tiny import make_model

IDS = torch.arange(3, 43).reshape(2, 20)
CASES = {
    "tied": {"tied": True, "dtype": "float32", "shards": 1},
    "untied-shards": {"tied": False, "dtype": "float32", "shards": 3},
    "tied-bf16-shards": {"tied": True, "dtype": "bfloat16", "shards": 3},
    "untied-fp16": {"tied": False, "dtype": "float16", "shards": 1},
}


def make_adapter(base, folder, targets=SEVEN_PROJECTIONS, **options):
    """An adapter as peft writes it, no matrix of it zero."""
    options = {"r": 4, "lora_alpha": 12} | options
    config = LoraConfig(target_modules=list(targets), task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with base, adapter and merged model of a case, made once."""
    folders = {}

    def make(case):
        if case not in folders:
            folder = tmp_path_factory.mktemp(case)
            base = make_model(folder / "base", **CASES[case])
            make_adapter(base, folder / "adapter")
            merge_adapter(base, folder / "adapter", folder / "merged")
            folders[case] = folder
        return folders[case]

    return make


@pytest.fixture
def pair(made, tmp_path):
    """Base and adapter that a test may change."""
    for name in ("base", "adapter"):
        shutil.copytree(made("untied-shards") / name, tmp_path / name)
    return tmp_path


def tensors(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(made, case):
    folder = made(case)
    base, merged = tensors(folder / "base"), tensors(folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    oracle = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().state_dict()
    assert merged.keys() == base.keys()
    for key, tensor in merged.items():
        assert tensor.dtype == base[key].dtype
        assert torch.equal(tensor, oracle[key].to(tensor.dtype)), key
        is_adapted = key.split(".")[-2] in SEVEN_PROJECTIONS
        assert torch.equal(tensor, base[key]) != is_adapted, key


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_gives_the_adapters_logits(made, case):
    folder = made(case)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    with torch.no_grad():
        ours, theirs = merged(IDS).logits, adapted(IDS).logits
        with adapted.disable_adapter():
            assert (theirs - adapted(IDS).logits).norm() > 0.1 * theirs.norm()
    # One rounding of each weight is all that may differ.
    limit = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}[CASES[case]["dtype"]]
    assert (ours - theirs).norm() < limit * theirs.norm()
    stored = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert stored.dtype == getattr(torch, CASES[case]["dtype"])


@pytest.mark.parametrize("case", CASES)
def test_all_else_is_the_bases(made, case):
    base, merged = contents(made(case) / "base"), contents(made(case) / "merged")
    assert merged.keys() - base.keys() == {MARKER}
    assert base.keys() <= merged.keys()
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json"} <= merged.keys()
    for name, data in base.items():
        if not name.endswith(".safetensors"):
            assert merged[name] == data, name  # the index among them
            continue
        with (
            safe_open(made(case) / "base" / name, "pt") as old,
            safe_open(made(case) / "merged" / name, "pt") as new,
        ):
            assert new.metadata() == old.metadata()
            assert new.keys() == old.keys()
    weights = [name for name in merged if name.endswith(".safetensors")]
    assert len(weights) >= CASES[case]["shards"]
    assert ("model.safetensors.index.json" in merged) == (len(weights) > 1)
    has_head = "lm_head.weight" in tensors(made(case) / "merged")
    assert has_head != CASES[case]["tied"]


def test_other_weights_and_the_readme_stay_behind(pair):
    base = pair / "base"
    left = ("pytorch_model.bin", "a.gguf", "pytorch_model.bin.index.json", "README.md", "x.pth")
    for name in (*left, "LICENSE", "modeling_own.py"):
        (base / name).write_text("text")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (base / "original").mkdir()
    (base / "original" / "consolidated.00.pth").write_text("text")
    merge_adapter(base, pair / "adapter", pair / "merged")
    found = contents(pair / "merged")
    assert not found.keys() & {*left, "original/consolidated.00.pth"}
    assert {"LICENSE", "modeling_own.py", "additional_chat_templates/tool_use.jinja"} < found.keys()


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 3.0), (True, 6.0)])
def test_scaling_and_report(pair, use_rslora, scaling):
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


def test_memory_is_a_few_tensors_and_one_shard_is_open(pair, monkeypatch):
    alive, most, folders = weakref.WeakSet(), [], []
    read, merge_shard = merge._read, merge._merge_shard

    def counted(file, entry):
        tensor = read(file, entry)
        alive.add(tensor)
        most.append(sum(t.nbytes for t in alive))
        return tensor

    def one_shard(shard, adapter, target):
        folders.append(sorted(path.name for path in target.parent.iterdir()))
        return merge_shard(shard, adapter, target)

    monkeypatch.setattr(merge, "_read", counted)
    monkeypatch.setattr(merge, "_merge_shard", one_shard)
    report = merge_adapter(pair / "base", pair / "adapter", pair / "merged")
    assert len(most) == 3 * report.tensors_merged == 3 * 14
    # A weight of the tiny model with its own A and B, and what the last pair has left.
    assert max(most) <= 2 * 4 * (64 * 32 + 4 * 96)
    assert [len(names) for names in folders] == list(range(report.shards))


def foreign_module(pair):
    path = pair / "adapter" / "adapter_model.safetensors"
    renamed = {key.replace("layers.1.", "layers.5."): t for key, t in load_file(path).items()}
    save_file(renamed, path)


def foreign_shape(pair):
    path = pair / "adapter" / "adapter_model.safetensors"
    found = load_file(path)
    key = next(key for key in found if "down_proj.lora_A" in key)
    save_file(found | {key: torch.ones(4, 48)}, path)


def foreign_r(pair):
    edit(pair / "adapter" / "adapter_config.json", r=8)


def foreign_key(pair):
    path = pair / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lm_head.weight": torch.ones(4)}, path)


def cut_adapter(pair):
    path = pair / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def no_adapter(pair):
    shutil.rmtree(pair / "adapter")


def quantised(pair):
    edit(pair / "base" / "config.json", quantization_config={"quant_method": "gptq"})


def no_safetensors(pair):
    for path in (pair / "base").glob("*safetensors*"):
        path.unlink()
    (pair / "base" / "pytorch_model.bin").write_bytes(b"x")


def missing_shard(pair):
    next((pair / "base").glob("*.safetensors")).unlink()


def outside_index(pair):
    path = pair / "base" / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    edit(path, weight_map=dict.fromkeys(weight_map, "../outside.safetensors"))


def tied_head(pair):
    shutil.rmtree(pair / "adapter")
    make_adapter(pair / "base", pair / "adapter", ["lm_head"])
    edit(pair / "base" / "config.json", tie_word_embeddings=True)


def option(**changes):
    return lambda pair: edit(pair / "adapter" / "adapter_config.json", **changes)


def full_disk(pair):
    (pair / "full").touch()


REFUSED = {
    "module": (foreign_module, r"7 of 14 weights.*layers\.5\..*what exists: model\.layers\."),
    "shape": (foreign_shape, r"down_proj.weight is \(32, 64\) there and \(32, 48\)"),
    "r": (foreign_r, "not r 8"),
    "key": (foreign_key, "lm_head.weight is not one of a lora_A, lora_B pair"),
    "cut": (cut_adapter, "bytes long"),
    "absent": (no_adapter, "holds no adapter_config.json"),
    "quantised": (quantised, r"already quantised \(gptq\)"),
    "pickle": (no_safetensors, "holds neither"),
    "shard": (missing_shard, "not a readable safetensors file"),
    "outside": (outside_index, "not the name of a file"),
    "tied": (tied_head, "one side of a pair"),
    "dora": (option(use_dora=True), "use_dora"),
    "fan": (option(fan_in_fan_out=True), "fan_in_fan_out"),
    "ranks": (option(rank_pattern={"q_proj": 8}), "rank_pattern"),
    "alphas": (option(alpha_pattern={"q_proj": 8}), "alpha_pattern"),
    "pissa": (option(init_lora_weights="pissa"), "changed the base"),
    "bias": (option(bias="all"), "bias"),
    "unknown": (option(new_option_of_peft=1), "new_option_of_peft"),
    "disk": (full_disk, "GiB and 0.0 are free"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_and_nothing_is_written(pair, monkeypatch, name):
    damage, message = REFUSED[name]
    damage(pair)
    if (pair / "full").exists():
        monkeypatch.setattr(merge.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    before = contents(pair)
    with pytest.raises(UserError, match=message):
        merge_adapter(pair / "base", pair / "adapter", pair / "merged")
    assert contents(pair) == before


def test_an_fp16_overflow_is_refused_and_the_previous_merge_stays(made, tmp_path):
    shutil.copytree(made("untied-fp16"), tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path / "merged")
    edit(tmp_path / "adapter" / "adapter_config.json", lora_alpha=4e7)
    with pytest.raises(RankZeroError, match=r"too large for torch\.float16"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert contents(tmp_path / "merged") == before


@pytest.mark.parametrize("number", [0, 2])
def test_a_kill_half_way_leaves_the_previous_merge(pair, monkeypatch, number):
    base, adapter, out = (pair / name for name in ("base", "adapter", "merged"))
    merge_adapter(base, adapter, out)
    before = contents(out)
    copy, count = merge._merge_shard, []

    def killed(shard, lora, target):
        count.append(shard)
        if len(count) > number:
            shutil.copytree(pair, pair.parent / f"{pair.name}-left")
            raise KeyboardInterrupt
        return copy(shard, lora, target)

    edit(adapter / "adapter_config.json", lora_alpha=24)
    monkeypatch.setattr(merge, "_merge_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(base, adapter, out)
    assert contents(out) == before
    # What a kill that cleans nothing up would have left: the next merge is not disturbed by it.
    monkeypatch.undo()
    left = pair.parent / f"{pair.name}-left"
    assert contents(left / "merged") == before
    merge_adapter(left / "base", left / "adapter", left / "merged")
    assert {path.name for path in left.iterdir()} == {"base", "adapter", "merged"}
    assert contents(left / "merged") != before


def test_only_what_a_merge_wrote_is_replaced(pair):
    base, adapter = pair / "base", pair / "adapter"
    mine = pair / "mine"
    mine.mkdir()
    merge_adapter(base, adapter, mine)  # empty: nothing to lose
    merge_adapter(base, adapter, mine)
    (mine / "notes.txt").write_text("keep me")
    for out, message in {
        mine: r"notes\.txt, which no merge wrote",
        base: "would replace",
        pair: "would replace",
        adapter: "would replace",
    }.items():
        before = contents(pair)
        with pytest.raises(UserError, match=message):
            merge_adapter(base, adapter, out)
        assert contents(pair) == before
    other = pair / "other"
    other.mkdir()
    (other / "file").touch()
    with pytest.raises(UserError, match="not written by a merge"):
        merge_adapter(base, adapter, other)


def test_the_script_merges_and_answers_without_torch(pair):
    run = pair / "run"
    run.mkdir()
    settings = {"model": str(pair / "base"), "train_data": "t.jsonl", "output_dir": str(run)}
    (run / "run.yaml").write_text(json.dumps(settings))

    def script(*options):
        command = [sys.executable, "-X", "importtime", "launch/merge.py", str(run), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    none = script()
    assert none.returncode == 2
    assert "holds no adapter" in none.stderr
    shutil.copytree(pair / "adapter", run / "adapter")
    foreign_shape(pair)
    shutil.copytree(pair / "adapter", run / "adapter", dirs_exist_ok=True)
    foreign = script()
    assert foreign.returncode == 2
    assert "does not belong to base" in foreign.stderr
    assert "| torch\n" not in none.stderr + foreign.stderr
    assert "Traceback" not in none.stderr + foreign.stderr
    shutil.rmtree(run / "adapter")
    make_adapter(pair / "base", run / "adapter")
    done = script("--out", str(run / "here"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{run / 'here'}: 14 weights")
    assert done.stdout.count("\n") == 1
    assert tensors(run / "here").keys() == tensors(pair / "base").keys()
