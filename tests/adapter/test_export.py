"""The export: GGUF files by llama.cpp's programs, and a chat template in Ollama's language.

Stand-ins take the place of llama.cpp's converters; `make test-serving` runs the real ones.
"""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from pipeline.adapter.adapter_file import read_adapter
from pipeline.adapter.export import write_with_plain_scaling
from pipeline.adapter.ollama import go_template, modelfile
from pipeline.cli.export import export
from pipeline.errors import RankZeroError
from tests import ROOT
from tests.adapter.merged import make_adapter, make_pair, merge_adapter
from tests.messages import assert_mentions, refused

pytestmark = pytest.mark.tensor

# Names of llama.cpp's scripts, and the script in place of both: it writes the names of the files in
# the folder to convert. In place of llama-quantize, a script writes the format (third argument).
MODEL_CONVERTER, ADAPTER_CONVERTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
CONVERTER = """
import sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--outfile") + 1])
source = [Path(word) for word in sys.argv[1:] if Path(word).is_dir()][-1]
out.write_text(" ".join(sorted(path.name for path in source.iterdir())))
"""
QUANTISER = '#!/bin/sh\necho "$3" > "$2"\n'


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = make_pair(tmp_path_factory.mktemp("original"), "tied")
    merge_adapter(folder / "base", folder / "adapter", folder / "merged")
    return folder


@pytest.fixture
def run(original, tmp_path, monkeypatch):
    """A merged run, with stand-ins of llama.cpp's programs."""
    for name in ("adapter", "merged"):
        shutil.copytree(original / name, tmp_path / "run" / name)
    settings = {
        "model": str(original / "base"), "train_data": "t.jsonl",
        "output_dir": str(tmp_path / "run"), "lora_r": 4,
    }  # fmt: skip
    (tmp_path / "run" / "run.yaml").write_text(json.dumps(settings))
    (tmp_path / "llama" / "build" / "bin").mkdir(parents=True)
    for name in (MODEL_CONVERTER, ADAPTER_CONVERTER):
        (tmp_path / "llama" / name).write_text(CONVERTER)
    program = tmp_path / "llama" / "build" / "bin" / "llama-quantize"
    program.write_text(QUANTISER)
    program.chmod(0o755)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "llama"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    return tmp_path / "run"


@pytest.fixture
def command(monkeypatch):
    """Function: run the command export with arguments."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        export()

    return call


def test_adapter_and_quantised_model_are_exported_with_a_modelfile(run, command, capsys):
    command(run, "--gguf", "--quantize", "q4_k_m")
    files = {path.name: path.read_text() for path in (run / "gguf").iterdir()}
    assert files["adapter.gguf"] == "adapter_config.json adapter_model.safetensors"
    assert files["model-q4_k_m.gguf"] == "Q4_K_M\n"
    assert files.keys() == {"adapter.gguf", "model-q4_k_m.gguf", "Modelfile"}
    assert files["Modelfile"].startswith("FROM ./model-q4_k_m.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in files["Modelfile"]
    assert 'TEMPLATE """' in files["Modelfile"]
    # r is 4 here, and 8 is the next larger value that vLLM accepts.
    assert "--max-lora-rank 8" in capsys.readouterr().out


