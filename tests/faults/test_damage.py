"""A damaged checkpoint is named once and skipped, and the one before it is resumed."""

import shutil

import pytest

from tests.faults.runs import IS_FULL, adapter, finish, losses, start, status, steps_on_disk

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(3000),
    # One damage to a real run is in tests/e2e, all of them to a folder in tests/tensor.
    pytest.mark.skipif(not IS_FULL, reason="`make faults`"),
]
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def cut(name: str, share: float):
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


def plant(path):
    (path / "optimizer.pkl").write_bytes(b"cos\nsystem\n(S'touch HARMED'\ntR.")


def empty(path):
    for file in path.iterdir():
        file.unlink()


DAMAGES = {
    **{f"{name} cut at {place}/5": cut(name, place / 5) for name in FILES for place in range(5)},
    **{f"a byte of {name} flipped": flip(name) for name in FILES},
    **{f"no {name}": (lambda path, name=name: (path / name).unlink()) for name in FILES},
    "a planted pickle": plant,
    "a foreign file": lambda path: (path / "notes.txt").write_text("mine"),
    "an empty folder": empty,
}


@pytest.fixture(scope="module")
def stopped(run_file, workspace):
    """The folder of a run that was killed near its end, with two checkpoints."""
    path, folder = run_file("damaged"), workspace / "damaged"
    run = start(path)
    run.wait_for_step(42)
    run.kill()
    assert status(folder)["state"] == "running"
    assert len(steps_on_disk(folder)) >= 2
    return path, folder


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_skipped(stopped, straight, tmp_path, damage):
    path, folder = stopped
    keep = tmp_path / "keep"
    shutil.copytree(folder, keep)
    older, newest = sorted((folder / "checkpoints").glob("step-*"))[-2:]
    damage(newest)
    output = finish(path)
    assert output.count("is skipped") == 1
    assert f"{newest} is skipped" in output
    assert f"resuming from step {int(older.name[5:])}" in output
    assert adapter(folder) == adapter(straight)
    assert losses(folder) == losses(straight)
    shutil.rmtree(folder)
    shutil.copytree(keep, folder)  # for the next damage
