"""The cache of many clips: threads that read, what is remembered, old folders, flat memory."""

import gc
import hashlib
import json
import os
import shutil
import threading
import tracemalloc
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from support import wan
from support.clips import SIZE, footage, refuse

from gen_accel.attention_processors.families import family_named
from gen_accel.lora.caching import latents as latents_module
from gen_accel.lora.caching import shards as shards_module
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.encoders import hash_of
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.caching.shards import (
    MANIFEST,
    MEMO,
    OLD_PROGRESS,
    PROGRESS,
    Shards,
    entry_lines,
    tensors_of,
)
from gen_accel.lora.data.clips import CaptionedVideo
from gen_accel.lora.data.scenes import Take
from gen_accel.measure.video_io import write_video

family = family_named("wan")

pytestmark = pytest.mark.slow

COUNT = 6


@pytest.fixture(scope="module")
def pipe():
    return wan.pipeline()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    made = tmp_path_factory.mktemp("clips")
    for i in range(COUNT):
        path = write_video(footage(10, seed=i), made / f"{i}.mp4", fps=24)
        path.with_suffix(".txt").write_text(f"a red square {i}")
    return made


@pytest.fixture
def data(clips, tmp_path):
    return shutil.copytree(clips, tmp_path / "data")


@pytest.fixture
def build(pipe, data, tmp_path):
    def run(**options):
        given = {"frames": [5, 9], "sizes": [SIZE], "max_tokens": 8, "device": "cpu"}
        out = options.pop("out", tmp_path / "cache")
        return cache(pipe, options.pop("data", data), out, **(given | options))

    return run


@pytest.fixture(scope="module")
def made(pipe, clips, tmp_path_factory):
    """A cache of this version, to change."""
    out = tmp_path_factory.mktemp("made") / "cache"
    given = {"frames": [5, 9], "sizes": [SIZE], "max_tokens": 8, "device": "cpu"}
    cache(pipe, clips, out, **given, shard_bytes=2000)
    return out


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "cache")


def manifest_of(folder):
    return json.loads((folder / MANIFEST).read_text())


def tensors(folder):
    """All tensors of a cache, in the order of its shards' names and of theirs."""
    found = {}
    for path in sorted(folder.glob("shard-*")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in sorted(tensors_of(path))}
    return found


def as_version_1(folder):
    """Write the folder's manifest as version 1 had it. Returns the digest that it had."""
    manifest = manifest_of(folder)
    entries = [json.loads(line) for line in entry_lines(folder, manifest)]
    facts = map(json.loads, (folder / MEMO).read_text().splitlines())
    known = {key[5:]: fact for key, fact in facts if key.startswith("clip ")}
    for name, about in manifest["shards"].items():
        about["tensors"] = sorted(tensors_of(folder / name))
    (folder / manifest["entries"]["file"]).unlink()
    (folder / MEMO).unlink()
    old = manifest | {"version": 1, "clips": known, "entries": entries}
    (folder / MANIFEST).write_text(json.dumps(old, indent=2))
    return hash_of([entries, old["empty"], old["causal"], old["fps"]])


CHUNKS = {"frames": [5], "take": Take("all"), "shard_bytes": 20_000}


@pytest.fixture(scope="module")
def alone(pipe, clips, tmp_path_factory):
    """A cache of several chunks a clip, which no thread read."""
    out = tmp_path_factory.mktemp("alone") / "cache"
    return cache(pipe, clips, out, sizes=[SIZE], max_tokens=8, device="cpu", **CHUNKS)


