"""launch/plan.py prints a plan as text or JSON, without torch and without weights."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from pipeline.data.dataset.reader import DataIndex, SplitIndex
from pipeline.plan.given.published import published_models
from tests.commands import run_without_torch
from tests.messages import assert_mentions
from tests.plans import LLAMA_8B, LLAMA_70B

pytestmark = pytest.mark.unit

# Runs launch/plan.py. run_main ends the process with os._exit, which is replaced, so that TORCH is
# printed if torch was imported.
PLAN_AND_REPORT_TORCH = """
import os, runpy, sys
os_exit = os._exit
def report_and_exit(code):
    print("TORCH" if "torch" in sys.modules else "", end="")
    sys.stdout.flush()
    os_exit(code)
os._exit = report_and_exit
sys.argv = ["plan.py", *sys.argv[1:]]
runpy.run_path("launch/plan.py", run_name="__main__")
"""
# Top-level key of the JSON output, in order -> the keys of its value; None: not checked.
JSON_KEYS = {
    "settings": None,
    "model": None,
    "hardware": None,
    "choice": {
        "zero_stage", "micro_batch_size", "gradient_accumulation_steps", "global_batch_size",
        "checkpointed_layers", "hpz_partition_size", "offload_param", "sequence_parallel_size",
        "offload_activations", "mlp_tiles", "why",
    },
    "fast_paths": None,
    "proof": None,
    "memory": {
        "per_rank", "peak_bytes", "load_peak_bytes", "host_peak_bytes", "device_bytes", "fits",
    },
    "length": None,
    "longest": None,
    "speed": {"seconds_per_step", "tokens_per_second", "terms"},
    "answers": None,
    "decompositions": None,
    "disk": None,
    "candidates": None,
    "rules": None,
    "deepspeed": None,
}  # fmt: skip


Result = tuple[int, str, str]  # exit code, standard output, standard error


def run_plan(*arguments: str) -> Result:
    """Run launch/plan.py in a process, and assert that it did not import torch."""
    process = run_without_torch("-c", PLAN_AND_REPORT_TORCH, *arguments)
    assert "TORCH" not in process.stdout
    assert "Traceback" not in process.stderr
    return process.returncode, process.stdout, process.stderr


@pytest.fixture
def plan_llama_8b(tmp_path):
    """A function that calls run_plan with a run file for Llama 8B and further arguments.

    The model folder is tmp_path/model, without weights. The training data is tmp_path/train.jsonl,
    which does not exist. The run folder is tmp_path/run.
    """
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(LLAMA_8B))
    values = {"model": str(tmp_path / "model"), "train_data": str(tmp_path / "train.jsonl")}
    path = tmp_path / "RUN.yaml"
    path.write_text(yaml.safe_dump(values | {"output_dir": str(tmp_path / "run"), "lora_r": 16}))

    return partial(run_plan, str(path))


def test_json_has_exactly_the_documented_keys(plan_llama_8b):
    code, out, _ = plan_llama_8b("--gpu", "h100-80gb", "--gpus-per-node", "8", "--json")
    assert code == 0
    result = json.loads(out)
    assert list(result) == list(JSON_KEYS)
    for key, inner_keys in JSON_KEYS.items():
        assert inner_keys is None or result[key].keys() == inner_keys, key
    assert {"parameters", "trainable"} <= result["model"].keys()
    assert result["memory"]["peak_bytes"] == sum(result["memory"]["per_rank"].values())
    terms = result["speed"]["terms"]
    assert result["speed"]["seconds_per_step"] == pytest.approx(sum(terms.values()))
    for rule in result["rules"]:
        assert rule.keys() == {"id", "level", "message", "source"}
    assert result["deepspeed"]["zero_optimization"]["stage"] == result["choice"]["zero_stage"]
    assert set(result["choice"]["why"]) >= {"zero_stage", "micro_batch_size", "checkpointed_layers"}


def test_the_text_has_layout_reasons_memory_and_start_commands(plan_llama_8b, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a b", "completion": "c d"}\n' * 5000)
    options = ("--gpu", "a100-80gb", "--gpus-per-node", "8", "--all")
    code, out, _ = plan_llama_8b(*options, "global_batch_size=64", "packing=false")
    assert code == 0
    assert_mentions(
        out,
        "ZeRO-2", "global batch 64", "79 an epoch", "estimated",  # 5000 rows / 64
        "zero_stage", "activations", "host memory of a node", "disk: checkpoints",
        "longest", "tokens on 8 x", "1 of them",  # longest sequences on 8 GPUs and on one
        "s/step", "tokens/s", "deepspeed launch/train.py",
        "sbatch --nodes=1 --gpus-per-node=8 --cpus-per-gpu=4", "slurm/train.sbatch",
        "global_batch_size=64",
    )  # fmt: skip


# As the installed command `rankzero`, in a folder that is not a clone.
RANKZERO = "import sys; from pipeline.cli.rankzero import main; sys.argv[0] = 'rankzero'; main()"


@pytest.mark.parametrize(
    ("gpus", "start"),
    [("8", "deepspeed --module pipeline.cli.train"), ("1", "rankzero train")],
)
def test_the_start_command_of_an_installed_package_names_no_clone(
    plan_llama_8b, tmp_path, gpus, start
):
    (tmp_path / "train.jsonl").write_text('{"text": "a b"}\n' * 500)
    options = ("--gpu", "a100-80gb", "--gpus-per-node", gpus)
    result = subprocess.run(
        [sys.executable, "-c", RANKZERO, "plan", "RUN.yaml", *options],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert_mentions(result.stdout, f"start {start} RUN.yaml", "rankzero slurm .")
    assert "launch/" not in result.stdout


def test_the_cost_of_max_length_is_in_the_text_and_in_the_json(plan_llama_8b, tmp_path):
    # Without a tokenizer, 3.5 characters are estimated as one token: 100 and 100,000 tokens.
    rows = [json.dumps({"text": "x" * 350}), json.dumps({"text": "x" * 350_000})]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    options = ("--gpu", "h100-80gb", "--gpus-per-node", "1", "max_length=8192")
    _, out, _ = plan_llama_8b(*options)
    assert_mentions(
        out, "1 of 2 documents", "8,192 tokens", "truncated", "max_length 98,999 keeps 99 %",
        "max_length 100,000 keeps 100 %", "GiB a rank", "layers checkpointed",
    )  # fmt: skip
    length = json.loads(plan_llama_8b(*options, "--json")[1])["length"]
    assert (length["documents"], length["longer"], length["lost"]) == (2, 1, 100_000 - 8192)
    # 98,999 keeps 99 % of the 100,100 tokens, and 100,000 keeps all.
    assert [need["max_length"] for need in length["needs"]] == [98_999, 100_000]
    assert all(need["device_bytes"] > 0 for need in length["needs"])
    assert all(line in out for line in length["text"])
    _, out, _ = plan_llama_8b(*options, "max_length=100000")
    assert "keeps" not in out


def write_index(run_folder):
    """Write the index of prepared training data with 1000 documents, each in its own sequence.

    The key "k" is not that of any settings. It is checked only if the data files can be read.
    """
    split = SplitIndex(
        key="k", folder=Path("train-k"), documents=1000, tokens=300_000, supervised_tokens=1000,
        longest=700, sequences=1000, epoch_documents=1000, epoch_tokens=300_000,
    )  # fmt: skip
    (run_folder / "data").mkdir(parents=True)
    index = json.dumps(DataIndex(train=split, eval=None).as_json())
    (run_folder / "data/index.json").write_text(index)


def test_the_steps_are_counted_from_the_prepared_data(plan_llama_8b, tmp_path):
    write_index(tmp_path / "run")
    code, out, _ = plan_llama_8b("--gpu", "a100-80gb", "global_batch_size=50", "epochs=2")
    assert code == 0
    assert_mentions(out, "40", "20 an epoch", "2 of warm-up")  # 1000 sequences / 50, twice
    assert "estimated" not in out


def test_data_that_was_prepared_with_other_settings_is_not_used(plan_llama_8b, tmp_path):
    write_index(tmp_path / "run")
    (tmp_path / "train.jsonl").write_text('{"text": "a b c"}\n' * 40)
    code, out, _ = plan_llama_8b("--gpu", "a100-80gb", "global_batch_size=4", "packing=false")
    assert code == 0
    assert_mentions(out, "10 an epoch", "estimated")  # 40 rows / 4


def test_option_all_shows_why_each_candidate_does_not_fit(plan_llama_8b):
    code, out, err = plan_llama_8b(
        "--gpu-memory-gib", "16", "zero_stage=2", "global_batch_size=4", "--all"
    )
    assert code == 2
    # Micro-batches of 4, 2 and 1, each with activations on the device and in host memory.
    assert out.count("GiB a rank (") == 6
    assert "does not fit" in err


def test_if_no_plan_fits_the_json_has_the_plan_that_needs_the_least_memory(plan_llama_8b, tmp_path):
    (tmp_path / "model/config.json").write_text(json.dumps(LLAMA_70B))
    code, out, err = plan_llama_8b("--gpu-memory-gib", "16", "zero_stage=2", "--json")
    assert code == 2
    result = json.loads(out)
    assert list(result) == list(JSON_KEYS)
    memory = result["memory"]
    assert not memory["fits"]
    # A plan must leave a part of the device's memory free, so it may be refused below device_bytes.
    peak_bytes = max(memory["peak_bytes"], memory["load_peak_bytes"])
    assert peak_bytes > 0.9 * memory["device_bytes"]
    assert "does not fit" in err


def test_a_gpu_may_be_described_by_memory_and_tflops_on_several_nodes(plan_llama_8b, tmp_path):
    (tmp_path / "model/config.json").write_text(json.dumps(LLAMA_70B))
    code, out, _ = plan_llama_8b(
        "--gpu-memory-gib", "80", "--gpu-tflops", "900", "--nodes", "16", "--gpus-per-node", "8"
    )
    assert code == 0
    assert_mentions(out, "16 nodes", "sbatch --nodes=16 --gpus-per-node=8 --cpus-per-gpu=4")


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--gpu", "h100"], ["h100-80gb"]),
        (["--gpu", "h100-80gb", "--gpu-memory-gib", "80"], ["--gpu", "--gpu-memory-gib"]),
        (["--gpu-tflops", "100"], ["--gpu-tflops", "--gpu-memory-gib"]),
        (["--gpu-memory-gib", "-1"], ["--gpu-memory-gib", "-1"]),
        (["--gpu-memory-gib", "nan"], ["--gpu-memory-gib", "nan"]),
        (["--gpu-memory-gib", "24", "--gpu-tflops", "inf"], ["--gpu-tflops", "inf"]),
        (["--gpus-per-node", "0", "--gpu", "h100-80gb"], ["--gpus-per-node", "0"]),
        # Does not fit; the message has a setting with which it fits.
        (["--gpu-memory-gib", "16", "offload_param=none", "zero_stage=2"], ["load_in_4bit: true"]),
        (["--nodes", "0", "--gpu", "h100-80gb"], ["--nodes", "0"]),
        (["lora_rr=4"], ["lora_rr", "lora_r"]),
        # 8bit-zero3 is the rule that refuses 8-bit weights at ZeRO-3.
        (["load_in_8bit=true", "zero_stage=3", "--gpu", "h100-80gb"], ["8bit-zero3"]),
    ],
)
def test_an_impossible_plan_is_exit_2_with_one_message(plan_llama_8b, arguments, facts):
    code, out, err = plan_llama_8b(*arguments)
    assert (code, out) == (2, "")
    assert_mentions(err, *facts)


@pytest.fixture
def empty_hub_cache(tmp_path, monkeypatch):
    """No hub model is in the local cache, so the sizes that ship with the package are used."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_model_is_planned_by_its_name_without_a_run_file(empty_hub_cache):
    code, out, _ = run_plan("--model", "Qwen/Qwen3-32B", "--gpu", "h100-80gb", "lora_r=8")
    assert code == 0
    # Parameters; steps, which are unknown without data; and the date of the published sizes.
    facts = ("32,762.1 M", "67.11 M trainable", "unknown", "2026-11-29")
    assert_mentions(out, *facts, "hf download Qwen/Qwen3-32B")


