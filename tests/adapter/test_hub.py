"""Publishing on the hub, against a local stand-in of its API."""

import json
from pathlib import Path

import pytest

from pipeline.adapter.hub import base_license, require_no_secrets
from tests import ROOT
from tests.adapter.hub_server import local_hub
from tests.commands import run_without_torch
from tests.messages import assert_mentions, refused

pytestmark = pytest.mark.unit

ROW_TEXT = "the walrus sings at midnight"
TOKEN = "hf_" + "a1B2" * 9


@pytest.fixture
def run(tmp_path):
    """A run folder whose scores and audit quote the text of a row."""
    home, run = tmp_path / "home", tmp_path / "run"
    for folder in (home, run / "adapter", run / "merged", run / "data", tmp_path / "base"):
        folder.mkdir(parents=True)
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    weights = len(header).to_bytes(8, "little") + header
    (run / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    (run / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")})
    )
    (run / "adapter" / "trained_on.json").write_text(json.dumps({"base": str(home / "base")}))
    (run / "merged" / "model.safetensors").write_bytes(weights)
    (run / "merged" / "config.json").write_text("{}")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    scores = {"adapter": {"loss": 0.5, "exact_match": 0.75}}
    (run / "score.json").write_text(
        json.dumps({"rows": 4, "models": scores, "answers": [{"prompt": ROW_TEXT}]})
    )
    counts = {"rows_read": 9, "rows_used": 8, "rejected": {f"bad role {ROW_TEXT}": 1}}
    (run / "data" / "audit.json").write_text(json.dumps({"train": counts, "note": ROW_TEXT}))
    (run / "plan.json").write_text(
        json.dumps(
            {
                "settings": {"lora_r": 8, "train_data": str(home / "rows.jsonl")},
                "choice": {"zero_stage": 2},
                "rules": [{"id": "dora-when-served", "message": "vLLM rejects DoRA"}],
            }
        )
    )
    settings = {"model": str(tmp_path / "base"), "train_data": "org/rows:train",
                "output_dir": str(run), "lora_r": 8}  # fmt: skip
    (run / "run.yaml").write_text(json.dumps(settings))
    return run


@pytest.fixture
def publish(run):
    """Function that runs `launch/publish.py` with arguments and variables, and the stand-in hub.

    The function returns the exit code and the output.
    """
    with local_hub() as hub:

        def call(*arguments, **environment):
            variables = {
                "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
                "HOME": str(run.parent / "home"), "HF_HOME": str(run.parent / "cache"),
                "HF_TOKEN": "hf_short",
            }  # fmt: skip
            result = run_without_torch("launch/publish.py", run, *arguments,
                                       **variables | environment)  # fmt: skip
            return result.returncode, result.stdout + result.stderr

        yield call, hub


TO = ("--to", "org/name", "--base-model", "org/base")  # arguments of most calls


def test_the_adapter_is_sent_with_a_card_and_without_texts_or_paths(run, publish):
    call, hub = publish
    code, output = call(*TO, "--private")
    assert code == 0, output
    assert hub.address in output
    assert hub.created[0].get("private") or hub.created[0]["visibility"] == "private"
    assert hub.files.keys() == {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "score.json", "plan.json",
        "audit.json",
    }  # fmt: skip
    everything = b"".join(hub.files.values())
    assert ROW_TEXT.encode() not in everything
    assert str(run.parent).encode() not in everything
    assert json.loads(hub.files["audit.json"]) == {"train": {"rows_read": 9, "rows_used": 8}}
    assert json.loads(hub.files["score.json"])["models"]["adapter"]["loss"] == 0.5
    assert not list(run.glob(".publish*"))


def test_the_card_has_metadata_that_huggingface_hub_reads(publish):
    from huggingface_hub import ModelCard

    call, hub = publish
    call(*TO)
    data = ModelCard(hub.files["README.md"].decode()).data
    assert (data.base_model, data.license, data.library_name) == ("org/base", "apache-2.0", "peft")
    assert data.datasets == ["org/rows"]
    assert hub.validated  # the card was sent to the endpoint that checks metadata
    assert_mentions(hub.files["README.md"].decode(), 'from_pretrained("org/name")', "rejects DoRA")


@pytest.mark.parametrize(("metadata", "expected"), [
    ("license: mit", "mit"),
    ("license: mit\nmodel-index: [{name: 1}]", "mit"),  # scores that huggingface_hub refuses
    ("license: [mit, gpl]", None),
    ("license: [mit", None),
    ("license: @mit", None),
    ("- mit", None),
    ("1: mit", None),
    ("", None),
])  # fmt: skip
def test_the_license_is_that_of_the_card_of_the_base_however_damaged_it_is(
    tmp_path, metadata, expected
):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# Base\n")
    assert base_license(tmp_path) == expected


def test_a_second_publication_replaces_the_files_of_the_first_and_no_others(publish):
    call, hub = publish
    assert call(*TO)[0] == 0
    others = {"image.png", ".gitattributes", "other/adapter_model.safetensors"}
    hub.files |= dict.fromkeys(others, b"")
    assert call(*TO, "--merged")[0] == 0
    assert others | {"model.safetensors", "README.md"} <= hub.files.keys()
    assert not {"adapter_model.safetensors", "adapter_config.json"} & hub.files.keys()


def test_a_model_that_was_not_published_with_rankzero_is_kept(publish):
    call, hub = publish
    hub.exists, earlier_files = True, {"README.md": b"# Mine", "model.safetensors": b"1"}
    hub.files |= earlier_files
    code, output = call(*TO)
    assert code == 2
    assert_mentions(output, "--to", "org/name", "model.safetensors", "nothing was sent")
    assert hub.files == earlier_files


def test_the_card_of_an_mxfp4_base_loads_it_dequantised(run, publish):
    call, hub = publish
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    (run.parent / "base" / "config.json").write_text(json.dumps(config))
    assert call(*TO)[0] == 0
    assert_mentions(hub.files["README.md"].decode(), '"org/base"', "Mxfp4Config(dequantize=True)")


def test_files_that_rankzero_did_not_write_and_data_are_named_and_not_sent(run, publish):
    call, hub = publish
    (run / "adapter" / "notes").mkdir()
    for name in ("notes/rows.json", "old.bin", "tokenizer.json"):
        (run / "adapter" / name).write_text(ROW_TEXT)
    merged = {"rows.jsonl": ROW_TEXT, "modeling_own.py": "", "other.py": ROW_TEXT}
    for name, text in merged.items():
        (run / "merged" / name).write_text(text)
    # The base had rows and code, which the merge copied.
    record = {"files": ["model.safetensors", "config.json", "rows.jsonl", "modeling_own.py"]}
    (run / "merged" / "rankzero_merge.json").write_text(json.dumps(record))
    code, output = call(*TO)
    assert code == 0
    assert_mentions(output, "not sent", "notes/rows.json", "old.bin")
    assert "tokenizer.json" in hub.files
    assert not {"notes/rows.json", "old.bin"} & hub.files.keys()
    code, output = call(*TO, "--merged")
    assert code == 0
    assert_mentions(output, "not sent", "rows.jsonl", "other.py")
    assert "modeling_own.py" in hub.files
    assert not {"rows.jsonl", "other.py"} & hub.files.keys()


def test_the_merged_model_is_sent_when_asked_for(publish):
    call, hub = publish
    assert call(*TO, "--merged")[0] == 0
    assert {"model.safetensors", "config.json"} <= hub.files.keys()
    assert "adapter_model.safetensors" not in hub.files


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (f"token {TOKEN}", "Hugging Face"),
        ("WANDB_API_KEY=" + "0a1b" * 10, "Weights & Biases"),
        ("ghp_" + "aB3d" * 9, "GitHub"),
        ("-----BEGIN RSA PRIVATE KEY-----", "private key"),
        ("mine-is-a-secret", "HF_TOKEN"),
        ("see {home}/rows", "home folder"),
    ],
)
def test_a_secret_or_a_path_in_the_home_folder_stops_publishing(run, publish, content, fact):
    call, hub = publish
    text = content.replace("{home}", str(run.parent / "home"))
    (run / "adapter" / "tokenizer_config.json").write_text(json.dumps({"x": text}))
    code, output = call(*TO, HF_TOKEN="mine-is-a-secret")
    assert code == 2
    assert_mentions(output, "tokenizer_config.json", fact)
    assert TOKEN not in output
    assert not hub.created
    assert not hub.files


