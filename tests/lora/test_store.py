"""The store of a cache: shards, a database, facts; kills, full disks, damage, and two at once."""

import json
import os
import random
import shutil
import signal
import sqlite3
import time
import tracemalloc

import pytest
import torch
from support.full_disk import file_limit

from gen_accel.io import NoRoom, clear_partial
from gen_accel.lora.caching import store as store_module
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.caching.store import (
    DATABASE,
    EARLIER,
    Database,
    Store,
    is_finished,
    tensors_of,
)
from gen_accel.process import unwinding

X = {"latents": torch.arange(1000.0)}
MANIFEST = {"empty": "t0", "causal": True, "fps": None, "digests": {}}


def entry(i, key=None):
    sizes = {"frames": 1, "height": 1, "width": 1, "pixel_frames": 1}
    keys = {"latent_key": key or f"{i}", "text_key": "t0"}
    return {"name": f"{i}.mp4", "caption": f"{i}", **sizes, **keys}


def value(i):
    return torch.full((1, 1, 1, 4), float(i))


def fill(folder, numbers, **options):
    """Write the clips of these numbers, of which some may be there."""
    with Store(folder, **options) as store:
        if "t0" not in store:
            store.put("t0", {"text": torch.zeros(2)})
        for i in numbers:
            store.remember(f"clip {i}", {"frames": i})
            if f"{i}" not in store:
                store.put(f"{i}", {"latents": value(i)})
        keys = ["t0", *(f"{i}" for i in numbers)]
        return store.finish(MANIFEST, keys, map(entry, numbers))


def check(folder, numbers):
    """All clips are there, and each is what was put."""
    found = LatentCache(folder)
    found.verify()
    assert [one.name for one in found.entries] == [f"{i}.mp4" for i in numbers]
    for place, i in enumerate(numbers):
        assert torch.equal(found.latents(place), value(i))
        assert found.fact(f"clip {i}") == {"frames": i}


def test_what_is_put_is_read_by_the_next(tmp_path):
    assert fill(tmp_path, range(5)) == 0
    check(tmp_path, range(5))
    assert fill(tmp_path, range(2, 6)) == 2
    check(tmp_path, range(2, 6))
    with Store(tmp_path) as store:
        assert "1" not in store or store.read("1")["latents"][0, 0, 0, 0] == 1
        assert torch.equal(store.read("5")["latents"], value(5))
        with pytest.raises(KeyError):
            store.read("9")


def test_a_shard_that_no_clip_needs_goes(tmp_path):
    fill(tmp_path, range(5), shard_bytes=1)
    assert len([*tmp_path.glob("shard-*")]) == 6
    fill(tmp_path, range(2), shard_bytes=1)
    assert len([*tmp_path.glob("shard-*")]) == 3
    assert {path.name[:6] for path in tmp_path.iterdir()} == {DATABASE[:6], "shard-"}


def test_small_tensors_fill_a_shard_by_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_TENSORS", 4)
    with Store(tmp_path) as store:
        for i in range(10):
            store.put(f"{i}", {"x": torch.full((3,), float(i))})
    assert sorted(len(tensors_of(path)) for path in tmp_path.glob("shard-*")) == [2, 4, 4]


def test_a_key_of_several_tensors(tmp_path):
    with Store(tmp_path) as store:
        store.put("a", {"text": torch.ones(2), "mask": torch.zeros(1), "deep": torch.tensor(3)})
        assert "a" in store
    with Store(tmp_path) as store:
        found = store.read("a")
    assert {name: x.tolist() for name, x in found.items()} == {
        "deep": 3,
        "mask": [0.0],
        "text": [1.0, 1.0],
    }


def test_facts(tmp_path):
    facts = {"a": [1, {"x": None}], "ä\udcff": "ö\udcff", "b": 0.5}
    with Store(tmp_path) as store:
        for key, fact in facts.items():
            store.remember(key, "another")
            store.remember(key, fact)
    with Store(tmp_path) as store:
        assert {key: store.fact(key) for key in facts} == facts
        assert store.fact("c") is None


def test_facts_are_there_for_others_while_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "FACT_SECONDS", 0.0)
    with Store(tmp_path) as store:
        store.remember("a", 1)
        db = Database(tmp_path)
        assert db.fact("a") == 1
        db.close()


def test_a_reader_goes_on_while_the_cache_is_made_again(tmp_path):
    fill(tmp_path, range(4), shard_bytes=1)
    before = LatentCache(tmp_path)
    fill(tmp_path, range(2, 7), shard_bytes=1)
    assert [one.name for one in before.entries] == [f"{i}.mp4" for i in range(4)]
    assert torch.equal(before.latents(3), value(3))
    with pytest.raises(ValueError, match="was made again while it was read: begin again"):
        before.latents(0)


