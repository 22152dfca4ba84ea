"""Checkpoints: what is read is what was written, and nothing damaged is ever read."""

import errno
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.errors import RankZeroError, UserError
from pipeline.train.assemble import _checkpoint_to_resume
from pipeline.train.checkpoint import Checkpoints, Identity, Progress

pytestmark = pytest.mark.tensor

IDENTITY = Identity(data="d", base="b", total_steps=9, adapter="lora_r 4")
WEIGHTS = {"k.lora_A.weight": torch.randn(4, 8), "k.lora_B.weight": torch.randn(8, 4)}
MOMENTS = {f"{k}/{m}": torch.randn_like(v) for k, v in WEIGHTS.items() for m in ("a", "b")}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", IDENTITY, keep=2)


def write(checkpoints, step: int):
    return checkpoints.write(WEIGHTS, MOMENTS, Progress(step=step, optimizer_step=step - 1))


def test_what_is_read_is_what_was_written(checkpoints):
    path = write(checkpoints, 3)
    assert checkpoints.newest() == (path, [])
    assert checkpoints.read_progress(path) == Progress(step=3, optimizer_step=2)
    weights, moments = checkpoints.read_tensors(path)
    for found, written in ((weights, WEIGHTS), (moments, MOMENTS)):
        assert found.keys() == written.keys()
        assert all(torch.equal(found[key], written[key]) for key in written)
    size = sum(file.stat().st_size for file in path.iterdir())
    assert size < 12 * 64 + 4096  # fp32 weights and two moments, and headers


def test_only_the_newest_are_kept(checkpoints, tmp_path):
    for step in (2, 4, 100_000_000 - 1):
        write(checkpoints, step)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-99999999"]


def damage_manifest(path):
    (path / "manifest.json").write_text("{")


def flip(name):
    def damage(path):
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)

    return damage


def cut(name):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-1])


