"""The fingerprint of a base depends on every byte, and is cached only for unchanged files."""

import json
import os
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.model import fingerprint
from pipeline.model.fingerprint import (
    Fingerprint,
    base_fingerprint,
    base_of_run,
    record_base_of_run,
    require_base_of_run,
    require_recorded_base,
    sampled_fingerprint,
    start_hashing,
)
from tests.messages import assert_mentions, refused
from tests.tiny import make_model

pytestmark = pytest.mark.tensor


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKZERO_CACHE", str(tmp_path / "cache"))
    clear_process_cache(monkeypatch)


def clear_process_cache(monkeypatch):
    """Clear the cache of this process, to simulate a new one."""
    monkeypatch.setattr(fingerprint._HashCache, "_of_this_process", {})


@pytest.fixture
def base(tmp_path):
    return make_model(tmp_path / "base", tied=False, shards=3)


def flip(folder, key, byte=0):
    """Change one bit in a byte of a tensor in place, and restore the file's times."""
    path = next(path for path in folder.glob("*.safetensors") if key in load_file(path))
    header = fingerprint.read_header(path)
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(header.entries[key].start + byte)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("byte", [0, 777, 4095])  # the first and last of 4096 bytes, and another
def test_one_changed_bit_of_a_tensor_is_refused_with_the_tensor(base, byte):
    before = base_fingerprint(base)
    key = "model.layers.1.self_attn.q_proj.weight"
    flip(base, key, byte)
    after = base_fingerprint(base)
    assert after.digest != before.digest
    assert {name for name in before.tensors if before.tensors[name] != after.tensors[name]} == {key}
    with refused(base, key, "1 of", "do this instead"):
        require_recorded_base(before.as_json(), base, "do this instead")


@pytest.mark.parametrize("is_added", [True, False])
def test_an_added_or_a_missing_tensor_is_refused_with_its_name(base, is_added):
    """Such as a tensor of a head that another tool has added, or a shard that was lost."""
    before = base_fingerprint(base).as_json()
    path = min(base.glob("*.safetensors"))
    weights = load_file(path)
    name = "extra.weight" if is_added else next(iter(weights))
    if is_added:
        weights[name] = torch.zeros(2)
    else:
        del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    with refused(base, name, "1 of", "do this instead"):
        require_recorded_base(before, base, "do this instead")


def test_the_fingerprint_does_not_depend_on_shards(base, tmp_path):
    weights = {k: v for file in base.glob("*.safetensors") for k, v in load_file(file).items()}
    one = tmp_path / "one"
    one.mkdir()
    (one / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(weights, one / "model.safetensors", metadata={"format": "pt"})
    assert base_fingerprint(one) == base_fingerprint(base)


def test_shapes_and_config_are_part_of_the_fingerprint(base):
    before = base_fingerprint(base)
    path = next(base.glob("model-00003*.safetensors"))
    weights = load_file(path)
    key = next(key for key, weight in weights.items() if weight.dim() == 2)
    weights[key] = weights[key].reshape(weights[key].T.shape)  # the same bytes in another shape
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    with refused(key, "config.json", "2 of"):
        require_recorded_base(before.as_json(), base, "")


def test_an_unchanged_file_is_not_read_again_even_by_a_new_process(base, monkeypatch):
    before = base_fingerprint(base)
    clear_process_cache(monkeypatch)
    monkeypatch.setattr(fingerprint, "_hash_tensor", lambda *_: 1 / 0)
    assert base_fingerprint(base) == before


def test_a_copy_with_the_same_size_and_time_is_read_again(base, monkeypatch):
    """The copy is detected by its inode."""
    key = "model.layers.0.mlp.up_proj.weight"
    before = base_fingerprint(base)
    for path in base.glob("*.safetensors"):
        stat, content = path.stat(), path.read_bytes()
        path.rename(path.with_suffix(".old"))
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    flip(base, key)
    with refused(key):
        require_recorded_base(before.as_json(), base, "")


def test_hashes_are_cached_in_the_process_if_the_cache_cannot_be_written(base, monkeypatch):
    monkeypatch.setenv("RANKZERO_CACHE", "/dev/null")
    before = base_fingerprint(base)
    monkeypatch.setattr(fingerprint, "_hash_tensor", lambda *_: 1 / 0)
    assert base_fingerprint(base) == before


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 2, "files": {"a": 1}}'])
def test_a_damaged_cache_is_ignored(base, monkeypatch, content):
    before = base_fingerprint(base)
    for path in (base.parent / "cache").rglob("*.json"):
        path.write_text(content)
    clear_process_cache(monkeypatch)
    assert base_fingerprint(base) == before


