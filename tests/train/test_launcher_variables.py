"""A run detects its launcher by the environment from before the run sets variables itself."""

import os
import signal

import pytest

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.train import run

pytestmark = pytest.mark.unit


@pytest.fixture
def interrupt_handler():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interrupt_handler")
def test_a_launcher_is_not_detected_by_variables_that_the_run_sets_itself(monkeypatch, tmp_path):
    """If CROSS_RANK is set when the process starts, DeepSpeed's launcher started the rank.

    The run then sets CROSS_RANK on every rank, because DeepSpeed needs it.
    """

    def check_environment(env, request_stop):
        del request_stop
        assert "CROSS_RANK" in os.environ
        assert "CROSS_RANK" not in env
        raise UserError("the check is complete")

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    monkeypatch.setattr(os, "environ", environment | {"DS_ACCELERATOR": "cpu"})
    monkeypatch.setattr(run, "watch_launchers", check_environment)
    settings = RunSettings(model="m", train_data="d", output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="the check is complete"):
        run.run_training(settings)
