"""run_module: a Python module that needs torch runs in a separate process, with a time limit."""

import subprocess

import pytest

from pipeline.plan.given import torch_process
from tests.messages import refused

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """Path of the module `example`; each test writes its code.

    The module runs in a new process, not in a fork as elsewhere in the suite (tests/conftest.py).
    """
    monkeypatch.setattr(torch_process, "subprocess", subprocess)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "example.py"


def test_the_module_runs_without_gpu_and_hub_and_its_output_is_returned(module):
    module.write_text(
        "import json, os, sys\n"
        "print('a warning')\n"
        "names = ('CUDA_VISIBLE_DEVICES', 'HF_HUB_OFFLINE')\n"
        "values = {name: os.environ[name] for name in names}\n"
        "print(json.dumps({'arguments': sys.argv[1:], **values}))"
    )
    output = torch_process.run_module("example", "folder", timeout_s=60)
    assert output == {"arguments": ["folder"], "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def test_the_error_has_the_exception_of_the_module(module):
    module.write_text("import sys\nsys.stderr.write('a warning\\n')\nraise ValueError('no heads')")
    with refused("ValueError", "no heads"):
        torch_process.run_module("example", timeout_s=60)


def test_a_module_that_does_not_end_is_refused_with_the_time_limit(module):
    module.write_text("import time\ntime.sleep(60)")
    with refused("1 s"):
        torch_process.run_module("example", timeout_s=1)
