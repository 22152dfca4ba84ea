"""A damaged checkpoint is skipped with one message, and the previous one is resumed from."""

import shutil

import pytest

from tests.faults.runs import IS_FULL, adapter, losses, run_to_end, start, status, steps_on_disk

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(3000),
    # `make test` covers one kind of damage in a run (tests/cli/test_train.py), and all kinds in
    # a checkpoint that is only read (tests/train).
    pytest.mark.skipif(not IS_FULL, reason="in `make faults` only"),
]
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def truncate(name: str, share: float):
    def damage(path):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(share * len(content))])

    return damage


def flip(name: str):
    def damage(path):
        content = bytearray((path / name).read_bytes())
        content[len(content) // 3] ^= 0x10
        (path / name).write_bytes(content)

    return damage


def add_pickle(path):
    (path / "optimizer.pkl").write_bytes(b"cos\nsystem\n(S'touch HARMED'\ntR.")


def empty(path):
    for file in path.iterdir():
        file.unlink()


# Kind of damage -> function that damages the folder of a checkpoint.
KINDS_OF_DAMAGE = {
    **{f"{name} cut to {n}/5": truncate(name, n / 5) for name in FILES for n in range(5)},
    **{f"a bit of {name} flipped": flip(name) for name in FILES},
    **{f"no {name}": (lambda path, name=name: (path / name).unlink()) for name in FILES},
    "an added pickle": add_pickle,
    "a file of the user": lambda path: (path / "notes.txt").write_text("mine"),
    "an empty folder": empty,
}


@pytest.fixture(scope="module")
def stopped(run_file, workspace):
    """Run file and folder of a run that was killed near its end, with two checkpoints."""
    path, folder = run_file("damaged"), workspace / "damaged"
    run = start(path)
    run.wait_for_step(42)  # of 48
    run.kill()
    assert status(folder)["state"] == "running"
    assert len(steps_on_disk(folder)) >= 2
    return path, folder


@pytest.mark.parametrize("damage", KINDS_OF_DAMAGE.values(), ids=KINDS_OF_DAMAGE.keys())
def test_a_run_resumes_bitwise_from_the_checkpoint_before_a_damaged_one(
    stopped, uninterrupted, tmp_path, damage
):
    path, folder = stopped
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    older, newest = sorted((folder / "checkpoints").glob("step-*"))[-2:]
    damage(newest)
    output = run_to_end(path)
    assert output.count("is skipped") == 1
    assert f"{newest} is skipped" in output
    assert f"resuming from step {int(older.name[5:])}" in output
    assert adapter(folder) == adapter(uninterrupted)
    assert losses(folder) == losses(uninterrupted)
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)  # for the next damage