class TestWorkers:
    @pytest.mark.parametrize("workers", [1, 2, 5])
    def test_any_number_gives_the_same_bits(self, alone, build, tmp_path, workers):
        report = build(workers=workers, **CHUNKS)
        assert report.encoded == alone.encoded > COUNT
        ours, theirs = LatentCache(tmp_path / "cache"), LatentCache(alone.folder)
        assert ours.digest == theirs.digest
        mine, other = tensors(tmp_path / "cache"), tensors(alone.folder)
        assert set(mine) == set(other)
        assert all(torch.equal(mine[name], other[name]) for name in mine)
        held = [
            sorted(sorted(tensors_of(path)) for path in folder.glob("shard-*"))
            for folder in (tmp_path / "cache", alone.folder)
        ]
        assert held[0] == held[1]
        preview = [(folder / "preview.png").read_bytes() for folder in (ours.folder, alone.folder)]
        assert preview[0] == preview[1]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_broken_clips_are_named(self, build, data, workers):
        (data / "3.mp4").write_bytes(b"no video")
        report = build(workers=workers)
        assert (report.encoded, list(report.broken)) == (COUNT - 1, ["3.mp4"])
        with pytest.raises(OSError, match=r"3\.mp4 is broken: .* cannot be read"):
            build(workers=workers, on_broken="stop")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_clips_that_break_while_they_are_encoded(self, build, monkeypatch, workers):
        read = CaptionedVideo.read_chunks

        def fail(video, chunks, **options):
            if video.name == "2.mp4":
                raise OSError("the disk is gone")
            return read(video, chunks, **options)

        monkeypatch.setattr(CaptionedVideo, "read_chunks", fail)
        report = build(workers=workers)
        assert (report.encoded, report.broken) == (COUNT - 1, {"2.mp4": "the disk is gone"})

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_error_of_a_thread_names_the_clip(self, build, monkeypatch, workers):
        def fail(video, chunks, **options):
            raise MemoryError

        monkeypatch.setattr(CaptionedVideo, "read_chunks", fail)
        with pytest.raises(RuntimeError, match=r"0\.mp4 could not be read: MemoryError"):
            build(workers=workers)

    @pytest.mark.parametrize("workers", [1, 3])
    def test_an_interruption_ends_the_threads_and_keeps_what_is_encoded(
        self, build, monkeypatch, workers
    ):
        encode, calls = family.encode_video, []

        def stop_at_third(pipe, video):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return encode(pipe, video)

        before = threading.active_count()
        monkeypatch.setattr(family, "encode_video", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            build(workers=workers)
        assert threading.active_count() == before
        report = build(workers=workers)
        assert (report.encoded, report.kept, report.texts) == (COUNT - 2, 2, 0)

    def test_an_interruption_while_clips_are_surveyed(self, build, monkeypatch):
        monkeypatch.setattr("gen_accel.lora.caching.index.SECONDS_TOGETHER", 0.0)
        survey, calls = CaptionedVideo.survey, []

        def stop_at_fourth(video, **options):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return survey(video, **options)

        monkeypatch.setattr(CaptionedVideo, "survey", stop_at_fourth)
        with pytest.raises(KeyboardInterrupt):
            build(workers=0)
        build(workers=0)
        assert len(calls) == 4 + COUNT - 3

    def test_a_number_that_will_not_do(self, build):
        with pytest.raises(ValueError, match="workers must not be negative, got -1"):
            build(workers=-1)


class TestRemembered:
    @pytest.fixture
    def settled(self, monkeypatch):
        """Files count as settled at once; the clock moves on by a second where one is written."""
        monkeypatch.setattr(shards_module, "SETTLED", -(10**12))

    def test_no_file_is_read_again(self, build, settled, monkeypatch):
        build()
        build()  # which learns the hashes of the shards
        monkeypatch.setattr(shards_module, "file_sha256", refuse)
        report = build()
        assert (report.encoded, report.kept) == (0, COUNT)

    def test_a_file_of_the_same_size_and_time_that_was_changed(self, build, data, settled):
        build()
        path = data / "1.mp4"
        times = path.stat()
        old, new = path.read_bytes(), (data / "2.mp4").read_bytes()
        new += b"\0\0\0\x08free" * ((len(old) - len(new)) // 8)
        path.write_bytes(new[: len(old)] + bytes(max(0, len(old) - len(new))))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert path.stat().st_size == times.st_size
        report = build()
        assert report.encoded + len(report.broken) == 1

    def test_a_file_that_is_new_is_hashed_in_each_run(self, build, data, monkeypatch):
        monkeypatch.setattr(shards_module, "SETTLED", 10**12)
        build()
        path, times = data / "1.mp4", (data / "1.mp4").stat()
        data_of = bytearray(path.read_bytes())
        data_of[-1] ^= 1
        path.write_bytes(data_of)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        same = shards_module.file_key(path)[0].rsplit(" ", 1)[0]
        assert f"file {path} {times.st_size} {times.st_mtime_ns}" == same
        assert build().encoded == 1


class TestOldFolders:
    def test_they_are_read_with_the_same_digest(self, folder):
        new = LatentCache(folder)
        held = [(e, new.latents(i), new.conditions(i)) for i, e in enumerate(new.entries)]
        digest = as_version_1(folder)
        old = LatentCache(folder)
        old.verify()
        assert old.digest == new.digest == digest
        assert old.entries == new.entries
        assert old.buckets(2) == new.buckets(2)
        for i, (entry, latents, conditions) in enumerate(held):
            assert old.entries[i] == entry
            assert torch.equal(old.latents(i), latents)
            torch.testing.assert_close(old.conditions(i), conditions, atol=0, rtol=0)

    def test_they_go_on_without_encoding(self, build, clips, folder, monkeypatch):
        digest = as_version_1(folder)
        for name in ("encode_video", "encode_prompt"):
            monkeypatch.setattr(family, name, refuse)
        monkeypatch.setattr(CaptionedVideo, "survey", refuse)
        report = build(data=clips)
        assert (report.encoded, report.kept, report.removed, report.damaged) == (0, COUNT, 0, ())
        assert manifest_of(folder)["version"] == 2
        assert LatentCache(folder).digest == digest

    def test_a_killed_run_goes_on(self, build, clips, folder, monkeypatch):
        """Of version 1, whose progress was one file of JSON."""
        as_version_1(folder)
        old = manifest_of(folder)
        kept = {"version": 1, "shards": old["shards"], "clips": old["clips"]}
        (folder / OLD_PROGRESS).write_text(json.dumps(kept))
        (folder / MANIFEST).unlink()
        monkeypatch.setattr(family, "encode_video", refuse)
        assert build(data=clips).kept == COUNT
        assert not (folder / OLD_PROGRESS).exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: m.update(entries=3), "entries in .* must be a list or names with values"),
            (lambda m: m["entries"].append(3), "an entry of .* must hold names with values"),
            (
                lambda m: m["entries"][2].update(latent_key="x"),
                "names tensors 'x' of 2.mp4, which",
            ),
            (lambda m: m["entries"][1].pop("width"), "has no width"),
            (lambda m: m["entries"][1].update(width="8"), "width of an entry .* must be int"),
            (lambda m: m["entries"][1].update(frames=10**30), r"1\.mp4 in .* has no size"),
            (lambda m: next(iter(m["shards"].values())).update(tensors=["x"]), "must be names"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_manifests_that_will_not_do(self, folder, change, message):
        as_version_1(folder)
        manifest = manifest_of(folder)
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=message):
            LatentCache(folder)


class TestEntries:
    def lines(self, folder):
        return folder / manifest_of(folder)["entries"]["file"]

    def changed(self, folder, change):
        """Entries that `change` changed, with a manifest that fits them."""
        manifest, path = manifest_of(folder), self.lines(folder)
        data = change(path.read_bytes())
        path.unlink()
        digest = hashlib.sha256(data).hexdigest()
        about = {"file": f"entries-{digest}.jsonl", "sha256": digest, "bytes": len(data)}
        (folder / about["file"]).write_bytes(data)
        (folder / MANIFEST).write_text(json.dumps(manifest | {"entries": about}))

    def test_they_are_a_sequence(self, folder):
        found = LatentCache(folder).entries
        assert len(found) == COUNT
        names = [f"{i}.mp4" for i in range(COUNT)]
        assert [entry.name for entry in found] == names
        assert [entry.name for entry in found[1:3]] == names[1:3]
        assert found[-1].name == names[-1]
        assert found == list(found)
        assert found != list(found)[1:]
        with pytest.raises(IndexError, match="entries are 6, asked for is number 6"):
            found[COUNT]

    def test_they_are_there_while_another_run_writes_its_own(self, build, folder, clips, data):
        before = LatentCache(folder)
        (data / "1.txt").write_text("another")
        build(data=data)
        assert before.entries[1].caption == "a red square 1"
        assert LatentCache(folder).entries[1].caption == "another"

    def test_damage_is_found(self, folder):
        path = self.lines(folder)
        data = path.read_bytes()
        path.write_bytes(data.replace(b"red", b"rot"))
        with pytest.raises(ValueError, match=r"entries-\w+.jsonl is damaged: cache again"):
            LatentCache(folder)
        path.write_bytes(data[:-3])
        with pytest.raises(ValueError, match=r"has \d+ bytes instead of \d+: cache again"):
            LatentCache(folder)
        path.unlink()
        with pytest.raises(FileNotFoundError, match="is missing: cache again"):
            LatentCache(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda data: data + b"3\n", "an entry of .* must hold names with values"),
            (lambda data: data + b"\xff\n", "an entry of .* is no JSON"),
            (lambda data: data.replace(b'"width": 6', b'"width": -1'), "has no size"),
            (lambda data: data.replace(b'"width": 6', b'"width": null'), "width of an entry"),
            (lambda data: data.replace(b'"width"', b'"breadth"'), "has the unknown breadth"),
            (lambda data: data.replace(b'"text_key": "', b'"text_key": "x'), "which no shard has"),
        ],
        ids=["a number", "no text", "no size", "no width", "another name", "another key"],
    )
    def test_entries_that_will_not_do(self, folder, change, message):
        self.changed(folder, change)
        with pytest.raises(ValueError, match=message):
            LatentCache(folder)

    @pytest.mark.parametrize(
        ("about", "message"),
        [
            ({"file": 3}, "file in entries in .* must be text"),
            ({"file": "../../x"}, "file in entries .* must be of cache, got '../../x'"),
            ({"bytes": "3"}, "bytes in entries in .* must be a whole number"),
        ],
        ids=str,
    )
    def test_manifests_that_will_not_do(self, folder, about, message):
        manifest = manifest_of(folder)
        manifest["entries"] |= about
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=message):
            LatentCache(folder)

    def test_a_shard_without_a_header(self, folder):
        manifest = manifest_of(folder)
        path = folder / next(iter(manifest["shards"]))
        path.write_bytes(b"\xff" * path.stat().st_size)
        with pytest.raises(ValueError, match=r"shard-\w+.safetensors is damaged: cache again"):
            LatentCache(folder)