def test_the_word_model_in_braces_in_a_template_is_not_replaced(run, command):
    template = run / "merged" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|>{model}"))
    command(run, "--gguf")
    text = (run / "gguf" / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n")
    assert "<|im_start|>{model}" in text


def test_the_vllm_command_names_a_chat_template_only_if_there_is_one(
    run, command, capsys, original, tmp_path
):
    command(run)
    assert f"{run}/adapter/chat_template.jinja" in capsys.readouterr().out
    shutil.copytree(original / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    settings = json.loads((run / "run.yaml").read_text()) | {"model": str(tmp_path / "base")}
    (run / "run.yaml").write_text(json.dumps(settings))
    command(run)
    assert "--chat-template" not in capsys.readouterr().out


def test_a_failed_converter_leaves_the_earlier_export(run, command, tmp_path):
    command(run, "--gguf")
    before = sorted(path.name for path in (run / "gguf").iterdir())
    failing = tmp_path / "llama" / MODEL_CONVERTER
    failing.write_text("raise SystemExit('No space left on device')")
    with refused(MODEL_CONVERTER, "No space left on device", error=RankZeroError):
        command(run, "--gguf")
    assert sorted(path.name for path in (run / "gguf").iterdir()) == before
    assert not list(run.glob(".gguf*"))


def test_files_of_the_user_are_never_replaced(run, command):
    command(run, "--gguf")
    (run / "gguf" / "mine.txt").write_text("mine")
    with refused("mine.txt", "move it"):
        command(run, "--gguf")
    assert (run / "gguf" / "mine.txt").is_file()


@pytest.mark.parametrize(
    ("removed_file", "arguments", "facts"),
    [
        ("llama/convert_hf_to_gguf.py", ("--gguf",), (MODEL_CONVERTER, "--llama-cpp", "git clone")),
        ("llama/build/bin/llama-quantize", ("--gguf", "--quantize", "q8_0"),
         ("llama-quantize", "PATH", "cmake --build")),
        ("run/merged/config.json", ("--gguf",), ("no merged model", "rankzero merge")),
        ("run/adapter/adapter_model.safetensors", (), ("no adapter", "finish the training")),
        ("run/run.yaml", (), ("run.yaml", "output_dir")),
    ],
)  # fmt: skip
def test_a_missing_input_is_named_with_a_remedy(
    run, command, removed_file, arguments, facts, tmp_path
):
    (tmp_path / removed_file).unlink()
    with refused(*facts):
        command(run, *arguments)
    assert not (run / "gguf").exists()


def test_a_missing_library_is_named_with_the_command_that_installs_it(run, command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("sentencepiece", "pip install"):
        command(run, "--gguf")


def test_a_merged_model_of_an_earlier_adapter_is_refused(run, command, original):
    make_adapter(original / "base", run / "adapter", lora_alpha=24)
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")  # another last byte
    with refused("merged", "rankzero merge"):
        command(run, "--gguf")


def test_an_adapter_that_llama_cpp_cannot_represent_is_left_out(run, command, original, caplog):
    make_adapter(original / "base", run / "adapter", use_dora=True)
    shutil.rmtree(run / "merged")
    merge_adapter(original / "base", run / "adapter", run / "merged")
    command(run, "--gguf")
    assert {path.name for path in (run / "gguf").iterdir()} == {"model.gguf", "Modelfile"}
    assert_mentions(caplog.text, "adapter.gguf", "DoRA")


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 2}},
        {"use_rslora": True, "alpha_pattern": {"up_proj": 5}, "rank_pattern": {"up_proj": 8}},
    ],
)
def test_lora_alpha_over_r_of_the_plain_adapter_is_the_scaling_of_peft(original, tmp_path, options):
    adapter = read_adapter(make_adapter(original / "base", tmp_path / "adapter", **options))
    (tmp_path / "plain").mkdir()
    write_with_plain_scaling(adapter, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    alpha = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["lora_alpha"]
    scalings = set()
    for name, update in adapter.layer_updates.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"
        assert torch.allclose(plain[key] * alpha / update.r, trained[key] * update.scaling)
        scalings.add(update.scaling / (alpha / update.r))
    assert scalings != {1.0}  # the case needs a correction


def render_with(template):
    """Function: messages -> text by a Jinja chat template."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    compiled = environment.from_string(template)
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    return lambda chat: compiled.render(messages=chat, **names)


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5", "phi-4"])
def test_a_chat_template_that_joins_turns_becomes_a_go_template(name):
    text = (ROOT / "tests" / "templates" / f"{name}.jinja").read_text()
    template = go_template(render_with(text))
    assert template is not None
    assert template.count("{{ .Content }}") == 2
    assert "assistant" in template.rpartition("{{ end }}")[2]  # the start of the answer


def test_a_go_template_has_no_character_that_ollama_drops():
    # Ollama's parser of Modelfiles removes every character that is not printable.
    text = "{% for m in messages %}{{ m.role }}:\u3000\u200b\x7f{{ m.content }}\xa0😀\n{% endfor %}"
    template = go_template(render_with(text + "assistant:\u3000"))
    assert template is not None
    assert template.isprintable()
    assert "\\U00003000\\U0000200b\\U0000007f" in template
    assert "\\U000000a0😀\\n" in template


def commands_of(text):
    """The commands of a Modelfile and their values, as Ollama's parser reads them."""
    commands = []
    while text:
        line, _, rest = text.partition("\n")
        if not line.strip() or line.startswith("#"):
            text = rest
            continue
        name, _, value = text.partition(" ")
        assert name in {"FROM", "ADAPTER", "TEMPLATE", "PARAMETER"}, name
        if name == "PARAMETER":
            key, _, value = value.partition(" ")
            name = f"{name} {key}"
        quote = next((quote for quote in ('"""', '"') if value.startswith(quote)), "")
        value, end, text = value.removeprefix(quote).partition(f"{quote}\n")
        assert end, f"{name} is not closed"
        commands.append((name, value))
    return commands


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5", "phi-4"])
def test_the_parser_of_ollama_reads_model_template_and_stop_tokens(name):
    template = go_template(render_with((ROOT / "tests/templates" / f"{name}.jinja").read_text()))
    assert commands_of(modelfile("model-q8_0.gguf", template, ["<|im_end|>", "a b"])) == [
        ("FROM", "./model-q8_0.gguf"),
        ("TEMPLATE", template),
        ("PARAMETER stop", "<|im_end|>"),
        ("PARAMETER stop", "a b"),
    ]


def test_stop_tokens_and_template_reach_the_modelfile_unchanged():
    # Ollama removes the quotes around a value and interprets no escapes.
    text = modelfile("{model}", '{{ "{model}" }}', ['<|"|>', "\\end"])
    lines = text.splitlines()
    assert 'PARAMETER stop "<|"|>"' in lines
    assert 'PARAMETER stop "\\end"' in lines


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}",
        "{% for m in messages[-1:] %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ '!' if loop.index == 6 }}{{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ 1 / (m.role != 'system') }}{{ m.content }}\n{% endfor %}",
    ],
)
def test_a_template_that_does_more_than_joining_turns_is_not_translated(template):
    assert go_template(render_with(template)) is None