def test_a_fingerprint_of_version_1_is_compared_by_samples_and_that_is_logged(base, caplog):
    recorded = sampled_fingerprint(base)
    require_recorded_base(recorded, base, "")
    assert_mentions(caplog.text, base, "samples", "other bytes")
    flip(base, "model.layers.0.input_layernorm.weight")  # the tiny files are sampled as a whole
    with refused(base, "the remedy"):
        require_recorded_base(recorded, base, "the remedy")


def test_a_fingerprint_of_a_later_version_is_refused(base):
    with refused("version 3", "version 2"):
        require_recorded_base(base_fingerprint(base).as_json() | {"version": 3}, base, "")


@pytest.mark.parametrize("recorded", [None, {}, [], "text", {"version": 2, "tensors": []}])
def test_a_damaged_record_is_refused(base, recorded):
    with refused("damaged"):
        require_recorded_base(recorded, base, "")


def test_a_run_resumes_only_with_its_base(base, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    digest = require_base_of_run(run, base)  # a new run has no record
    record_base_of_run(run, base)
    assert require_base_of_run(run, base) == digest == base_of_run(run, base).digest
    flip(base, "lm_head.weight")
    with refused("lm_head.weight", "accept_changes"):
        require_base_of_run(run, base)
    assert base_of_run(run, base).digest == digest  # of the base on which the adapter was trained


def test_a_damaged_record_of_the_base_is_not_compared(base, tmp_path):
    """The digest in the checkpoint is compared."""
    (tmp_path / "base.json").write_text('{"a')
    assert require_base_of_run(tmp_path, base) == base_fingerprint(base).digest


def test_a_fingerprint_survives_json(base):
    before = base_fingerprint(base)
    assert Fingerprint.from_json(json.loads(json.dumps(before.as_json()))) == before


def test_every_dtype_of_a_checkpoint_is_hashed(tmp_path):
    folder = make_model(tmp_path / "model", dtype="bfloat16")
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"extra": torch.zeros(0, dtype=torch.int8)}, path)
    assert "extra" in base_fingerprint(folder).tensors


def test_a_base_that_is_hashed_in_a_thread_is_read_once(base, monkeypatch):
    expected, hashed = base_fingerprint(base).digest, []
    (base.parent / "cache").rename(base.parent / "earlier")
    clear_process_cache(monkeypatch)
    hash_file = fingerprint._hash_file

    def slow(path):
        hashed.append(path.name)
        time.sleep(0.1)
        return hash_file(path)

    monkeypatch.setattr(fingerprint, "_hash_file", slow)
    start_hashing(base)
    while not hashed:
        time.sleep(0.01)
    assert base_fingerprint(base).digest == expected
    assert sorted(hashed) == sorted(path.name for path in base.glob("*.safetensors"))


def test_an_error_of_the_thread_is_raised_by_the_later_call_only(base, monkeypatch):
    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    for path in base.glob("*.safetensors"):
        path.write_bytes(b"no tensors")
    start_hashing(base)
    with refused(base):
        base_fingerprint(base)
    for thread in threading.enumerate():
        if thread.name == "fingerprint":
            thread.join()
    assert tracebacks == []