@pytest.mark.parametrize(
    "name",
    [
        "README.md", "chat_template.jinja", "additional_chat_templates/tool.jinja", "merges.txt",
        "tokenizer.model", "modeling_own.py", "generation_config.json", "LICENSE",
    ],
)  # fmt: skip
def test_a_secret_is_found_in_a_file_of_any_name(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"\xff\0 token " + TOKEN.encode())
    with refused(name, "Hugging Face"):
        require_no_secrets(tmp_path)


def test_a_pickle_is_not_published(run, publish):
    """A pickle can run any code when it is loaded."""
    call, hub = publish
    (run / "adapter" / "optimizer.pt").write_bytes(b"")
    code, output = call(*TO)
    assert code == 0, output
    assert_mentions(output, "optimizer.pt")
    assert not any("optimizer.pt" in str(name) for name in hub.files)


def test_a_secret_in_the_header_of_the_weights_stops_publishing(run, publish):
    call, hub = publish
    header = json.dumps({"__metadata__": {"note": TOKEN}}).encode()
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    assert call(*TO)[0] == 2
    assert not hub.created


@pytest.mark.parametrize(
    ("arguments", "removed_file", "facts"),
    [
        (("--to", "name", "--base-model", "org/base"), None, ("--to", "ORG/NAME")),
        (("--to", "org/a..b", "--base-model", "org/base"), None, ("--to", "org/a..b", "..")),
        (("--to", f"org/{97 * 'a'}", "--base-model", "org/base"), None, ("--to", "96")),
        (("--to", "org/na\u00efve", "--base-model", "org/base"), None, ("--to", "ORG/NAME")),
        (("--to", "org/name", "--base-model", "org/base.git"), None, ("--base-model", ".git")),
        (("--to", "org/name"), None, ("--base-model",)),
        (TO, "adapter/adapter_model.safetensors", ("no adapter",)),
        ((*TO, "--merged"), "merged/config.json", ("no merged model", "launch/merge.py")),
        (TO, "run.yaml", ("run.yaml",)),
    ],
)
def test_wrong_input_is_refused_before_anything_is_sent(
    run, publish, arguments, removed_file, facts
):
    call, hub = publish
    if removed_file:
        (run / removed_file).unlink()
    code, output = call(*arguments)
    assert code == 2
    assert_mentions(output, *facts)
    assert not hub.created