NAMES = ("adapter.safetensors", "optimizer.safetensors", "state.json")
DAMAGES = {
    "manifest": damage_manifest,
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "short manifest": lambda path: (path / "manifest.json").write_text('{"files": {}}'),
    "list": lambda path: (path / "manifest.json").write_text("[]"),
    "foreign": lambda path: (path / "planted.pkl").write_bytes(b"cos\nsystem\n"),
    "empty": lambda path: [file.unlink() for file in path.iterdir()],
    **{f"flipped {name}": flip(name) for name in NAMES},
    **{f"cut {name}": cut(name) for name in NAMES},
    **{f"no {name}": (lambda path, name=name: (path / name).unlink()) for name in NAMES},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_one_is_named_and_passed_over(checkpoints, damage):
    older, newer = write(checkpoints, 3), write(checkpoints, 6)
    damage(newer)
    path, notes = checkpoints.newest()
    assert path == older
    assert len(notes) == 1
    assert str(newer) in notes[0]


def test_without_an_intact_one_a_start_is_refused_and_nothing_is_lost(checkpoints):
    """Not from step 0, unasked, over what may be of use to a person."""
    alone = SimpleNamespace(rank_zero_first=lambda work: work())
    assert _checkpoint_to_resume(checkpoints, alone, "auto") == (None, [])  # a new run
    written = [write(checkpoints, step) for step in (3, 6)]
    for path in written:
        flip("state.json")(path)
    for resume in ("auto", "must"):
        with pytest.raises(UserError, match=f"resume: {resume}, but no checkpoint is") as caught:
            _checkpoint_to_resume(checkpoints, alone, resume)
        assert all(f"{path} is passed over" in str(caught.value) for path in written)
        assert "resume: never to start anew" in str(caught.value)
    assert _checkpoint_to_resume(checkpoints, alone, "never") == (None, [])


def test_must_without_any_is_refused(checkpoints):
    alone = SimpleNamespace(rank_zero_first=lambda work: work())
    with pytest.raises(UserError, match="resume: must, but there is no checkpoint"):
        _checkpoint_to_resume(checkpoints, alone, "must")


@pytest.mark.parametrize("broken", ["folder", "file"])
def test_what_cannot_be_read_is_not_taken_for_damaged_or_missing(checkpoints, monkeypatch, broken):
    """As on a network's disk that is away for a moment, or of another user."""
    write(checkpoints, 3)
    write(checkpoints, 6)

    def refuse(*given):
        raise OSError(errno.EIO, "Input/output error", "somewhere")

    if broken == "folder":
        monkeypatch.setattr(Path, "iterdir", refuse)
    else:
        monkeypatch.setattr(hashlib, "file_digest", refuse)
    with pytest.raises(UserError, match=r"somewhere: cannot be read \(Input/output error\)"):
        checkpoints.newest()


def test_the_one_just_written_is_never_pruned(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", IDENTITY, keep=1)
    damaged = write(checkpoints, 9)
    flip("adapter.safetensors")(damaged)
    resumed = write(checkpoints, 3)  # from before the damaged one
    assert checkpoints.newest() == (resumed, [])
    assert not damaged.exists()
    assert (tmp_path / "checkpoints/step-00000009-passed-over-1").is_dir()  # a person may want it


def test_one_of_another_run_is_refused_with_the_difference(checkpoints, tmp_path):
    path = write(checkpoints, 3)
    identity = Identity(data="d", base="other", total_steps=10, adapter="lora_r 4")

    def other(*accepted: str) -> Checkpoints:
        return Checkpoints(tmp_path / "checkpoints", identity, keep=2, accepted=accepted)

    said = r"base: b -> other; total_steps: 9 -> 10; .*accept_changes: \[base, total_steps\]"
    with pytest.raises(UserError, match=said):
        other().read_progress(path)
    with pytest.raises(UserError, match="total_steps: 9 -> 10"):
        other("base").read_progress(path)
    assert other("base", "total_steps").read_progress(path).step == 3


def test_a_users_own_copies_are_neither_pruned_nor_taken(checkpoints, tmp_path):
    checkpoints.write_best(WEIGHTS, Progress(step=3, best_step=3))
    first = write(checkpoints, 3)
    own = [first.with_name(name) for name in ("step-00000003-keep", "step-keep", "best-mine")]
    for copy in own:
        shutil.copytree(first, copy)
    for step in (6, 9, 12):
        write(checkpoints, step)
    assert sorted((tmp_path / "checkpoints").iterdir()) == sorted(
        [*own, *(first.with_name(f"step-{step:08d}") for step in (9, 12))]
    )
    assert checkpoints.newest()[0].name == "step-00000012"
    for step in (9, 12):
        shutil.rmtree(first.with_name(f"step-{step:08d}"))
    assert checkpoints.newest() == (None, [])


def test_another_adapter_is_refused_whatever_is_accepted(checkpoints, tmp_path):
    path = write(checkpoints, 3)
    other = Checkpoints(
        tmp_path / "checkpoints",
        replace(IDENTITY, adapter="lora_r 8"),
        keep=2,
        accepted=("base", "data", "total_steps"),
    )
    with pytest.raises(UserError, match="adapter: lora_r 4 -> lora_r 8; put back") as caught:
        other.read_progress(path)
    assert "accept_changes" not in str(caught.value)


def test_a_write_that_is_cut_off_leaves_no_checkpoint(checkpoints, monkeypatch, tmp_path):
    older = write(checkpoints, 3)
    monkeypatch.setattr("pipeline.files.sync", kill)
    with pytest.raises(KeyboardInterrupt):
        write(checkpoints, 6)
    monkeypatch.undo()
    assert checkpoints.newest() == (older, [])
    assert write(checkpoints, 6).name == "step-00000006"
    assert not list((tmp_path / "checkpoints").glob(".*"))


def kill(path):
    raise KeyboardInterrupt


def test_a_full_disk_is_said_before_anything_is_touched(checkpoints, monkeypatch):
    older = write(checkpoints, 3)
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RankZeroError, match=r"needs .* MiB .* free"):
        write(checkpoints, 6)
    assert checkpoints.newest() == (older, [])


def test_the_best_is_kept_beside_them(checkpoints, tmp_path):
    checkpoints.write_best(WEIGHTS, Progress(step=4, best_step=4))
    checkpoints.write(WEIGHTS, MOMENTS, Progress(step=8, best_step=4))
    checkpoints.write_best(WEIGHTS, Progress(step=12, best_step=12))
    # Killed here, the run goes on from step 8, whose best is still that of step 4.
    found = checkpoints.read_best(Progress(step=8, best_step=4))
    assert torch.equal(found["k.lora_A.weight"], WEIGHTS["k.lora_A.weight"])
    checkpoints.write(WEIGHTS, MOMENTS, Progress(step=16, best_step=12))
    assert [p.name for p in (tmp_path / "checkpoints").glob("best-*")] == ["best-00000012"]
    (tmp_path / "checkpoints/best-00000012/adapter.safetensors").unlink()
    with pytest.raises(RankZeroError, match="is missing"):
        checkpoints.read_best(Progress(best_step=12))


@pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
def test_cut_anywhere_it_is_passed_over(checkpoints, name):
    older, newer = write(checkpoints, 3), write(checkpoints, 6)
    whole = (newer / name).read_bytes()
    for place in range(20):
        (newer / name).write_bytes(whole[: place * len(whole) // 20])
        assert checkpoints.newest()[0] == older, place


def test_a_named_one_is_left_for_what_descends_from_it(checkpoints, tmp_path):
    first = write(checkpoints, 3)
    write(checkpoints, 6)
    named = Checkpoints(tmp_path / "checkpoints", IDENTITY, keep=2, origin=str(first.absolute()))
    path, notes = named.newest()
    assert path == first  # though step 6 is newer
    assert len(notes) == 1
    assert "step-00000006 is passed over: it does not come from" in notes[0]
    later = write(named, 5)
    assert named.newest() == (later, [])  # a second start goes on
    assert (tmp_path / "checkpoints/step-00000006-passed-over-1").is_dir()
    flip("state.json")(first)
    flip("state.json")(later)
    with pytest.raises(UserError, match=r"step-00000003 is no intact checkpoint: state\.json"):
        named.newest()


def test_that_of_the_lowest_loss_is_kept_as_well(checkpoints, tmp_path):
    for step in (2, 4, 6, 8):
        checkpoints.write(WEIGHTS, MOMENTS, Progress(step=step, best_step=min(step, 4)))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006", "step-00000008"]


def test_never_more_on_the_disk_than_predicted(checkpoints, tmp_path, monkeypatch):
    """Two kept, that of the lowest loss, one being written; two best adapters."""
    seen, write_folder = {"step": [], "best": []}, checkpoints._write_folder

    def write_and_count(*given):
        write_folder(*given)
        for kind, counts in seen.items():
            counts.append(len(list((tmp_path / "checkpoints").glob(f"{kind}-*"))))

    monkeypatch.setattr(checkpoints, "_write_folder", write_and_count)
    for step in range(1, 25):  # the loss falls until step 8, then at 16 and 18 once more
        best = max(b for b in (1, 2, 3, 4, 5, 6, 7, 8, 16, 18) if b <= step)
        progress = Progress(step=step, best_step=best, optimizer_step=step)
        if best == step:
            checkpoints.write_best(WEIGHTS, progress)
        if step % 4 == 0:
            checkpoints.write(WEIGHTS, MOMENTS, progress)
            assert checkpoints.has_best(progress)
        named = step // 4 * 4
        if named:  # a kill may come here: what the newest checkpoint names is there
            resumed = checkpoints.read_progress(checkpoints.newest()[0])
            assert resumed.step == named
            assert checkpoints.has_best(resumed)
    assert max(seen["step"]) == 2 + 2
    assert max(seen["best"]) == 2


@pytest.mark.parametrize("is_second_done", [True, False])
def test_a_kill_between_two_renames_loses_nothing(checkpoints, is_second_done):
    path = write(checkpoints, 3)
    path.rename(path.with_name(f".{path.name}.old"))
    if is_second_done:
        write(Checkpoints(path.parent, IDENTITY, keep=2), 3)
    assert checkpoints.newest() == (path, [])


def test_state_says_what_a_reader_wants_to_know(tmp_path):
    about = {"schedule": {"total_steps": 9}, "versions": {"torch": "2"}}
    checkpoints = Checkpoints(tmp_path / "checkpoints", IDENTITY, keep=2, about=about)
    progress = Progress(
        step=3, optimizer_step=2, skipped_steps=1, documents=12, loss_scaler={"cur_scale": 8.0}
    )
    path = checkpoints.write(WEIGHTS, MOMENTS, progress)
    state = json.loads((path / "state.json").read_text())
    assert state["schedule"] == {"total_steps": 9}
    assert state["progress"]["documents"] == 12
    assert checkpoints.read_progress(path) == progress
