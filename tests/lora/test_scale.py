"""The cache of many clips: threads that read, and what is remembered."""

import os
import shutil
import threading

import pytest
import torch
from safetensors import safe_open
from support import wan
from support.clips import SIZE, footage, refuse

from gen_accel.attention_processors.families import family_named
from gen_accel.lora.caching import latents as latents_module
from gen_accel.lora.caching import store as store_module
from gen_accel.lora.caching.encode import cache
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.caching.store import tensors_of
from gen_accel.lora.data.clips import CaptionedVideo, Take
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


def tensors(folder):
    """All tensors of a cache, in the order of its shards' names and of theirs."""
    found = {}
    for path in sorted(folder.glob("shard-*")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in sorted(tensors_of(path))}
    return found


CHUNKS = {"frames": [5], "take": Take("all"), "shard_bytes": 20_000}


@pytest.fixture(scope="module")
def alone(pipe, clips, tmp_path_factory):
    """A cache of several chunks a clip, which no thread read."""
    out = tmp_path_factory.mktemp("alone") / "cache"
    return cache(pipe, clips, out, sizes=[SIZE], max_tokens=8, device="cpu", **CHUNKS)


class TestWorkers:
    @pytest.mark.turns(3)
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
        monkeypatch.setattr("gen_accel.lora.caching.store.FACT_SECONDS", 0.0)
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
        with pytest.raises(ValueError, match="workers must be from 0 to 256, got -1"):
            build(workers=-1)


class TestRemembered:
    @pytest.fixture
    def settled(self, monkeypatch):
        """Files count as settled at once; the clock moves on by a second where one is written."""
        monkeypatch.setattr(store_module, "SETTLED", -(10**12))

    def test_no_file_is_read_again(self, build, settled, monkeypatch):
        build()
        build()  # which learns the hashes of the shards
        monkeypatch.setattr(store_module, "file_sha256", refuse)
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
        monkeypatch.setattr(store_module, "SETTLED", 10**12)
        build()
        path, times = data / "1.mp4", (data / "1.mp4").stat()
        data_of = bytearray(path.read_bytes())
        data_of[-1] ^= 1
        path.write_bytes(data_of)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        same = store_module.file_key(path)[0].rsplit(" ", 1)[0]
        assert f"file {path} {times.st_size} {times.st_mtime_ns}" == same
        assert build().encoded == 1


class TestEntries:
    def test_they_are_there_while_another_run_writes_its_own(self, build, folder, clips, data):
        before = LatentCache(folder)
        (data / "1.txt").write_text("another")
        build(data=data)
        assert before.entries[1].caption == "a red square 1"
        assert LatentCache(folder).entries[1].caption == "another"

    def test_few_shards_are_open_at_once(self, folder, monkeypatch):
        monkeypatch.setattr(latents_module, "SHARDS_OPEN", 2)
        found = LatentCache(folder)
        assert len([*folder.glob("shard-*")]) > 3
        for _ in range(2):
            for i in range(COUNT):
                found.latents(i)
                found.conditions(i)
                assert found._open.cache_info().currsize <= 2