def test_a_refusal_of_the_hub_is_one_message(run, publish):
    call, hub = publish
    hub.status = 403
    code, output = call(*TO)
    assert code == 1
    assert_mentions(output, "org/name", "hf auth login")
    assert "Traceback" not in output
    assert not list(run.glob(".publish*"))


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://hub.invalid"])
def test_a_hub_that_cannot_be_reached_is_one_message(run, publish, address):
    call, _ = publish
    code, output = call(*TO, HF_ENDPOINT=address)
    assert code == 1
    assert_mentions(output, "org/name", "cannot be reached")
    assert "Traceback" not in output
    assert not list(run.glob(".publish*"))


def test_a_public_repository_gets_nothing_if_a_private_one_is_asked_for(publish):
    call, hub = publish
    hub.exists = True
    code, output = call(*TO, "--private")
    assert code == 2
    assert_mentions(output, "--private", "org/name", "public")
    assert not hub.files
    hub.is_private = True
    assert call(*TO, "--private")[0] == 0
    assert hub.files


def test_a_path_in_a_home_folder_behind_a_symbolic_link_stops_publishing(run, publish):
    call, hub = publish
    home = run.parent / "home"
    (run.parent / "link").symlink_to(home)
    (run / "adapter" / "tokenizer_config.json").write_text(json.dumps({"x": f"{home}/rows"}))
    code, output = call(*TO, HOME=str(run.parent / "link"))
    assert code == 2
    assert_mentions(output, "tokenizer_config.json", "home folder")
    assert not hub.created


def test_a_damaged_adapter_config_is_named(run, publish):
    call, hub = publish
    (run / "adapter" / "adapter_config.json").write_text("[1")
    code, output = call(*TO)
    assert code == 2
    assert_mentions(output, "adapter_config.json", "JSON")
    assert not hub.created


def test_no_other_command_publishes():
    callers = [path.name for path in Path(ROOT / "pipeline").rglob("*.py")
               if "adapter.hub" in path.read_text() and path.name != "hub.py"]  # fmt: skip
    assert callers == ["publish.py"]
