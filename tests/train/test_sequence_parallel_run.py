"""Whole runs whose two ranks share each sequence, resumed and compared with a run on one rank."""

import signal
import time

import pytest
import yaml
from safetensors.torch import load_file

from pipeline.files import read_json
from pipeline.train.metrics import read_metrics
from tests.commands import Command, run
from tests.messages import assert_mentions
from tests.tiny import make_rows
from tests.train_tiny import distance

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

# After one rank is killed, the other must end within this time; tests/faults has the same limit
# for kills at other places.
MAX_END_S = 15
# Micro-batches of a step, and all-to-all exchanges of a decoder layer in a forward pass.
MICRO_BATCHES, EXCHANGES = 4, 2
# Runs launch/train.py. Rank 1 kills itself before the N-th all-to-all of the second decoder layer,
# so that rank 0 waits for it in that all-to-all. Only those in forward passes are counted.
# Arguments: a file for the time and the stack of the kill, N, and those of launch/train.py.
KILL_RANK_1_IN_ALL_TO_ALL = """
import os, runpy, signal, sys, time, traceback
import torch.distributed as dist

report, fatal_call, *arguments = sys.argv[1:]
all_to_all_single, calls = dist.all_to_all_single, 0

def all_to_all_single_or_die(*rows, **options):
    global calls
    frames = [frame for frame, _ in traceback.walk_stack(None)]
    attention = [frame for frame in frames if frame.f_code.co_name == "_attend"]
    calls += any(frame.f_locals["module"].layer_idx == 1 for frame in attention)
    if calls == int(fatal_call) and os.environ["RANK"] == "1":
        with open(report, "w") as file:
            file.write(f"{time.time()}\\n{''.join(traceback.format_stack())}")
        os.kill(os.getpid(), signal.SIGKILL)
    return all_to_all_single(*rows, **options)

dist.all_to_all_single = all_to_all_single_or_die
sys.argv = ["launch/train.py", *arguments]
sys.path.insert(0, "launch")
runpy.run_path("launch/train.py", run_name="__main__")
"""
COUNTED = ("step", "tokens", "supervised_tokens", "epoch")  # exact fields of metrics.jsonl


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_model):
    """Function: name of the run folder, ranks and settings -> the folder of the finished run.

    Its attributes: `folder` of all runs and of run.yaml, and `output`, by name of the run.
    """
    folder = tmp_path_factory.mktemp("split")
    make_rows(folder / "train.jsonl")
    make_rows(folder / "heldout.jsonl", 5)
    settings = {
        "model": str(tiny_model), "train_data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "heldout.jsonl"), "lora_r": 4, "lora_dropout": 0.0, "lr": 5e-3,
        "max_steps": 4, "global_batch_size": 4, "batch_size": 1, "max_length": 128, "save_steps": 2,
        "eval_steps": 2, "evaluation_strategy": "steps", "logging_steps": 1, "bf16": False,
        "output_dir": str(folder / "unnamed"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))

    def run_to_end(name, ranks, *overrides):
        arguments = ("launch/train.py", folder / "run.yaml", f"output_dir={folder / name}")
        code, output = run(*arguments, *overrides, ranks=ranks)
        assert code == 0, output
        run_to_end.output[name] = output
        return folder / name

    run_to_end.folder, run_to_end.output = folder, {}
    return run_to_end


@pytest.fixture(scope="module")
def one_rank(start):
    """Folder of a finished run on one rank."""
    return start("one_rank", 1)


@pytest.fixture(scope="module")
def two_ranks(start):
    """Folder of a finished run on two ranks that share each sequence."""
    return start("two_ranks", 2, "sequence_parallel_size=2")


def weights(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def values(folder, key, first_step=1):
    """The values of a field in metrics.jsonl, by step."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [line[key] for line in lines if key in line and line["step"] >= first_step]


def test_a_run_of_two_ranks_that_share_sequences_equals_a_run_on_one_rank(one_rank, two_ranks):
    assert distance(weights(two_ranks), weights(one_rank)) < 1e-5
    for key in COUNTED:
        assert values(two_ranks, key) == values(one_rank, key)
    for key in ("loss", "eval_loss", "grad_norm"):
        assert values(two_ranks, key) == pytest.approx(values(one_rank, key), rel=1e-5)


def test_a_run_resumes_on_one_rank_from_a_checkpoint_of_two_that_shared_sequences(start, two_ranks):
    checkpoint = two_ranks / "checkpoints/step-00000002"
    resumed = start("resumed", 1, f"resume={checkpoint}")
    assert values(resumed, "step")[0] == 3
    assert_mentions(start.output["resumed"], "ranks: 2 -> 1", "sequence_parallel_size: 2 -> 1")
    assert values(resumed, "loss") == pytest.approx(
        values(two_ranks, "loss", first_step=3), rel=1e-5
    )
    assert distance(weights(resumed), weights(two_ranks)) < 1e-5


def test_a_checkpoint_does_not_depend_on_the_ranks_that_share_sequences(one_rank, two_ranks):
    checkpoints = [folder / "checkpoints/step-00000004" for folder in (one_rank, two_ranks)]
    assert len({frozenset(path.name for path in folder.iterdir()) for folder in checkpoints}) == 1
    expected, state = (read_json(folder / "state.json") for folder in checkpoints)
    for key in expected.keys() - {"fast_paths", "division", "progress"}:
        assert state[key] == expected[key], key
    for key, value in expected["progress"].items():
        same = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        assert state["progress"][key] == same, key


def test_a_rank_that_is_killed_in_an_all_to_all_is_named_and_the_run_resumes(start, two_ranks):
    """Rank 1 gets SIGKILL in the second layer's all-to-all, in the first micro-batch of step 4."""
    folder, report = start.folder / "killed", start.folder / "report"
    arguments = (
        start.folder / "run.yaml", f"output_dir={folder}", "sequence_parallel_size=2",
        "eval_data=null",
    )  # fmt: skip
    fatal_call = 3 * MICRO_BATCHES * EXCHANGES + 1  # the first after three steps
    with Command(
        "-c", KILL_RANK_1_IN_ALL_TO_ALL, report, fatal_call, *arguments, ranks=2
    ) as command:
        codes = command.exit_codes(within_s=60)
        ended_at = time.time()
    killed_at, stack = report.read_text().split("\n", 1)
    assert ended_at - float(killed_at) < MAX_END_S
    assert "in heads_of_whole_sequence" in stack
    assert "in all_to_all_single_or_die" in stack
    assert codes == [1, -signal.SIGKILL]
    status = read_json(folder / "status.json")
    assert status["state"] == "failed"
    assert_mentions(status["reason"], "rank 1", "step 3")
    assert values(folder, "step") == [1, 2, 3]
    code, output = run("launch/train.py", *arguments, ranks=2)
    assert code == 0, output
    assert_mentions(output, "resuming from step 2")
    assert distance(weights(folder), weights(two_ranks)) == 0
