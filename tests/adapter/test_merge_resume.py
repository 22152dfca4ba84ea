"""An interrupted merge loses nothing that existed, and continues with the missing shards."""

import fcntl
import os
import resource
import signal
from contextlib import contextmanager

import pytest

from pipeline.adapter.merge_output import MARKER
from pipeline.adapter.merge_stream import MergeStream
from pipeline.errors import RankZeroError
from tests.adapter.merged import contents, edit_json, merge_adapter
from tests.commands import run
from tests.messages import refused

pytestmark = pytest.mark.tensor

# Merges a pair, and kills itself before writing more than N tensors. Arguments: the folder, and N.
KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.adapter.merge import merge_adapters
from pipeline.adapter.merge_plan import MergeOptions, WeightedAdapter
from pipeline.adapter.merge_stream import MergeStream

write, count = MergeStream._write, []

def killed(self, file, tensor):
    count.append(tensor)
    if len(count) > int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, file, tensor)

MergeStream._write = killed
pair = Path(sys.argv[1])
adapters = [WeightedAdapter(pair / "adapter")]
merge_adapters(pair / "base", adapters, pair / "merged", MergeOptions())
"""


@pytest.fixture
def pair(pair):
    """A base of four shards, an adapter, and an earlier merge of the adapter with another alpha."""
    merge(pair)
    edit_json(pair / "adapter" / "adapter_config.json", lora_alpha=24)
    return pair


def merge(pair, out="merged", **options):
    return merge_adapter(pair / "base", pair / "adapter", pair / out, **options)


def weights(folder):
    return {name: data for name, data in contents(folder).items() if name != MARKER}


@contextmanager
def interrupted(monkeypatch, num_shards):
    """Interrupt the merge in the body of this context after so many shards."""
    merge_shard, shards = MergeStream.merge_shard, []

    def interrupt(self, shard, target):
        if len(shards) == num_shards:
            raise KeyboardInterrupt
        shards.append(target.name)
        return merge_shard(self, shard, target)

    with monkeypatch.context() as patch:
        patch.setattr(MergeStream, "merge_shard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("num_shards", [0, 2, 3])
def test_an_interrupted_merge_keeps_the_old_one_and_continues(pair, monkeypatch, num_shards):
    before = contents(pair / "merged")
    with interrupted(monkeypatch, num_shards):
        merge(pair)
    assert contents(pair / "merged") == before
    report = merge(pair)
    assert (report.shards, report.resumed_shards) == (4, num_shards)
    assert report.tensors_merged == 14
    merge(pair, "fresh")
    assert weights(pair / "merged") == weights(pair / "fresh")
    assert {path.name for path in pair.iterdir()} == {"base", "adapter", "merged", "fresh"}


def changed_scaling(pair):
    edit_json(pair / "adapter" / "adapter_config.json", lora_alpha=3)


def changed_weights(pair):
    path = pair / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)


def changed_base(pair):
    path = min((pair / "base").glob("*.safetensors"))
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [changed_scaling, changed_weights, changed_base])
def test_a_merge_with_other_inputs_starts_again(pair, monkeypatch, change):
    with interrupted(monkeypatch, 2):
        merge(pair)
    change(pair)
    assert merge(pair).resumed_shards == 0
    merge(pair, "fresh")
    assert weights(pair / "merged") == weights(pair / "fresh")


def test_a_merge_in_another_dtype_starts_again(pair, monkeypatch):
    with interrupted(monkeypatch, 2):
        merge(pair)
    assert merge(pair, dtype="BF16").resumed_shards == 0


def test_a_finished_shard_that_was_truncated_is_written_again(pair, monkeypatch):
    with interrupted(monkeypatch, 2):
        merge(pair)
    shard = min((pair / ".merged.new").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    assert merge(pair).resumed_shards == 1
    merge(pair, "fresh")
    assert weights(pair / "merged") == weights(pair / "fresh")


def test_a_killed_merge_continues_after_its_last_complete_shard(pair):
    before = contents(pair / "merged")
    code, output = run("-c", KILLED, pair, "11")
    assert code == -signal.SIGKILL, output
    assert contents(pair / "merged") == before
    assert 0 < merge(pair).resumed_shards < 4
    merge(pair, "fresh")
    assert weights(pair / "merged") == weights(pair / "fresh")


def test_a_full_disk_is_one_message_and_the_merge_continues(pair):
    before = contents(pair / "merged")
    sizes = [path.stat().st_size for path in (pair / "base").glob("*.safetensors")]
    # A limit on the size of a file, too small for the largest shard, in place of a full disk.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) - 1, hard))
    try:
        with refused(pair / "merged", "File too large", "same command again", error=RankZeroError):
            merge(pair)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(pair / "merged") == before
    merge(pair)
    merge(pair, "fresh")
    assert weights(pair / "merged") == weights(pair / "fresh")


def test_two_merges_do_not_write_one_folder(pair):
    folder = pair / ".merged.new"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with refused(pair / "merged", "another merge"):
        merge(pair)
    os.close(descriptor)
    merge(pair)


def test_a_merge_that_cannot_succeed_leaves_nothing(pair):
    edit_json(pair / "adapter" / "adapter_config.json", lora_alpha=1e41)
    before = contents(pair)
    with refused("not finite", error=RankZeroError):
        merge(pair)
    assert contents(pair) == before
