"""Checkpoints are read exactly as written, and damaged ones are never resumed from."""

import errno
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.errors import RankZeroError
from pipeline.train.checkpoint import (
    Checkpoints,
    Identity,
    Progress,
    read_tensors,
)
from pipeline.train.resume import checkpoint_to_resume
from tests.messages import assert_mentions, refused

pytestmark = pytest.mark.tensor

# What a run must have in common with a checkpoint. "d" stands for the key of the training
# documents, "b" for the fingerprint of the base.
IDENTITY = Identity(data="d", base="b", total_steps=9, adapter="lora_r 4")
WEIGHTS = {"k.lora_A.weight": torch.randn(4, 8), "k.lora_B.weight": torch.randn(8, 4)}
MOMENTS = {  # the two moments of Adam
    f"{key}/{moment}": torch.randn_like(weight)
    for key, weight in WEIGHTS.items()
    for moment in ("exp_avg", "exp_avg_sq")
}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", IDENTITY, keep=2)


def write(checkpoints, step: int):
    return checkpoints.write(WEIGHTS, MOMENTS, Progress(step=step, optimizer_step=step - 1))


def test_a_checkpoint_is_read_exactly_as_written(checkpoints):
    path = write(checkpoints, 3)
    assert checkpoints.newest() == (path, [])
    assert checkpoints.require_resumable(path) == Progress(step=3, optimizer_step=2)
    weights, moments = read_tensors(path)
    for read, written in ((weights, WEIGHTS), (moments, MOMENTS)):
        assert read.keys() == written.keys()
        assert all(torch.equal(read[key], written[key]) for key in written)
    size = sum(file.stat().st_size for file in path.iterdir())
    # 4 bytes for each of 64 weights and for each of its two moments, and at most 4 KiB of headers
    assert size < 12 * 64 + 4096


def test_only_the_two_newest_checkpoints_are_kept(checkpoints, tmp_path):
    for step in (2, 4, 99_999_999):  # the largest number that has eight digits
        write(checkpoints, step)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-99999999"]


def damage_manifest(path):
    (path / "manifest.json").write_text("{")


def flip(name):
    """A function that flips one bit in a file of a checkpoint."""

    def damage(path):
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)

    return damage


def truncate(name):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-1])


