"""Fixtures of the fault tests: the data, and an undisturbed run."""

import signal
from pathlib import Path

import pytest

from tests.faults.runs import IN_PACKS, TOTAL_STEPS, finish, losses, write_run_file
from tests.tiny import make_rows


@pytest.fixture(scope="session", autouse=True)
def interrupts():
    """Runs get Ctrl-C as from a terminal, also where the tests are started with `&`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, tiny_model) -> Path:
    """The folder of training and held-out rows, run files and run folders."""
    folder = tmp_path_factory.mktemp("faults")
    make_rows(folder / "train.jsonl")
    make_rows(folder / "heldout.jsonl", 40)
    return folder


@pytest.fixture(scope="session")
def run_file(workspace, tiny_model):
    """Write a run file: name, settings -> its path."""
    return lambda name, **settings: write_run_file(workspace, name, tiny_model, **settings)


@pytest.fixture(scope="session")
def straight(run_file, workspace) -> Path:
    """The folder of an undisturbed run, which every broken one must equal."""
    finish(run_file("straight"))
    return workspace / "straight"


@pytest.fixture(scope="session")
def straight_in_packs(run_file, workspace) -> Path:
    """The same in packs, of as many steps."""
    finish(run_file("straight-in-packs", **IN_PACKS))
    assert len(losses(workspace / "straight-in-packs")) == TOTAL_STEPS
    return workspace / "straight-in-packs"