class TestShards:
    def test_progress_survives_half_a_line(self, tmp_path):
        with Shards(tmp_path, shard_bytes=1) as shards:
            shards.put("a", {"x": torch.zeros(3)})
        path = tmp_path / PROGRESS
        path.write_bytes(path.read_bytes() + b'{"version": 2, "sha')
        with Shards(tmp_path, shard_bytes=1) as shards:
            assert "a" in shards
            shards.put("b", {"x": torch.ones(3)})
        found = Shards(tmp_path)
        assert "a" in found
        assert "b" in found
        assert torch.equal(found.read("b")["x"], torch.ones(3))

    def test_progress_does_not_grow_with_what_was_there(self, tmp_path):
        sizes = []
        with Shards(tmp_path, shard_bytes=1) as shards:
            for i in range(20):
                shards.put(f"{i}", {"x": torch.full((3,), float(i))})
                sizes.append((tmp_path / PROGRESS).stat().st_size)
        steps = {after - before for before, after in pairwise(sizes)}
        assert steps == {sizes[0]}

    def test_small_tensors_fill_a_shard_by_their_number(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shards_module, "SHARD_TENSORS", 4)
        with Shards(tmp_path) as shards:
            for i in range(10):
                shards.put(f"{i}", {"x": torch.full((3,), float(i))})
        assert sorted(len(tensors_of(path)) for path in tmp_path.glob("shard-*")) == [2, 4, 4]

    def test_few_shards_are_open_at_once(self, folder, monkeypatch):
        monkeypatch.setattr(latents_module, "SHARDS_OPEN", 2)
        found = LatentCache(folder)
        assert len(found._files) > 3
        for _ in range(2):
            for i in range(COUNT):
                found.latents(i)
                found.conditions(i)
                assert len(found._open) <= 2

    @pytest.mark.parametrize("shards", [3, {"a": 3, "b": {"bytes": 1}, "c": {}}])
    @pytest.mark.parametrize("version", [1, 2])
    def test_a_manifest_that_is_not_ours(self, tmp_path, shards, version):
        for name in "abc":
            (tmp_path / name).write_text(name)
        about = {"version": version, "shards": shards, "clips": [], "entries": 3}
        (tmp_path / MANIFEST).write_text(json.dumps(about))
        with Shards(tmp_path) as found:
            assert found.files == {}
            assert list(found.earlier_entries()) == []


