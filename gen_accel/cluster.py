"""Work of several machines by Ray: map over its workers, what each machine must see, what failed.

A worker is an actor. If one dies, another takes its item, on another machine if its own is gone.
An item whose worker died `ATTEMPTS` times is given up, so that it does not end the others.
"""

import importlib.metadata
import logging
import os
import platform
import re
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from gen_accel.io import check_folder, clear_killed, distrust, is_begun, trusted_text
from gen_accel.parsing import shown
from gen_accel.paths import expanded
from gen_accel.registry import check_package
from gen_accel.version import __version__

Item = TypeVar("Item")

AUTO, LOCAL = "auto", "local"
ADDRESS = re.compile(r"\[?[\w.:-]+\]?:\d{1,5}")
ATTEMPTS = 3  # of an item whose worker dies each time
STORE_BYTES = 78 * 2**20  # of Ray's store on this machine alone, which has 75 MiB at least
PATIENCE = 5.0  # seconds for an address to answer, and for a worker to unwind
LOOKING = 120.0  # seconds for a machine to say what it sees, its imports included
AHEAD = 4  # items for each worker that may be done before the next in order is
MOST_SAID = 400  # characters of an error
SETTINGS = {  # of Ray as it is started here, unless they are set already
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # of which Ray warns if it is open
    "RAY_TQDM_PATCH_PRINT": "0",  # which replaces Python's print for good
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # which alone makes it listen to 127.0.0.1 alone
    "RAY_worker_niceness": "0",  # in place of 15, at which workers wait for all others
}
MODE = "RAY_AUTH_MODE"
TOKEN = (
    f"the cluster asks for a token: set {MODE}=token, and have the file ~/.ray/auth_token of its "
    "first machine"
)
CURRENT = Path(tempfile.gettempdir(), "ray", "ray_current_cluster")  # `ray start` writes it


class Cluster(NamedTuple):
    """A cluster of Ray to work on.

    Args:
        address: HOST:PORT; "auto": the cluster that RAY_ADDRESS names, or that runs on this
            machine if no other user can have named it, or else this machine alone; "local": this
            machine alone.
        workers: number of processes. None: one for each GPU, or for each machine if no machine
            has a GPU.
    """

    address: str = AUTO
    workers: int | None = None


def cluster_of(address: str | None, workers: int | None, device: str) -> Cluster | None:
    """Return the cluster of both options, checked as far as that takes no time; None without.

    Raises:
        ValueError: an address of another form, less than one worker, workers without Ray, or a
            device by its number.
        ModuleNotFoundError: Ray is missing; names the command that installs it.
    """
    if address is None:
        if workers is not None:
            raise ValueError(f"--ray-workers {workers} goes with --ray")
        return None
    if address.startswith("ray://"):
        raise ValueError(
            f"Ray's address {address} is for clients from outside: start the command on a machine "
            "of the cluster, with HOST:6379"
        )
    if address not in (AUTO, LOCAL) and not ADDRESS.fullmatch(address):
        raise ValueError(f"Ray's address must be HOST:PORT, auto or local, got {shown(address)}")
    if workers is not None and workers < 1:
        raise ValueError(f"the number of Ray's workers must be at least 1, got {workers}")
    if ":" in device:
        raise ValueError(f"Ray gives each worker a GPU: leave the number out of device {device}")
    check_package("--ray", "ray", extra="ray")
    return Cluster(address, workers)


@dataclass(frozen=True)
class Done:
    """Result of an item, or its failure.

    Args:
        number: of the item.
        failed: the error in a line; None if there was none.
        host: name of the machine.
        died: machines on which a worker died at the item before.
        told: warnings, a line each.
        loads: whether it failed as the worker loaded what all items need.
    """

    number: int
    result: Any
    failed: str | None
    host: str
    died: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    loads: bool = False

    @property
    def is_given_up(self) -> bool:
        """Whether each worker died at the item."""
        return len(self.died) >= ATTEMPTS