def test_the_same_clips_again_are_the_same_cache(tmp_path):
    fill(tmp_path, range(4))
    before = LatentCache(tmp_path)
    assert fill(tmp_path, range(4)) == 0
    assert LatentCache(tmp_path).digest == before.digest


def test_a_reader_is_not_kept_waiting_by_a_writer(tmp_path):
    fill(tmp_path, range(4))
    with Store(tmp_path, shard_bytes=1) as store:
        store.put("new", X)
        store.remember("fact", 1)  # a transaction that is open
        check(tmp_path, range(4))


def test_a_folder_that_may_only_be_read(tmp_path, monkeypatch):
    fill(tmp_path, range(4))
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    check(tmp_path, range(4))


class TestEnds:
    def test_no_room_keeps_what_is_written(self, tmp_path):
        with pytest.raises(NoRoom, match=r"no room for .*shard-.*, which needs 0.4 MB"):
            with_a_full_disk(tmp_path)
        with Store(tmp_path) as found:
            assert "small" in found
            assert "large" not in found
        assert not list(tmp_path.glob(".partial-*"))

    def test_no_room_for_the_database(self, tmp_path):
        fill(tmp_path, range(4))
        size = (tmp_path / DATABASE).stat().st_size
        with pytest.raises(OSError, match=r"cache\.db"), file_limit(2 * size):
            fill(tmp_path, range(1500), shard_bytes=2**10)
        check(tmp_path, range(4))
        fill(tmp_path, range(400))
        check(tmp_path, range(400))

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="ends a process of its own")
    @pytest.mark.parametrize("kind", ["SIGTERM", "SIGHUP"])
    def test_a_signal_writes_what_is_in_memory(self, tmp_path, kind):
        number = getattr(signal, kind)
        pid = os.fork()
        if pid == 0:
            signal.signal(number, signal.SIG_DFL)  # nohup has SIGHUP ignored
            with unwinding(), Store(tmp_path) as store:
                store.put("key", X)
                os.kill(os.getpid(), number)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -number
        with Store(tmp_path) as store:
            assert "key" in store

    def test_an_error_while_a_run_finishes_changes_nothing(self, tmp_path):
        fill(tmp_path, range(4))

        def entries():
            yield from map(entry, range(300))
            raise RuntimeError("stop")

        with Store(tmp_path) as store:
            store.put("9", {"latents": value(9)})
            with pytest.raises(RuntimeError, match="stop"):
                store.finish(MANIFEST, ["t0"], entries())
        check(tmp_path, range(4))
        with Store(tmp_path) as store:
            assert "9" in store

    def test_a_shard_whose_rows_were_not_written(self, tmp_path):
        """A process that was killed between the two."""
        fill(tmp_path, range(3), shard_bytes=1)
        shutil.copytree(tmp_path, tmp_path / "before")
        fill(tmp_path, range(5), shard_bytes=1)
        shutil.copy(tmp_path / "before" / DATABASE, tmp_path)
        shutil.rmtree(tmp_path / "before")
        check(tmp_path, range(3))
        with Store(tmp_path) as store:
            assert torch.equal(store.read("4")["latents"], value(4))

    @pytest.mark.slow
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes of its own")
    def test_kills_at_any_moment(self, tmp_path):
        """Each leaves a cache that can be read, and the runs together the clips of one."""
        clips, seed, folder = 400, random.Random(0), tmp_path / "killed"
        start = time.perf_counter()
        fill(tmp_path / "timed", range(clips), shard_bytes=64)
        lasts = time.perf_counter() - start
        fill(folder, range(7))
        kills = 0
        for _ in range(30):
            pid = os.fork()
            if pid == 0:
                fill(folder, range(clips), shard_bytes=64)
                os._exit(0)
            time.sleep(seed.uniform(0, lasts))
            os.kill(pid, signal.SIGKILL)
            kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            found = LatentCache(folder)
            found.verify()
            assert len(found) in (7, clips)
            for place, one in enumerate(found.entries):
                assert torch.equal(found.latents(place), value(int(one.name[:-4])))
            if len(found) == clips:  # a run that finds all done is too short to be killed
                shutil.rmtree(folder)
                fill(folder, range(7))
        assert kills > 10
        fill(folder, range(clips), shard_bytes=64)
        check(folder, range(clips))
        fill(tmp_path / "whole", range(clips))
        assert LatentCache(folder).digest == LatentCache(tmp_path / "whole").digest
        with Store(folder) as store:
            assert store.lost == ()
        clear_partial(folder)
        left = {path.name for path in folder.iterdir() if not path.name.startswith("shard-")}
        assert left == {DATABASE}