def test_a_refused_model_is_planned_and_ends_with_the_rule(empty_hub_cache):
    # In the class of this model, packed documents are not separate, so the rule class-packs refuses
    # `packing: true`.
    arguments = ("--model", "Qwen/Qwen3.5-27B", "--gpu", "h200-141gb", "--gpus-per-node", "8")
    code, out, err = run_plan(*arguments, "packing=true", "--json")
    assert code == 2
    assert json.loads(out)["speed"]["tokens_per_second"] > 0
    assert_mentions(err, "class-packs")


def test_the_message_of_a_refused_model_that_does_not_fit_has_both_reasons(empty_hub_cache):
    code, out, err = run_plan(
        "--model", "Qwen/Qwen3.5-27B", "--gpu", "l4-24gb", "offload_param=none", "packing=true"
    )
    assert (code, out) == (2, "")
    assert_mentions(err, "does not fit", "class-packs")


def test_the_hub_cache_takes_precedence_over_the_built_in_models(empty_hub_cache, tmp_path):
    cached = tmp_path / "hub/models--Qwen--Qwen3-32B"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("abc")
    (cached / "snapshots/abc").mkdir(parents=True)
    config = json.dumps(LLAMA_8B | {"num_hidden_layers": 3})
    (cached / "snapshots/abc/config.json").write_text(config)
    code, out, _ = run_plan("--model", "Qwen/Qwen3-32B", "--gpu", "h100-80gb", "--json")
    assert code == 0
    model = json.loads(out)["model"]
    assert (model["layers"], model["model_type"], model["source"]) == (3, "llama", None)


def test_the_table_fits_100_columns_and_has_a_line_for_each_trainable_model(empty_hub_cache):
    code, out, _ = run_plan("--fits", "--gpu", "l4-24gb", "lora_r=8")
    assert code == 0
    assert_mentions(out, "Qwen/Qwen3-8B", "QLoRA", "tokens/s", "lora_r 8")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    first_words = {line.split()[0] for line in lines if line}
    assert first_words >= {m.name for m in published_models() if not m.refusal}


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--model", "Qwen/Qwen3-33B"], ["Qwen/Qwen3-33B", "Qwen/Qwen3-32B"]),
        (["lora_r=8"], ["--model", "RUN.yaml"]),
        ([], ["--fits"]),
        (["--model", "Qwen/Qwen3-8B", "lora_rr=8"], ["lora_rr", "lora_r"]),
    ],
)
def test_a_wrong_command_without_a_run_file_is_exit_2_with_one_message(
    empty_hub_cache, arguments, facts
):
    code, out, err = run_plan(*arguments)
    assert (code, out) == (2, "")
    assert_mentions(err, *facts)