@dataclass(frozen=True)
class Machines:
    """The machines of a connected cluster that have room for a worker.

    Args:
        count: number of machines.
        workers: number of workers.
        gpus, cpus: GPUs and processors of a worker.
    """

    count: int
    workers: int
    gpus: int
    cpus: int

    def __str__(self) -> str:
        each = f"GPUs {self.gpus}" if self.gpus else f"processors {self.cpus}"
        return f"Ray: machines {self.count}, workers {self.workers}, of each {each}"

    def map(
        self,
        load: Callable[[], Callable[[Item], object]],
        items: Sequence[Item],
        *,
        ordered: bool = False,
        reads: Sequence[Path] = (),
        clears: Sequence[Sequence[Path]] = (),
    ) -> Generator[Done, None, None]:
        """Work on all items, and yield what came of each. Close the iterator if it is not gone
        through to its end.

        Args:
            load: called once by each worker; returns what is called with each item. Both are
                pickled.
            ordered: whether the results come in the order of the items.
            reads: files and folders that must be on each machine.
            clears: files that are written for each item, to folders that all machines share. What
                is half written of them is removed if the work is interrupted.

        Raises:
            ValueError: names the machine of a worker that lacks something, and what.
            OSError: this machine cannot write to a folder.
        """
        import ray
        from ray.exceptions import RayActorError, RayError

        make: Any = ray.remote(num_gpus=self.gpus, num_cpus=self.cpus)(_Worker)
        hosts: dict[Any, str] = {}  # by the worker, whom nobody could ask once it has died
        asked: dict[Any, tuple[Any, int]] = {}  # worker and item, by the reference of the answer
        idle, lost = list[Any](), list[str]()  # the latter: why workers could not start
        left, turn = deque(range(len(items))), 0
        died: dict[int, tuple[str, ...]] = {}
        found: dict[int, Done] = {}  # answers that wait for their turn

        def start(count: int) -> None:
            some = [make.remote(load, os.getcwd()) for _ in range(count)]
            for worker, look in [(one, one.look.remote(*needs)) for one in some]:
                try:
                    hosts[worker], fault = ray.get(look, timeout=LOOKING)
                except RayError as error:  # its machine is gone, or lacks gen_accel
                    ray.kill(worker)
                    lost.append(_said(error))
                    continue
                if fault is not None:
                    raise ValueError(f"machine {hosts[worker]} {fault}")
                idle.append(worker)

        with ExitStack() as stack:
            marks = []
            for folder in dict.fromkeys(path.absolute().parent for of in clears for path in of):
                check_folder(folder)
                mark = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".ray-", dir=folder))
                marks.append(Path(mark.name))
            needs = marks, [path.absolute() for path in reads], versions()
            stack.callback(_end, hosts, asked, clears)
            start(min(self.workers, len(items)))
            while left or asked:
                lag = turn + AHEAD * self.workers if ordered else len(items)
                while idle and left and left[0] < lag:
                    worker, number = idle.pop(), left.popleft()
                    asked[worker.work.remote(number, items[number])] = worker, number
                if not asked:
                    raise ValueError(f"no worker of Ray could start: {lost[-1]}")
                [ref], _ = ray.wait([*asked], num_returns=1)
                worker, number = asked.pop(ref)
                try:
                    done = replace(ray.get(ref), died=died.get(number, ()))
                    idle.append(worker)
                except RayActorError:
                    died[number] = (*died.get(number, ()), hosts[worker])
                    if again := len(died[number]) < ATTEMPTS:
                        left.appendleft(number)
                    if left:
                        start(1)
                    if again:
                        continue
                    where = ", ".join(dict.fromkeys(died[number]))
                    failed = f"its worker died {ATTEMPTS} times, on {where}; ray logs says why"
                    done = Done(number, None, failed, hosts[worker], died[number])
                found[number] = done
                while found and (turn in found or not ordered):
                    yield found.pop(turn if ordered else number)
                    turn += 1


def _end(
    workers: Iterable[Any], asked: Mapping[Any, tuple[Any, int]], clears: Sequence[Sequence[Path]]
) -> None:
    """End workers, and remove what they leave half written as soon as they have ended."""
    import ray

    for worker in workers:
        ray.kill(worker)
    files = [path for _, number in asked.values() if clears for path in clears[number]]
    until = time.monotonic() + PATIENCE
    while files and time.monotonic() < until:
        for path in files:
            clear_killed(expanded(path))
        files = [path for path in files if is_begun(expanded(path))]
        time.sleep(0.05)


