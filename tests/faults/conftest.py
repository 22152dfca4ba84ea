"""Fixtures of the fault tests: rows, run files, and uninterrupted runs."""

import signal
from pathlib import Path

import pytest

from tests.faults.runs import IN_PACKS, TOTAL_STEPS, losses, run_to_end, write_run_file
from tests.tiny import make_rows


@pytest.fixture(scope="session", autouse=True)
def interrupts():
    """Let SIGINT reach the runs: they would ignore it if pytest was started with a shell's `&`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, tiny_model) -> Path:
    """A folder with training and held-out rows, run files and run folders."""
    folder = tmp_path_factory.mktemp("faults")
    make_rows(folder / "train.jsonl")
    make_rows(folder / "heldout.jsonl", 40)
    return folder


@pytest.fixture(scope="session")
def run_file(workspace, tiny_model):
    """Function: name of a run folder, and settings -> path of its run file, which is written."""
    return lambda name, **settings: write_run_file(workspace, name, tiny_model, **settings)


@pytest.fixture(scope="session")
def uninterrupted(run_file, workspace) -> Path:
    """The folder of an uninterrupted run, to which interrupted runs must be bitwise equal."""
    run_to_end(run_file("uninterrupted"))
    return workspace / "uninterrupted"


@pytest.fixture(scope="session")
def uninterrupted_in_packs(run_file, workspace) -> Path:
    """The folder of an uninterrupted run on packs, with as many steps as `uninterrupted`."""
    run_to_end(run_file("uninterrupted-in-packs", **IN_PACKS))
    assert len(losses(workspace / "uninterrupted-in-packs")) == TOTAL_STEPS
    return workspace / "uninterrupted-in-packs"
