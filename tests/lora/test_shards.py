"""Shards of tensors, whatever else is at work in their folder."""

import os
import signal

import pytest
import torch
from support.full_disk import file_limit

from gen_accel.endings import unwinding
from gen_accel.files import NoRoom
from gen_accel.lora.caching.shards import PROGRESS, Shards, check_bytes

X = {"latents": torch.arange(1000.0)}


def test_a_run_leaves_the_shards_of_another_alone(tmp_path):
    """Where folders cannot be locked, nothing keeps two runs apart."""
    with Shards(tmp_path) as old:
        old.put("old", X)
        old.finish({}, {"old"})
    with Shards(tmp_path) as one, Shards(tmp_path) as other:
        other.put("theirs", X)
        other.finish({}, {"theirs"})
        (tmp_path / ".partial-theirs").touch()
        one.put("mine", X)
        one.finish({}, {"mine"})
    check_bytes(tmp_path, one.files)
    check_bytes(tmp_path, other.files)
    assert not any((tmp_path / name).exists() for name in old.files)
    assert (tmp_path / ".partial-theirs").exists()


def test_no_room_keeps_what_is_written(tmp_path):
    with pytest.raises(NoRoom, match=r"no room for .*shard-.*, which needs 0.4 MB"):
        with_a_full_disk(tmp_path)
    found = Shards(tmp_path)
    assert "small" in found
    assert "large" not in found
    assert not list(tmp_path.glob(".partial-*"))


def with_a_full_disk(folder):
    with file_limit(100_000), Shards(folder, shard_bytes=1) as shards:
        shards.put("small", X)
        shards.put("large", {"latents": torch.zeros(100_000)})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ends a process of its own")
@pytest.mark.parametrize("kind", ["SIGTERM", "SIGHUP"])
def test_a_signal_writes_what_is_in_memory(tmp_path, kind):
    number = getattr(signal, kind)
    pid = os.fork()
    if pid == 0:
        with unwinding(), Shards(tmp_path) as shards:
            shards.put("key", X)
            os.kill(os.getpid(), number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -number
    assert "key" in Shards(tmp_path)
    assert (tmp_path / PROGRESS).exists()