@pytest.mark.nightly
def test_memory_does_not_hold_the_clips(tmp_path):
    """Of a writer and a reader: less than 400 bytes a clip, of which the file has 600 and more."""

    def grown(count):
        folder = tmp_path / f"{count}"
        entry = {"frames": 1, "height": 1, "width": 1, "pixel_frames": 1}

        def entries():
            for i in range(count):
                keys = {"latent_key": f"{i:064}", "text_key": f"t{i:063}"}
                yield {"name": f"{i}.mp4", "caption": f"{i} " * 60, **entry, **keys}

        class Again:
            def __iter__(self):
                return entries()

        tracemalloc.start()
        with Shards(folder, shard_bytes=2**16) as shards:
            for i in range(count):
                shards.clips[f"{i}"] = {"frames": 1, "size": [1, 1]}
                shards.put(f"{i:064}", {"latents": torch.zeros(4)})
                shards.put(f"t{i:063}", {"text": torch.zeros(4)})
            keys = (key for i in range(count) for key in (f"{i:064}", f"t{i:063}"))
            manifest = {"empty": "", "causal": True, "fps": None}
            shards.finish(manifest, keys, Again())
            found = LatentCache(folder)
            gc.collect()  # safetensors leaves rings of references
            held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(found) == count
        return held

    assert (grown(6000) - grown(2000)) / 4000 < 400
