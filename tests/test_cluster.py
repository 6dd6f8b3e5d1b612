"""Work by workers of Ray: what they make equals what one process makes, and what fails is told."""

import builtins
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from support import ray_workers
from support.clips import footage

from gen_accel import cluster, registry
from gen_accel.cluster import Cluster, cluster_of, connected
from gen_accel.measure import write_video

BAD_ADDRESSES = {
    "localhost": "must be HOST:PORT, auto or local",
    "ray://head:10001": "is for clients from outside",
    "head:port": "must be HOST:PORT",
}


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two workers of a Ray that is started once, and leaves this process as it was."""
    pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM), builtins.print, os.environ.get(cluster.MODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
        patch.setenv("OMP_NUM_THREADS", "1")
        with connected(Cluster("local", 2)) as found:
            yield found
    after = signal.getsignal(signal.SIGTERM), builtins.print, os.environ.get(cluster.MODE)
    assert after == before


@pytest.mark.parametrize(("address", "why"), BAD_ADDRESSES.items())
def test_an_address_of_another_form_is_refused(address, why):
    with pytest.raises(ValueError, match=why):
        cluster_of(address, None, "auto")


@pytest.mark.slow
def test_nobody_at_an_address_is_told_in_a_line():
    pytest.importorskip("ray")
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(ValueError, match=f"no cluster of Ray answers at {address}"),
            connected(Cluster(address)),
        ):
            pass


def test_a_token_that_is_asked_for_is_told(monkeypatch):
    """Stands in for Ray 2.60, of which tests/test_machines.py asks a true cluster."""
    ray = pytest.importorskip("ray")

    def init(**_):
        try:
            raise RuntimeError("ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken")
        except RuntimeError as error:
            raise ConnectionError("Failed to connect to Ray cluster at it") from error

    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as there:
        address = f"127.0.0.1:{there.getsockname()[1]}"
        with (
            pytest.raises(ValueError, match=r"asks for a token: set RAY_AUTH_MODE=token, and"),
            connected(Cluster(address)),
        ):
            pytest.fail("connected")


def test_an_address_that_another_user_may_have_written_is_not_followed(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    asked = []

    def init(address, **_):
        asked.append(address)
        raise ConnectionError("nobody")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "CURRENT", tmp_path / "ray_current_cluster")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def connect(said):
        with pytest.raises(ValueError, match=said), connected(Cluster("auto")):
            pytest.fail("connected")

    with socket.create_server(("127.0.0.1", 0)) as there:
        address = f"127.0.0.1:{there.getsockname()[1]}"
        tmp_path.chmod(0o755)
        cluster.CURRENT.write_text(f"{address}\n")
        for odd, mode in ((tmp_path, 0o777), (cluster.CURRENT, 0o666)):
            usual = odd.stat().st_mode
            odd.chmod(mode)
            connect(f"give --ray HOST:PORT or --ray local .{odd} may be written by every user")
            odd.chmod(usual)
        assert asked == []
        connect("nobody")
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
        connect("at RAY_ADDRESS")
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        cluster.CURRENT.unlink()
        connect("on this machine")
    assert asked == [address, "auto", "local"]


def test_workers_and_devices_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        cluster_of("auto", 0, "auto")
    with pytest.raises(ValueError, match="--ray-workers 2 goes with --ray"):
        cluster_of(None, 2, "auto")
    with pytest.raises(ValueError, match="leave the number out of device cuda:1"):
        cluster_of("local", None, "cuda:1")


def test_a_missing_ray_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'needs ray: pip install ".+\[ray\]"'):
        cluster_of("auto", None, "auto")


def test_ray_stands_without_an_address(run):
    for given, address in (
        (("--ray", "--frames", "5"), "auto"),
        (("--frames", "5", "--ray"), "auto"),
        (("--ray", "head:6379"), "head:6379"),
        ((), "null"),
    ):
        found = run("generate", "--model", "demo", "--prompt", "a", "--print-config", *given)
        assert f"\nray: {address}  #" in found.stdout


def test_a_machine_says_what_it_lacks(tmp_path):
    versions = cluster.versions()
    assert cluster._look([], [tmp_path], versions) is None
    lost = tmp_path / "elsewhere"
    assert f"does not see the folder {lost}" in str(cluster._look([lost / "mark"], [], versions))
    assert f"has nothing at {lost}" in str(cluster._look([], [lost], versions))
    assert "has gen_accel" in str(cluster._look([], [], {"gen_accel": "0.0.1"}))
    assert "has nothing not at all" in str(cluster._look([], [], {"nothing": "1"}))


@pytest.mark.slow
def test_a_machine_that_lacks_something_is_named(machines, tmp_path):
    load = partial(ray_workers.simple, tmp_path)
    written = [[tmp_path / "new" / "file.txt"]]
    [done] = machines.map(load, ["a"], reads=[tmp_path], clears=written)
    assert done.result == "A"
    assert [*(tmp_path / "new").iterdir()] == []
    with pytest.raises(ValueError, match=f"machine {done.host} has nothing at"):
        next(machines.map(load, ["a"], reads=[tmp_path / "lost"]))


@pytest.mark.slow
def test_what_dies_is_tried_again_and_given_up_at_last(machines, tmp_path):
    items = ["a", "once", "die", "bad", "warn"]
    found = {one.number: one for one in machines.map(partial(ray_workers.simple, tmp_path), items)}
    assert [*sorted(found)] == [0, 1, 2, 3, 4]
    assert (found[0].result, found[1].result, found[4].result) == ("A", "ONCE", "WARN")
    assert found[1].died == (found[1].host,)
    assert found[2].is_given_up
    assert "its worker died 3 times" in found[2].failed
    assert found[3].failed == "the item is bad"
    assert not found[3].is_given_up
    assert found[4].told == ("look at this",)


@pytest.mark.slow
def test_what_cannot_be_loaded_is_told(machines):
    [done] = machines.map(ray_workers.unloadable, ["a"])
    assert done.loads
    assert done.failed == "weights are missing"


@pytest.mark.slow
def test_why_no_worker_starts_is_told(machines):
    with pytest.raises(ValueError, match=r"no worker of Ray could start: .*nothing of that name"):
        next(machines.map(ray_workers.Foreign(), ["a"]))


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_half_file(machines, tmp_path):
    load = partial(ray_workers.simple, tmp_path)
    found = machines.map(load, ["a", "halves"], clears=[[], [tmp_path / "file.txt"]])
    next(found)
    until = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < until
        time.sleep(0.1)
    found.close()
    left = [path.name for path in tmp_path.iterdir() if "partial" in path.name]
    assert left == []


@pytest.mark.slow
def test_videos_equal_those_of_one_process(machines, tmp_path, monkeypatch):
    from gen_accel import Dense, demo
    from gen_accel.pipelines.generation import generate

    prompts = ["a red circle", "a blue square", "a green circle", "a red square"]
    clip = {"frames": 5, "height": 32, "width": 32, "steps": 1}

    def made(out: Path, **options):
        return generate.generate(demo.path(), prompts, out=out, method=Dense(), **clip, **options)

    spread = generate.spread
    monkeypatch.setattr(
        generate,
        "spread",
        lambda cluster, job, left, load: spread(
            cluster, job, left, partial(ray_workers.failing, load, tmp_path)
        ),
    )
    with pytest.raises(generate.Unmade, match="1 of 4 videos could not be made") as failed:
        made(tmp_path / "ray" / "clip.gif", ray="local", ray_workers=1)
    assert failed.value.failed == {"clip-002.gif": "the prompt is bad"}
    assert [one.seed for one in failed.value.made] == [0, 1, 3]
    [left] = made(tmp_path / "ray" / "clip.gif")  # in this process: the records are the same
    assert left.seed == 2
    made(tmp_path / "one" / "clip.gif")
    held = [{p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("ray", "one")]
    assert len(held[0]) == 8
    assert held[0] == held[1]


@pytest.mark.nightly
def test_a_cache_equals_that_of_one_process(machines, tmp_path):
    """With Ray; tests/lora/test_on_ray.py has it without."""
    from gen_accel.lora.config import TrainConfig
    from gen_accel.lora.prepare import cache_by, cache_clips

    data = tmp_path / "clips"
    data.mkdir()
    write_video(footage(height=32, width=32), data / "a.mp4", fps=16)
    (data / "a.txt").write_text("a red circle")
    chosen: dict = {"model": "demo", "data": str(data), "height": 32, "width": 32}
    chosen["stages"] = ("5:1",)
    found = cache_by(Cluster("local", 1), TrainConfig(out=str(tmp_path / "ray"), **chosen))
    assert (found.encoded, found.texts) == (1, 2)
    cache_clips(TrainConfig(out=str(tmp_path / "one"), **chosen))
    held = [
        {p.name: p.read_bytes() for p in (tmp_path / d / "cache").iterdir() if p.is_file()}
        for d in ("ray", "one")
    ]
    assert held[0] == held[1]
