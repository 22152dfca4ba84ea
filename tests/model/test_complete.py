"""A checkpoint without all tensors of its class is refused before anything is loaded."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.cli.plan import plan
from pipeline.cli.prepare import prepare
from pipeline.model import complete
from pipeline.model.checkpoint_names import difference
from pipeline.model.complete import require_complete
from pipeline.plan.given.shape import read_shape
from tests.messages import refused
from tests.model.kinds import QUANTISED_CHECKPOINTS
from tests.model.models import build, cache_shape, make_own_code
from tests.model.quantised_checkpoints import make_quantised_checkpoint
from tests.models.kinds import ALL
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.tensor

UP = "model.layers.2.mlp.up_proj.weight"
# Function that renames a tensor or, with None, removes it; and facts of the message: the number of
# missing tensors, and names.
CHANGES = {
    "prefix": (lambda name: f"module.{name}", ("39", "lm_head.weight", "module.lm_head.weight")),
    "rename": (lambda name: name.replace("q_proj", "wq"), ("4", "self_attn.q_proj.weight")),
    "layer": (lambda name: None if name == UP else name, ("1", UP)),
    "norm": (lambda name: None if name == "model.norm.weight" else name, ("model.norm.weight",)),
    "norms": (
        lambda name: None if name.endswith("2.input_layernorm.weight") else name,
        ("model.layers.2.input_layernorm.weight",),
    ),
}


@pytest.fixture(autouse=True)
def in_this_process(tmp_path_factory, monkeypatch):
    """Compare names with the model class in this process, with an empty cache.

    Returns the list of folders that were compared so, instead of in a subprocess with torch.
    """
    monkeypatch.setenv("RANKZERO_CACHE", str(tmp_path_factory.mktemp("cache")))
    compared = []

    def run(module, folder, *trust, timeout_s):
        compared.append(folder)
        result = difference(Path(folder), trust_remote_code=bool(trust))
        return json.loads(json.dumps(asdict(result)))

    monkeypatch.setattr(complete, "run_module", run)
    return compared


def change_names(folder, rename):
    file = folder / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    tensors.pop(None, None)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_without_all_tensors_is_refused_by_its_headers(tmp_path, change):
    build("llama").save_pretrained(tmp_path)
    rename, facts = CHANGES[change]
    change_names(tmp_path, rename)
    with refused(tmp_path, *facts):
        require_complete(read_shape(str(tmp_path)))


def test_a_tensor_of_another_shape_is_refused_by_its_header(tmp_path):
    build("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[UP] = tensors[UP][:100].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with refused(tmp_path, UP, "100 x 64", "128 x 64"):
        require_complete(read_shape(str(tmp_path)))


@pytest.mark.parametrize(
    "kind", ["llama", "llama/tied", "mixtral", "phi3", "gemma2", "qwen2", "qwen3"]
)
def test_a_complete_checkpoint_of_a_known_family_needs_no_torch(tmp_path, kind, in_this_process):
    build(kind, kinds=ALL).save_pretrained(tmp_path)
    require_complete(read_shape(str(tmp_path)))
    assert not in_this_process


@pytest.mark.parametrize(
    "kind",
    [
        "gemma3",
        "qwen3_vl_moe",
        "nemotron_h",
        "gpt_oss",
        "deepseek_v3",
        "zamba2/shared",
        "qwen3_5",
        "gpt_neox",
    ],
)
def test_names_that_transformers_converts_while_it_loads_are_not_missing(tmp_path, kind):
    build(kind, kinds=ALL).save_pretrained(tmp_path)
    result = difference(tmp_path)
    assert not result.missing
    assert not result.reshaped
    file = tmp_path / "model.safetensors"
    lost = next(name for name in load_file(file) if "layers.1." in name)
    change_names(tmp_path, lambda name: None if name == lost else name)
    assert difference(tmp_path).missing


def test_a_base_model_without_the_prefix_of_its_class_is_complete(tmp_path, in_this_process):
    build("llama/tied", kinds=ALL).save_pretrained(tmp_path)
    change_names(tmp_path, lambda name: name.removeprefix("model."))
    shape = read_shape(str(tmp_path))
    require_complete(shape)
    require_complete(shape)
    assert in_this_process == [str(tmp_path)]  # the second result is from the cache


@pytest.mark.parametrize("name", QUANTISED_CHECKPOINTS)
def test_a_quantised_checkpoint_is_complete(tmp_path, name):
    make_quantised_checkpoint(name, tmp_path)
    cache_shape(tmp_path)
    require_complete(read_shape(str(tmp_path)))


def test_a_model_with_its_own_code_is_compared_with_that_code(tmp_path):
    make_own_code(tmp_path)
    change_names(tmp_path, lambda name: None if name == UP else name)
    with refused(UP):
        require_complete(read_shape(str(tmp_path), trust_remote_code=True), trust_remote_code=True)


def test_a_tensor_that_every_block_lacks_is_missing(tmp_path):
    build("qwen3", kinds=ALL).save_pretrained(tmp_path)
    require_complete(read_shape(str(tmp_path)))
    change_names(tmp_path, lambda name: None if "q_norm" in name else name)
    with refused(tmp_path, "self_attn.q_norm.weight"):
        require_complete(read_shape(str(tmp_path)))


@pytest.mark.parametrize("command", [plan, prepare])
def test_an_incomplete_checkpoint_is_refused_by_the_commands_before_a_run(
    tmp_path, monkeypatch, command
):
    folder = tmp_path / "model"
    build("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    change_names(folder, lambda name: None if name == UP else name)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "yes"}\n')
    values = {"model": folder, "train_data": rows, "output_dir": tmp_path / "run"}
    run_file = tmp_path / "run.yaml"
    run_file.write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
    monkeypatch.setattr(sys, "argv", ["command", str(run_file)])
    with refused(UP, folder):
        command()
