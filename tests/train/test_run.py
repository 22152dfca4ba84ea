"""The modules that a rank imports before its first step, and garbage collection meanwhile."""

import gc
import json
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.train.run import collect_rarely, get_ready
from tests import ROOT
from tests.commands import run
from tests.tiny import make_rows

pytestmark = pytest.mark.tensor

# Modules that take long to import and that no step needs. inductor alone takes a second.
UNNEEDED = (
    "datasets", "pandas", "pyarrow", "scipy", "sklearn", "matplotlib", "setuptools", "triton",
    "tensorboard", "wandb", "mlflow", "trl", "torch._inductor.compile_fx",
    "torch.utils.cpp_extension", "transformers.trainer", "transformers.pipelines",
)  # fmt: skip
TRAINING = ("pipeline.train.assemble", "pipeline.train.finish", "pipeline.train.loop")
CODE = """
import json, sys
from types import SimpleNamespace
import pipeline.cli.train
from pipeline.cluster.devices import detect_hardware
from pipeline.cluster.placement import Placement
from pipeline.cluster.session import Session
from pipeline.train.run import get_ready
session = Session(Placement(), detect_hardware())
get_ready(SimpleNamespace(session=session))
print(json.dumps(sorted(sys.modules)))
session.start()
print(json.dumps(sorted(sys.modules)))
"""


def test_a_rank_imports_no_unneeded_module_before_its_first_step():
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=True
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith('["')]
    ready, started = (set(json.loads(line)) for line in lines)
    assert {"deepspeed", "bitsandbytes", *TRAINING} <= ready
    assert not {name for name in started if name.partition(".")[0] == "pipeline"} - ready
    assert not started & set(UNNEEDED)


def test_garbage_is_collected_rarely_until_all_modules_are_imported():
    before = gc.get_threshold()
    end = collect_rarely()
    try:
        assert gc.get_threshold()[0] > 100 * before[0]
    finally:
        end()
        frozen = gc.get_freeze_count()
        gc.unfreeze()
    assert gc.get_threshold() == before
    assert frozen > 10_000


class Layer:
    """An object in a reference cycle, like a layer with joined LoRA."""

    def __init__(self):
        self.cycle = self


def test_the_layers_of_the_class_check_are_freed(monkeypatch):
    layers = []
    proof = "pipeline.model.proof.require_proof"
    monkeypatch.setattr(proof, lambda plan: layers.append(weakref.ref(Layer())))
    placement = SimpleNamespace(rank=1)
    session = SimpleNamespace(import_deepspeed=lambda: None, placement=placement)
    end = collect_rarely()
    try:
        get_ready(SimpleNamespace(session=session, plan=None))
    finally:
        end()
        gc.collect()
        is_freed = [layer() is None for layer in layers]
        gc.unfreeze()
    assert is_freed == [True]


def test_an_error_of_the_class_check_is_left_to_rank_0(monkeypatch):
    """Rank 0 repeats the check, and its error is the one message of the run."""

    def refuse(plan):
        raise UserError("model: its class cannot be trained")

    monkeypatch.setattr("pipeline.model.proof.require_proof", refuse)
    session = SimpleNamespace(import_deepspeed=lambda: None, placement=SimpleNamespace(rank=1))
    end = collect_rarely()
    try:
        get_ready(SimpleNamespace(session=session, plan=None))
    finally:
        end()
        gc.unfreeze()


# launch/train.py, in which rank 0 prepares the data until rank 1 is ready, and then refuses it.
OVERLAP = """
import gc, sys, time
from pathlib import Path
sys.argv = ["train.py", sys.argv[1]]
from pipeline.cli.train import main
from pipeline.errors import UserError
from pipeline.train import run
from pipeline.train.folder import RunFolder

ready = Path(sys.argv[1]).with_suffix(".ready")

def prepare(folder):
    end = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < end:
        time.sleep(0.05)
    is_rare = gc.get_threshold()[0] > 100_000
    raise UserError(f"rank 1 is ready: {ready.exists()}, garbage is collected rarely: {is_rare}")

run.get_ready = lambda context: ready.touch()
RunFolder.prepare = prepare
main()
"""


def test_the_other_ranks_get_ready_while_rank_0_prepares_the_data(tmp_path, tiny_model):
    run_file = tmp_path / "run.yaml"
    settings = {
        "model": str(tiny_model), "train_data": str(make_rows(tmp_path / "train.jsonl")),
        "output_dir": str(tmp_path / "run"), "max_steps": 1, "max_length": 128,
    }  # fmt: skip
    run_file.write_text(yaml.safe_dump(settings))
    code, output = run("-c", OVERLAP, run_file, ranks=2)
    assert code == 2, output
    assert "rank 1 is ready: True, garbage is collected rarely: True" in output