@contextmanager
def connected(cluster: Cluster, device: str = "auto") -> Iterator[Machines]:
    """Connect to a cluster, or start Ray on this machine; a connection that is there is used.

    Args:
        device: of a worker: "cpu" leaves GPUs out.

    Raises:
        ValueError: nothing answers at the address, there are no GPUs for "cuda", or more workers
            than there is room for.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError("Ray divides the work by itself: leave accelerate launch out")
    before, answer = {**os.environ}, signal.getsignal(signal.SIGTERM)
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    try:
        import ray

        is_ours = not ray.is_initialized()
        print("connecting to Ray ...", file=sys.stderr, flush=True)
        if is_ours:
            _connect(cluster)
        try:
            machines = _machines(cluster, device)
            print(machines, file=sys.stderr, flush=True)
            yield machines
        finally:
            if is_ours:
                ray.shutdown()
    finally:  # Ray leaves its own answer to SIGTERM and its variables
        if answer is not None and signal.getsignal(signal.SIGTERM) is not answer:
            signal.signal(signal.SIGTERM, answer)
        for name in [one for one in os.environ if one.startswith("RAY_") and one not in before]:
            del os.environ[name]


def _connect(cluster: Cluster) -> None:
    import ray

    address, own = cluster.address, {}
    if address == AUTO and os.environ.get("RAY_ADDRESS", "") in ("", AUTO):
        address = _started_here() or LOCAL
    if address == LOCAL:  # Ray is started here
        own = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    elif address != AUTO:  # for which Ray itself tries for a minute
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"no cluster of Ray answers at {address} ({error}): `ray start --head` prints the "
                "address of one"
            ) from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = {LOCAL: "on this machine", AUTO: "at RAY_ADDRESS"}
        said = TOKEN if "AuthenticationError" in str(error.__context__) else _said(error)
        raise ValueError(
            f"Ray cannot be used {where.get(address, f'at {address}')}, --ray local starts "
            f"another: {said}"
        ) from error


def _started_here() -> str | None:
    """Address of the cluster that `ray start` began on this machine; None for none.

    Raises ValueError if another user may have written it: what goes there is pickled, and who
    answers there has what this user may do.
    """
    if not CURRENT.exists():
        return None
    text = trusted_text(CURRENT)
    if text is None:
        wrong = (distrust(one.stat(), one) for one in (CURRENT, CURRENT.parent))
        why = next(filter(None, wrong), "it cannot be read")
        raise ValueError(
            f"the cluster that {CURRENT} names is not used, as another user may have named it: "
            f"give --ray HOST:PORT or --ray local ({why})"
        )
    return text.strip() or None


def _machines(cluster: Cluster, device: str) -> Machines:
    """Choose the machines and the size of a worker: a GPU, or an equal share of processors."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have = {kind: [int(one[kind]) for one in nodes if one.get(kind)] for kind in ("GPU", "CPU")}
    if device == "cuda" and not have["GPU"]:
        raise ValueError("device cuda is not there: no machine of Ray has a GPU")
    kind = "GPU" if have["GPU"] and device in ("auto", "cuda") else "CPU"
    total, machines = sum(have[kind]), len(have[kind])
    workers = cluster.workers or (total if kind == "GPU" else machines)
    if workers > total or not workers:
        unit = "GPU" if kind == "GPU" else "processor"
        raise ValueError(
            f"{max(1, workers)} workers of Ray need a {unit} each, the cluster has {total}: ask "
            "for fewer"
        )
    each = 1 if kind == "GPU" else total // workers
    while sum(count // each for count in have[kind]) < workers:
        each -= 1
    return Machines(machines, workers, *((each, 0) if kind == "GPU" else (0, each)))


class _Worker:
    """Actor of Ray: loads once, in the folder of the process that asks, and works on items."""

    def __init__(self, load: Callable[[], Callable[[Any], object]], folder: str) -> None:
        self._load, self._work = load, None
        with suppress(OSError):
            os.chdir(folder)

    def look(
        self, marks: Sequence[Path], reads: Sequence[Path], expected: dict[str, str]
    ) -> tuple[str, str | None]:
        """Return the name of this machine, and what it lacks."""
        return platform.node(), _look(marks, reads, expected)

    def work(self, number: int, item: object) -> Done:
        result = failed = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                self._work = self._work or self._load()
                result = self._work(item)
            except Exception as error:
                failed = _said(error)
        shown = [one for one in caught if issubclass(one.category, UserWarning | RuntimeWarning)]
        told = dict.fromkeys(str(one.message) for one in shown)
        return Done(number, result, failed, platform.node(), (), tuple(told), self._work is None)


def versions() -> dict[str, str]:
    """Return the versions that decide what a file is, and must be equal everywhere."""
    found = {"gen_accel": __version__}
    for name in ("torch", "diffusers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _look(marks: Sequence[Path], reads: Sequence[Path], expected: dict[str, str]) -> str | None:
    """Say what this machine lacks; None if it lacks nothing."""
    for name, version in expected.items():
        found = versions().get(name)
        if found != version:
            return f"has {name} {found or 'not at all'}, asked for is {version}: install it there"
    for mark in marks:
        if not mark.exists():
            return (
                f"does not see the folder {mark.parent}, which all machines write to: give one "
                "that they share, at the same path"
            )
        try:
            check_folder(mark.parent)
        except OSError as error:
            return str(error)
    for path in reads:
        if not path.exists():
            return f"has nothing at {path}: put it there, or on a disk that all machines share"
    return None


def _said(error: BaseException) -> str:
    """Say an error in a line, without the traceback that Ray puts before it."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = lines[-1] if isinstance(cause, Exception) and "Traceback" in str(cause) else None
    text = (text or " ".join(lines))[:MOST_SAID]
    if isinstance(cause, ValueError | OSError | ImportError | MemoryError) and text:
        return text
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
