"""The modules that a rank imports before its first step, and garbage collection meanwhile."""

import gc
import json
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest

from pipeline.train.run import collect_rarely, get_ready
from tests import ROOT

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
