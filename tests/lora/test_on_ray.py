"""A cache that workers encode for, without Ray: what they get and send is pickled as by it."""

import pickle
import sqlite3
from functools import partial

import pytest
from support.clips import footage

from gen_accel.cluster import ATTEMPTS, Done
from gen_accel.lora.caching.work import Workers
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.prepare import cache_clips, loaded_encoders
from gen_accel.measure import write_video


class Here:
    """Machines whose workers are this process.

    Args:
        deadly: name of a clip at which each worker dies.
    """

    def __init__(self, deadly=None):
        self.titles, self.deadly = [], deadly

    def map(self, load, items, *, ordered, reads):
        assert ordered
        assert all(path.exists() for path in reads)
        if items:
            self.titles.append(load.args[2])
            work = pickle.loads(pickle.dumps(load))()
        for number, item in enumerate(items):
            if self.deadly and getattr(item, "name", None) == self.deadly:
                yield Done(number, None, "its worker died", "host", ("host",) * ATTEMPTS)
                continue
            result = work(pickle.loads(pickle.dumps(item)))
            yield Done(number, pickle.loads(pickle.dumps(result)), None, "host")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate("ab"):
        write_video(footage(height=32, width=32, seed=seed), folder / f"{name}.mp4", fps=16)
        (folder / f"{name}.txt").write_text("a red circle")
    (folder / "c.mp4").write_bytes(b"no film")
    (folder / "c.txt").write_text("a blue square")
    return folder


def config(data, out):
    return TrainConfig(
        model="demo", data=str(data), out=str(out), height=32, width=32, stages=("5:1",)
    )


def held(out):
    """Files but for the database, of which all but the places of files."""
    files = {path.name: path for path in (out / "cache").iterdir() if path.is_file()}
    with sqlite3.connect(files.pop("cache.db")) as db:
        rows = [line for line in db.iterdump() if "'file " not in line]
    db.close()
    return {name: path.read_bytes() for name, path in files.items()} | {"rows": sorted(rows)}


@pytest.mark.slow
def test_the_cache_is_the_same(data, tmp_path):
    alone = cache_clips(config(data, tmp_path / "one"))
    chosen, machines = config(data, tmp_path / "many"), Here()
    workers = Workers(machines, partial(loaded_encoders, chosen), [])
    found = cache_clips(chosen, executor=workers)
    assert machines.titles == ["reading", "captions", "clips"]
    assert (found.encoded, found.texts, [*found.broken]) == (2, 2, ["c.mp4"])
    assert found.broken == alone.broken
    assert held(tmp_path / "many") == held(tmp_path / "one")
    again = cache_clips(chosen, executor=workers)
    assert (again.encoded, again.kept) == (0, 2)
    assert machines.titles[3:] == ["reading"]  # of the clip that nobody can read


@pytest.mark.slow
def test_a_clip_that_ends_workers_is_not_read_here(data, tmp_path, monkeypatch):
    chosen = config(data, tmp_path)
    workers = Workers(Here("a.mp4"), partial(loaded_encoders, chosen), [])
    found = cache_clips(chosen, executor=workers)
    assert (found.encoded, [*found.broken]) == (1, ["a.mp4", "c.mp4"])
    assert found.broken["a.mp4"] == "its worker died"


@pytest.mark.parametrize("given_up", [True, False])
def test_a_clip_at_which_workers_die_counts_as_broken(given_up):
    died = ("a",) * ATTEMPTS if given_up else ()

    class Failing(Here):
        def map(self, load, items, *, ordered, reads):
            yield Done(0, None, "it failed", "b", died)

    found = Workers(Failing(), None, []).map("images", None, [1])
    if given_up:
        assert [str(one) for one in found] == ["it failed"]
    else:
        with pytest.raises(ValueError, match="machine b: it failed"):
            list(found)