class TestDamage:
    @pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
    def test_of_a_shard(self, tmp_path, damage):
        fill(tmp_path, range(3), shard_bytes=1)
        db = Database(tmp_path)
        _, path = db.shard_of("1")
        db.close()
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        messages = {"cut": "has .* bytes instead of", "gone": "is missing: cache again"}
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(data if damage == "flipped" else data[:-8])
        with pytest.raises((ValueError, OSError), match=messages.get(damage, "damaged in .*")):
            LatentCache(tmp_path).verify()
        with Store(tmp_path) as store:
            assert store.lost == (path.name,)
            assert ["0" in store, "1" in store] == [True, False]
        with pytest.raises((ValueError, OSError)):  # until a run puts it right
            LatentCache(tmp_path).verify()
        fill(tmp_path, range(3), shard_bytes=1)
        check(tmp_path, range(3))

    def test_of_a_header(self, tmp_path):
        fill(tmp_path, range(3))
        [path] = tmp_path.glob("shard-*")
        path.write_bytes(b"\xff" * path.stat().st_size)
        with pytest.raises(ValueError, match=r"shard-\w+.safetensors is damaged: cache again"):
            LatentCache(tmp_path).latents(0)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"no database" * 500,
            lambda data: data[:5000],
            lambda data: data[:1024] + b"\xff" * (len(data) - 1024),
            lambda data: data.replace(b'"caption": "1"', b'"caption": "7"'),
        ],
        ids=["text", "cut", "overwritten", "another caption"],
    )
    def test_of_the_database(self, tmp_path, damage):
        fill(tmp_path, range(300))
        path = tmp_path / DATABASE
        data = path.read_bytes()
        path.write_bytes(damage(data))
        assert path.read_bytes() != data
        with pytest.raises(
            ValueError, match=r"cache\.db is damaged .*: remove this file and cach"
        ):
            LatentCache(tmp_path).verify()
        path.unlink()
        with Store(tmp_path) as store:
            assert all(f"{i}" in store for i in range(300))
        fill(tmp_path, range(300))
        check(tmp_path, range(300))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("UPDATE manifest SET fields = '[]'", "cache.db is damaged"),
            ("UPDATE manifest SET fields = '{'", "cache.db is damaged"),
            ("UPDATE manifest SET fields = '{}'", "cache.db has no entries"),
            ("UPDATE entries SET number = number + 7 WHERE number = 0", "its entries are not th"),
            ("UPDATE entries SET fields = '3'", "its entries are not those"),
            ("DELETE FROM entries WHERE number = 1", "its entries are not those"),
            ("UPDATE shards SET name = '../../x'", "a shard is called '../../x'"),
            ("DROP TABLE entries", "no such table"),
            ("PRAGMA user_version = 99", "has version 99, not 4: remove"),
        ],
        ids=str,
    )
    def test_of_its_rows(self, tmp_path, words, message):
        fill(tmp_path, range(3))
        with sqlite3.connect(tmp_path / DATABASE) as db:
            db.execute(words)
        db.close()
        with pytest.raises(ValueError, match=message):
            LatentCache(tmp_path)

    def test_a_tensor_whose_row_is_gone(self, tmp_path):
        fill(tmp_path, range(3))
        with sqlite3.connect(tmp_path / DATABASE) as db:
            db.execute("DELETE FROM tensors")
        db.close()
        with pytest.raises(ValueError, match="made again while it was read: begin again, or cach"):
            LatentCache(tmp_path).latents(0)


class TestFolders:
    def test_of_an_earlier_version_is_refused(self, tmp_path):
        (tmp_path / EARLIER).write_text(json.dumps({"version": 2, "shards": {}, "entries": {}}))
        (tmp_path / f"shard-{'0' * 64}.safetensors").touch()
        refused = "is a cache of an earlier version, whose files are read no more: remove it, or"
        for read in (LatentCache, Store, is_finished):
            with pytest.raises(ValueError, match=refused):
                read(tmp_path)
        assert len([*tmp_path.iterdir()]) == 2

    def test_without_a_cache(self, tmp_path):
        assert not is_finished(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"cache\.db is missing; cache writes it"):
            LatentCache(tmp_path)
        with Store(tmp_path):
            pass
        assert not is_finished(tmp_path)
        with pytest.raises(FileNotFoundError, match="holds no finished cache: cache again"):
            LatentCache(tmp_path)
        fill(tmp_path, [1])
        assert is_finished(tmp_path)

    def test_a_name_that_an_address_escapes(self, tmp_path):
        folder = tmp_path / "a %41?mode=ro#ü"
        fill(folder, [1])
        check(folder, [1])
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def with_a_full_disk(folder):
    with file_limit(100_000), Store(folder, shard_bytes=1) as store:
        store.put("small", X)
        store.put("large", {"latents": torch.zeros(100_000)})


@pytest.mark.nightly
def test_memory_of_many_clips(tmp_path):
    """Of a reader: less than 2,000 bytes a clip."""

    def grown(number):
        folder = tmp_path / f"{number}"
        tracemalloc.start()
        fill(folder, range(number), shard_bytes=2**16)
        found = LatentCache(folder)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(found) == number
        return held

    assert (grown(6000) - grown(2000)) / 4000 < 2000