NAMES = ("adapter.safetensors", "optimizer.safetensors", "state.json")
# Name of the damage -> function that damages the folder of a checkpoint.
DAMAGES = {
    "manifest": damage_manifest,
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "short manifest": lambda path: (path / "manifest.json").write_text('{"files": {}}'),
    "manifest is a list": lambda path: (path / "manifest.json").write_text("[]"),
    "a link to itself": lambda path: (shutil.rmtree(path), path.symlink_to(path.name)),
    "empty": lambda path: [file.unlink() for file in path.iterdir()],
    **{f"flipped {name}": flip(name) for name in NAMES},
    **{f"truncated {name}": truncate(name) for name in NAMES},
    **{f"no {name}": (lambda path, name=name: (path / name).unlink()) for name in NAMES},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_named_and_skipped(checkpoints, damage):
    older, newer = write(checkpoints, 3), write(checkpoints, 6)
    damage(newer)
    path, notes = checkpoints.newest()
    assert path == older
    assert len(notes) == 1
    assert str(newer) in notes[0]


def test_a_file_that_is_not_in_the_manifest_does_not_damage_a_checkpoint(checkpoints):
    write(checkpoints, 3)
    newer = write(checkpoints, 6)
    for name in (".DS_Store", ".nfs0001", "notes.txt"):
        (newer / name).write_bytes(b"x")
    assert checkpoints.newest() == (newer, [])


def test_without_an_intact_checkpoint_a_start_is_refused(checkpoints):
    assert checkpoint_to_resume(checkpoints, resume="auto", start="resume") == (None, [])
    written = [write(checkpoints, step) for step in (3, 6)]
    for path in written:
        flip("state.json")(path)
    for resume in ("auto", "must"):
        with refused(f"resume: {resume}", *written, "resume: never"):
            checkpoint_to_resume(checkpoints, resume, start="resume")
    assert checkpoint_to_resume(checkpoints, resume="never", start="new") == (None, [])


def test_resume_must_without_a_checkpoint_is_refused(checkpoints):
    with refused("resume: must", "resume: auto"):
        checkpoint_to_resume(checkpoints, resume="must", start="resume")


def test_a_new_run_does_not_resume_from_checkpoints_of_an_earlier_one(checkpoints):
    write(checkpoints, 3)
    assert checkpoint_to_resume(checkpoints, resume="auto", start="new") == (None, [])


@pytest.mark.parametrize(("namespace", "function"), [(Path, "iterdir"), (hashlib, "file_digest")])
def test_an_unreadable_checkpoint_is_an_error_and_not_skipped(
    checkpoints, monkeypatch, namespace, function
):
    """For example files of another user, or a network disk that does not answer."""
    write(checkpoints, 3)
    write(checkpoints, 6)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error", "somewhere")

    monkeypatch.setattr(namespace, function, fail)
    with refused("somewhere", "Input/output error"):
        checkpoints.newest()


def test_a_change_is_accepted_in_addition_to_those_of_accept_changes(checkpoints, tmp_path):
    write(checkpoints, 3)
    changed = replace(IDENTITY, data="e", total_steps=5)
    with refused("accept_changes: [data, total_steps]"):
        Checkpoints(checkpoints.folder, changed, 2, accepted=["data"]).require_resumable(
            tmp_path / "checkpoints/step-00000003"
        )


def test_the_checkpoint_just_written_is_never_pruned(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", IDENTITY, keep=1)
    damaged = write(checkpoints, 9)
    flip("adapter.safetensors")(damaged)
    # The run restarted before the damaged checkpoint, so the next one has a lower step.
    just_written = write(checkpoints, 3)
    assert checkpoints.newest() == (just_written, [])
    assert not damaged.exists()
    assert (tmp_path / "checkpoints/step-00000009-skipped-1").is_dir()


def test_another_run_is_refused_with_the_differences(checkpoints, tmp_path):
    path = write(checkpoints, 3)
    identity = Identity(data="d", base="other", total_steps=10, adapter="lora_r 4")

    def other_run(*accept_changes: str) -> Checkpoints:
        return Checkpoints(tmp_path / "checkpoints", identity, keep=2, accepted=accept_changes)

    facts = ("base: b -> other", "total_steps: 9 -> 10", "accept_changes: [base, total_steps]")
    with refused(path, *facts):
        other_run().require_resumable(path)
    with refused("total_steps: 9 -> 10"):
        other_run("base").require_resumable(path)
    assert other_run("base", "total_steps").require_resumable(path).step == 3


@pytest.mark.parametrize("split", ["d", "e"])  # keys of the training and the held-out documents
def test_other_tokens_of_the_same_data_are_refused_with_the_versions(checkpoints, tmp_path, split):
    def run_with(digest, transformers, *accept_changes, folder="checkpoints"):
        """Checkpoints of a run whose tokens have this digest, made by a transformers version."""
        return Checkpoints(
            tmp_path / folder,
            replace(IDENTITY, tokens={"d": "same", "e": "same", split: digest}),
            keep=2,
            accepted=accept_changes,
            metadata={"data_made_with": {"transformers": transformers, "jinja2": "3.1"}},
        )

    recorded_run = run_with("abc", "5.0")
    path = write(recorded_run, 3)
    assert recorded_run.require_resumable(path).step == 3
    assert run_with("abc", "6.0").require_resumable(path).step == 3
    assert checkpoints.require_resumable(path).step == 3  # before the data is prepared
    name = {"d": "training data", "e": "held-out data"}[split]
    facts = ("transformers 5.0", "6.0", tmp_path / "data", "accept_changes: [data]")
    with refused(path, name, *facts):
        run_with("def", "6.0").require_resumable(path)
    with refused(path, "chat_template_kwargs", "date"):  # the likely cause at equal versions
        run_with("def", "5.0").require_resumable(path)
    assert run_with("def", "6.0", "data").require_resumable(path).step == 3
    # A run in another folder may not accept other data of the checkpoint that it starts from.
    with refused(path, "transformers 5.0"):
        run_with("def", "6.0", "data", folder="other").require_resumable(path)
    without_digests = write(checkpoints, 4)  # as an earlier version wrote it
    assert recorded_run.require_resumable(without_digests).step == 4


def with_digests(folder, tokens) -> Checkpoints:
    """Checkpoints of a run; `tokens`: key of the documents of a split -> digest of their tokens."""
    return Checkpoints(folder / "checkpoints", replace(IDENTITY, tokens=tokens), keep=2)


def test_a_run_resumes_with_other_held_out_data(tmp_path):
    path = write(with_digests(tmp_path, {"d": "abc", "e": "def"}), 3)
    assert with_digests(tmp_path, {"d": "abc"}).require_resumable(path).step == 3
    assert with_digests(tmp_path, {"d": "abc", "f": "xyz"}).require_resumable(path).step == 3


def test_a_digest_recorded_by_an_earlier_version_is_compared_with_the_training_data(tmp_path):
    path = write(with_digests(tmp_path, "abc"), 3)  # one digest, without a key
    assert with_digests(tmp_path, {"d": "abc", "e": "def"}).require_resumable(path).step == 3
    with refused(path, "training data"):
        with_digests(tmp_path, {"d": "other"}).require_resumable(path)


def test_a_user_s_copies_are_neither_pruned_nor_resumed_from(checkpoints, tmp_path):
    checkpoints.write_best(WEIGHTS, Progress(step=3, best_step=3))
    first = write(checkpoints, 3)
    copies = [first.with_name(name) for name in ("step-00000003-keep", "step-keep", "best-mine")]
    for copy in copies:
        shutil.copytree(first, copy)
    for step in (6, 9, 12):
        write(checkpoints, step)
    assert sorted((tmp_path / "checkpoints").iterdir()) == sorted(
        [*copies, *(first.with_name(f"step-{step:08d}") for step in (9, 12))]
    )
    assert checkpoints.newest()[0].name == "step-00000012"
    for step in (9, 12):
        shutil.rmtree(first.with_name(f"step-{step:08d}"))
    assert checkpoints.newest() == (None, [])


def test_another_adapter_is_refused_with_every_value_of_accept_changes(checkpoints, tmp_path):
    path = write(checkpoints, 3)
    other = Checkpoints(
        tmp_path / "checkpoints",
        replace(IDENTITY, adapter="lora_r 8"),
        keep=2,
        accepted=("base", "data", "total_steps"),
    )
    with refused("adapter: lora_r 4 -> lora_r 8") as caught:
        other.require_resumable(path)
    assert "accept_changes" not in str(caught.value)


def test_an_interrupted_write_leaves_no_checkpoint(checkpoints, monkeypatch, tmp_path):
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


def test_a_full_disk_is_reported_before_anything_is_written(checkpoints, monkeypatch):
    older = write(checkpoints, 3)
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with refused("checkpoints", "MiB", error=RankZeroError):
        write(checkpoints, 6)
    assert checkpoints.newest() == (older, [])


def test_the_best_adapter_is_kept_while_a_checkpoint_names_it(checkpoints, tmp_path):
    checkpoints.write_best(WEIGHTS, Progress(step=4, best_step=4))
    checkpoints.write(WEIGHTS, MOMENTS, Progress(step=8, best_step=4))
    checkpoints.write_best(WEIGHTS, Progress(step=12, best_step=12))
    # A kill here resumes from step 8, whose best adapter is still that of step 4.
    weights = checkpoints.read_best(Progress(step=8, best_step=4))
    assert torch.equal(weights["k.lora_A.weight"], WEIGHTS["k.lora_A.weight"])
    checkpoints.write(WEIGHTS, MOMENTS, Progress(step=16, best_step=12))
    assert [p.name for p in (tmp_path / "checkpoints").glob("best-*")] == ["best-00000012"]
    (tmp_path / "checkpoints/best-00000012/adapter.safetensors").unlink()
    with refused("adapter.safetensors", "missing", error=RankZeroError):
        checkpoints.read_best(Progress(best_step=12))


@pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
def test_a_checkpoint_with_a_truncated_file_is_skipped(checkpoints, name):
    older, newer = write(checkpoints, 3), write(checkpoints, 6)
    whole = (newer / name).read_bytes()
    for twentieths in range(20):
        (newer / name).write_bytes(whole[: twentieths * len(whole) // 20])
        assert checkpoints.newest()[0] == older, twentieths


def test_resume_path_takes_the_newest_checkpoint_written_after_that_resume(checkpoints, tmp_path):
    """The setting `resume` names step 3, which is `origin`."""
    first = write(checkpoints, 3)
    write(checkpoints, 6)
    folder, origin = tmp_path / "checkpoints", str(first.absolute())
    resumed_run = Checkpoints(folder, IDENTITY, keep=2, origin=origin)
    path, notes = resumed_run.newest()
    assert path == first  # though step 6 is newer
    assert len(notes) == 1
    assert_mentions(notes[0], "step-00000006 is skipped", first)
    later = write(resumed_run, 5)
    assert resumed_run.newest() == (later, [])  # for a second start with the same settings
    assert (tmp_path / "checkpoints/step-00000006-skipped-1").is_dir()
    flip("state.json")(first)
    flip("state.json")(later)
    with refused("resume", first, "state.json"):
        resumed_run.newest()


def test_the_checkpoint_of_the_lowest_loss_is_kept_as_well(checkpoints, tmp_path):
    for step in (2, 4, 6, 8):
        checkpoints.write(WEIGHTS, MOMENTS, Progress(step=step, best_step=min(step, 4)))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006", "step-00000008"]


def test_there_are_never_more_checkpoints_than_predicted(checkpoints, tmp_path, monkeypatch):
    """Two checkpoints, the one of the lowest loss and one being written; and two best adapters."""
    checkpoints.identity = replace(IDENTITY, total_steps=24)
    counts, write_folder = {"step": [], "best": []}, checkpoints._write_folder

    def write_and_count(*args):
        write_folder(*args)
        for prefix, numbers in counts.items():
            numbers.append(len(list((tmp_path / "checkpoints").glob(f"{prefix}-*"))))

    monkeypatch.setattr(checkpoints, "_write_folder", write_and_count)
    # Several between two checkpoints (every 4 steps), one at a checkpoint long after the preceding
    # one, and one between checkpoints that is the last.
    steps_with_a_new_lowest_loss = (1, 2, 3, 4, 5, 6, 7, 8, 16, 18)
    for step in range(1, 25):
        best = max(best for best in steps_with_a_new_lowest_loss if best <= step)
        progress = Progress(step=step, best_step=best, optimizer_step=step)
        if best == step:
            checkpoints.write_best(WEIGHTS, progress)
        if step % 4 == 0:
            checkpoints.write(WEIGHTS, MOMENTS, progress)
            assert checkpoints.has_best(progress)
        newest_step = step // 4 * 4
        if newest_step:  # a kill here must leave the best adapter of the newest checkpoint
            resumed = checkpoints.require_resumable(checkpoints.newest()[0])
            assert resumed.step == newest_step
            assert checkpoints.has_best(resumed)
    assert max(counts["step"]) == 2 + 2
    assert max(counts["best"]) == 2


# A checkpoint is replaced by two renames: of the old folder to .NAME.old, and of the new to NAME.
def test_a_kill_between_the_two_renames_leaves_the_old_checkpoint(checkpoints):
    path = write(checkpoints, 3)
    path.rename(path.with_name(f".{path.name}.old"))
    assert checkpoints.newest() == (path, [])


def test_a_kill_after_the_second_rename_leaves_the_new_checkpoint(checkpoints):
    path = write(checkpoints, 3)
    path.rename(path.with_name(f".{path.name}.old"))
    write(Checkpoints(path.parent, IDENTITY, keep=2), 3)
    assert checkpoints.newest() == (path, [])


def test_state_json_has_the_schedule_the_versions_and_the_progress(tmp_path):
    metadata = {"schedule": {"total_steps": 9}, "versions": {"torch": "2"}}
    checkpoints = Checkpoints(tmp_path / "checkpoints", IDENTITY, keep=2, metadata=metadata)
    progress = Progress(
        step=3, optimizer_step=2, skipped_steps=1, documents=12, loss_scaler={"cur_scale": 8.0}
    )
    path = checkpoints.write(WEIGHTS, MOMENTS, progress)
    state = json.loads((path / "state.json").read_text())
    assert state["schedule"] == {"total_steps": 9}
    assert state["progress"]["documents"] == 12
    assert checkpoints.require_resumable(path) == progress


def of_another_folder(tmp_path, path, **fields) -> Checkpoints:
    """The checkpoints of a run in another folder, whose setting `resume` is `path`."""
    values = {"identity": IDENTITY, "keep": 2, "origin": str(path.resolve())} | fields
    return Checkpoints(tmp_path / "other/checkpoints", **values)


def test_a_run_in_another_folder_resumes_with_the_same_data_and_schedule(checkpoints, tmp_path):
    path = write(checkpoints, 3)
    assert of_another_folder(tmp_path, path).newest() == (path, [])
    assert of_another_folder(tmp_path, path).require_resumable(path).step == 3


@pytest.mark.parametrize("total_steps", [2, 3, 20])  # below, at and above the checkpoint's step
@pytest.mark.parametrize("data", ["d", "other"])
def test_another_data_set_or_schedule_needs_a_new_run(checkpoints, tmp_path, data, total_steps):
    """The position in the epoch and the learning rate would be those of the other run."""
    path = write(checkpoints, 3)
    identity = replace(IDENTITY, data=data, total_steps=total_steps)
    other = of_another_folder(tmp_path, path, identity=identity, accepted=("data", "total_steps"))
    with refused("resume", path, "total_steps: 9 -> ", "new run", "output_dir"):
        other.require_resumable(path)


@pytest.mark.parametrize("step", [9, 10])  # all 9 steps of the new run, or more
def test_a_finished_run_of_another_folder_has_no_step_left(checkpoints, tmp_path, step):
    path = write(checkpoints, step)
    with refused(path, f"step {step}", "step 9", "max_steps"):
        of_another_folder(tmp_path, path).require_resumable(path)


def with_total_steps(checkpoints, total_steps) -> Checkpoints:
    identity = replace(IDENTITY, total_steps=total_steps)
    return Checkpoints(checkpoints.folder, identity, 2, accepted=("total_steps",))


@pytest.mark.parametrize("total_steps", [7, 6])
def test_a_run_can_be_shortened_to_its_checkpoint(checkpoints, total_steps):
    path = write(checkpoints, 6)
    assert with_total_steps(checkpoints, total_steps).require_resumable(path).step == 6


def test_a_run_cannot_be_shortened_below_its_checkpoint(checkpoints):
    path = write(checkpoints, 6)
    with refused(path, "step 6", "step 5", "max_steps"):
        with_total_steps(checkpoints, 5).require_resumable(path)


# Shapes of the tensors of the only target module k, which WEIGHTS has.
A, B = {"k.lora_A.weight": (4, 8)}, {"k.lora_B.weight": (8, 4)}


def test_the_same_target_modules_are_accepted(checkpoints):
    path = write(checkpoints, 3)
    same = Checkpoints(path.parent, IDENTITY, 2, shapes=A | B)
    assert same.require_resumable(path).step == 3


@pytest.mark.parametrize(
    "shapes",
    [
        B | {"q.lora_A.weight": (4, 8)},
        B | {"k.lora_A.weight": (8, 4)},
        B,
        A | B | {"q.lora_A.weight": (4, 8)},
    ],
    ids=["name", "shape", "fewer", "more"],
)
def test_other_target_modules_are_refused_before_the_model_is_loaded(checkpoints, shapes):
    path = write(checkpoints, 3)
    with refused(path, "lora_target_modules", "lora_A.weight"):
        Checkpoints(path.parent, IDENTITY, 2, shapes=shapes).require_resumable(path)


def test_tensors_of_fused_experts_do_not_count_as_target_modules(checkpoints):
    """Only tensors of linear layers are compared before the model is loaded, the others after."""
    experts = {
        "l.experts.lora_A.weight": torch.zeros(2, 3),
        "l.experts.base_layer.lora_B.weight": torch.zeros(3, 2),
    }
    path = checkpoints.write(WEIGHTS | experts, MOMENTS, Progress(step=3))
    shapes = {key: tuple(tensor.shape) for key, tensor in WEIGHTS.items()}
    assert Checkpoints(path.parent, IDENTITY, 2, shapes=shapes).require_resumable(path).step == 3


def test_a_run_of_another_version_names_the_version_that_can_finish_it(tmp_path):
    old = {"versions": {"rankzero": "0.0.9"}}
    path = write(Checkpoints(tmp_path / "checkpoints", IDENTITY, 2, metadata=old), 3)
    now = Checkpoints(tmp_path / "checkpoints", replace(IDENTITY, data="another key"), 2)
    with refused(path, "data: d -> another key", "0.0.9"):
        now.require_resumable(path)
