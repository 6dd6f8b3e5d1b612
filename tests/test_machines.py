"""A cluster of two machines, one of which dies: the files are those of one process.

The machines are network namespaces of this one, each with its own address, host name and temporary
folder of Ray; they share the disk. That needs root, and `ip` and `unshare` of Linux.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gen_accel.cluster import CURRENT

pytestmark = pytest.mark.nightly

ADDRESSES = {"a": "10.213.7.1", "b": "10.213.7.2"}
HEAD = f"{ADDRESSES['a']}:6379"
SHAPES = ("circle", "square", "triangle", "circle moves left")
PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in SHAPES]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of the tests of two machines"}
QUIET = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
RAY = ("--num-cpus", "1", "--object-store-memory", "80000000", "--block")
SECONDS = 240


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Machine:
    """A namespace and what runs in it."""

    def __init__(self, name, folder):
        self.name, self.space = name, f"gen-accel-{os.getpid()}-{name}"
        self.ray = folder / f"ray-{name}"
        self.ray.mkdir()
        ip("netns", "add", self.space)
        ip("-n", self.space, "link", "set", "lo", "up")

    def start(self, *command, log, **environment):
        usual = CURRENT.parent  # where Ray keeps what it needs on a machine
        usual.mkdir(exist_ok=True)
        own = f'hostname machine-{self.name} && mount --bind {self.ray} {usual} && exec "$@"'
        words = ["ip", "netns", "exec", self.space, "unshare", "-um", "sh", "-c", own, "sh"]
        known = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        with log.open("wb") as file:
            return subprocess.Popen(
                [*words, *command],
                env=known | QUIET | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def die(self):
        found = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True)
        for pid in found.stdout.split():
            os.kill(int(pid), signal.SIGKILL)


def until(what, seconds=SECONDS):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.2)


@pytest.fixture
def machines(tmp_path):
    pytest.importorskip("ray")
    if os.geteuid() or not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("needs root, ip and unshare")
    made = []
    try:
        try:
            made += [Machine(name, tmp_path) for name in ADDRESSES]
            one, other = (machine.space for machine in made)
            ends = ("gen-accel-a", "netns", one), ("gen-accel-b", "netns", other)
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for machine in made:
            link, address = f"gen-accel-{machine.name}", ADDRESSES[machine.name]
            ip("-n", machine.space, "address", "add", f"{address}/24", "dev", link)
            ip("-n", machine.space, "link", "set", link, "up")
        yield made
    finally:
        for machine in made:
            machine.die()
            ip("netns", "delete", machine.space)


def test_a_machine_that_dies_takes_no_video_along(machines, tmp_path):
    head, other = machines
    ray = str(Path(sys.executable).with_name("ray"))
    for machine, how in ((head, ("--head",)), (other, ("--address", HEAD))):
        log = tmp_path / f"{machine.name}.log"
        own = ("--node-ip-address", ADDRESSES[machine.name])
        machine.start(ray, "start", *how, *own, *RAY, log=log, **TOKEN)
        until(lambda log=log: "Ray runtime started" in log.read_text())
    prompts, out, log = tmp_path / "prompts.txt", tmp_path / "cluster", tmp_path / "log"
    prompts.write_text("\n".join(PROMPTS))
    command = [sys.executable, "-m", "gen_accel", "generate", "--model", "demo"]
    command += ["--prompts", str(prompts), "--method", "radial", "--steps", "12"]
    command += ["--frames", "17", "--height", "64", "--width", "64", "--out"]
    by_ray = [*command, str(out / "clip.gif"), "--ray", HEAD]

    refused = head.start(*by_ray, log=log)
    assert refused.wait(SECONDS) == 2
    assert "asks for a token: set RAY_AUTH_MODE=token" in log.read_text()

    running = head.start(*by_ray, log=log, **TOKEN)
    until(lambda: "by machine-b" in log.read_text() and len([*out.glob("*.json")]) >= 3)
    other.die()
    assert running.wait(SECONDS) == 0, log.read_text()
    assert "by machine-a" in log.read_text()
    alone = tmp_path / "alone"
    subprocess.run(
        [*command, str(alone / "clip.gif")],
        check=True,
        capture_output=True,
        env=os.environ | QUIET,
    )
    made, wanted = (
        {path.name: path.read_bytes() for path in folder.glob("*.gif")} for folder in (out, alone)
    )
    assert len(wanted) == len(PROMPTS)
    assert made.keys() == wanted.keys()
    different = [name for name in wanted if made[name] != wanted[name]]
    assert different == []
