"""Work of several machines by Ray: its workers, what each machine must see, and what failed.

A worker is an actor. If one dies, another takes its item, on another machine if its own is gone.
An item whose worker died `ATTEMPTS` times is given up, so that it does not end the others.
"""

import importlib.metadata
import importlib.util
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
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gen_accel.io import check_folder, clear_killed, is_begun
from gen_accel.paths import expanded
from gen_accel.registry import needed_for
from gen_accel.version import __version__

AUTO, LOCAL = "auto", "local"
ADDRESS = re.compile(r"\[?[\w.:-]+\]?:\d{1,5}")
ATTEMPTS = 3  # of an item whose worker dies each time
STORE_BYTES = 78 * 2**20  # of Ray's store on this machine alone, which has 75 MiB at least
PATIENCE = 5.0  # seconds for an address to answer, and for a worker to unwind
LOOKING = 120.0  # seconds for a machine to say what it sees, its imports included
AHEAD = 4  # items for each worker that may be done before the next in order is
MOST_SAID = 400  # characters of an error
PACKAGES = ("torch", "diffusers")  # whose versions must be equal everywhere
QUIET = {  # set before ray is imported, unless they are set already
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # lines of other processes; failures are reported by us
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # of which Ray warns where it is open
    "RAY_TQDM_PATCH_PRINT": "0",  # which puts another print in the place of Python's for good
}
ALONE = {  # likewise, where Ray is started here
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # which makes it listen to 127.0.0.1 alone
    "RAY_worker_niceness": "0",  # in the place of 15, at which workers wait for all others
}
MODE = "RAY_AUTH_MODE"
TOKEN = (
    f"the cluster asks for a token: set {MODE}=token, and have the file ~/.ray/auth_token of its "
    "first machine"
)
CURRENT = Path(tempfile.gettempdir(), "ray", "ray_current_cluster")  # `ray start` writes it


@dataclass(frozen=True)
class Cluster:
    """A cluster of Ray to work on.

    Args:
        address: HOST:PORT of the cluster, "auto" for the cluster that RAY_ADDRESS names or that
            runs on this machine, and if there is none this machine alone, or "local" for this
            machine alone.
        workers: number of processes. None: one for each GPU, or for each machine where no machine
            has a GPU.

    Raises:
        ValueError: an address of another form, or less than one worker.
    """

    address: str = AUTO
    workers: int | None = None

    def __post_init__(self) -> None:
        check_address(self.address)
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"the number of Ray's workers must be at least 1, got {self.workers}")


@dataclass(frozen=True)
class Done:
    """Result of an item, or its failure.

    Args:
        number: of the item.
        result: what the work returned; None where it failed.
        failed: the error in a line; None where there was none.
        host: name of the machine.
        died: machines on which a worker died at the item before.
        told: warnings, a line each.
        loads: whether it failed where the worker loads what all items need.
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


class Machine(NamedTuple):
    """A machine of a cluster, by Ray's number and its own name."""

    node: str
    host: str


def check_address(address: str) -> None:
    """Raise ValueError for an address that is none."""
    if address.startswith("ray://"):
        raise ValueError(
            f"Ray's address {address} is for clients from outside: start the command on a machine "
            "of the cluster, with HOST:6379"
        )
    if address not in (AUTO, LOCAL) and not ADDRESS.fullmatch(address):
        raise ValueError(f"Ray's address must be HOST:PORT, auto or local, got {address!r}")


def check_installed() -> None:
    """Raise ModuleNotFoundError, with the command that installs it, where Ray is missing."""
    with needed_for("--ray", extra="ray"):
        if importlib.util.find_spec("ray") is None:
            raise ModuleNotFoundError("no ray", name="ray")


def cluster_of(address: str | None, workers: int | None, device: str) -> Cluster | None:
    """Return the cluster of both options, checked as far as that takes no time; None without.

    Raises:
        ValueError: an address of another form, workers without Ray, or a device by its number.
        ModuleNotFoundError: Ray is missing.
    """
    if address is None:
        if workers is not None:
            raise ValueError(f"--ray-workers {workers} goes with --ray")
        return None
    check_address(address)
    check_device(device)
    check_installed()
    return Cluster(address, workers)


class Machines:
    """The machines of a connected cluster that have room for a worker.

    Args:
        workers: number of workers.
        gpus: GPUs of a worker, 0 or 1.
        cpus: processors of a worker.
    """

    def __init__(self, known: Sequence[Machine], workers: int, gpus: int, cpus: int) -> None:
        self.known, self.workers, self.gpus, self.cpus = known, workers, gpus, cpus

    def __str__(self) -> str:
        each = "a GPU each" if self.gpus else f"{_counted(self.cpus, 'processor')} each"
        many = _counted(len(self.known), "machine")
        return f"Ray: {_counted(self.workers, 'worker')} on {many}, {each}"

    def check(self, *, writes: Sequence[Path], reads: Sequence[Path]) -> None:
        """Look from each machine at what its workers need.

        Args:
            writes: folders that all machines must share; they are made where missing.
            reads: files and folders that must be there. The folder that this process is in must
                be there too where one of them is relative to it.

        Raises:
            ValueError: names the first machine that lacks something, and what.
            OSError: this machine cannot write to a folder.
        """
        marks: list[Path] = []
        try:
            for folder in dict.fromkeys(writes):
                check_folder(folder)
                number, name = tempfile.mkstemp(prefix=".ray-", dir=folder)
                os.close(number)
                marks.append(Path(name))
            relative = [path for path in (*writes, *reads) if not path.is_absolute()]
            seen = [*([Path.cwd()] if relative else []), *(path.absolute() for path in reads)]
            asked = ([mark.absolute() for mark in marks], seen, versions())
            for machine, fault in self.everywhere(partial(_look, *asked), LOOKING):
                if fault is not None:
                    raise ValueError(f"machine {machine.host} {fault}")
        finally:
            for mark in marks:
                mark.unlink(missing_ok=True)

    def everywhere(self, work: Callable[[], Any], seconds: float) -> Iterator[tuple[Machine, Any]]:
        """Call `work` once on each machine, all at once.

        Yields:
            Each machine with what `work` returned, or with a text of why it could not.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = []
        for machine in self.known:
            there = NodeAffinitySchedulingStrategy(machine.node, soft=False)
            options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
            asked.append(ray.remote(**options)(_called).remote(work))
        for machine, ref in zip(self.known, asked, strict=True):
            try:
                yield machine, ray.get(ref, timeout=seconds)
            except GetTimeoutError:
                yield machine, f"did not answer within {seconds:.0f} s"
            except RayError as error:
                yield machine, f"cannot run gen_accel: {_said(error)}"

    def map(
        self,
        load: Callable[[], Callable[[Any], Any]],
        items: Sequence[Any],
        *,
        ordered: bool = False,
        clears: Sequence[Sequence[Path]] = (),
    ) -> Generator[Done, None, None]:
        """Work on all items. Close the iterator where it is not gone through to its end.

        Args:
            load: called once by each worker; returns what is called with each item. Both are
                pickled.
            ordered: whether the results come in the order of the items; else each as soon as it
                is there.
            clears: files that are written for each item. What is half written of them is removed
                where the work is interrupted.

        Yields:
            One for each item.
        """
        if not items:
            return
        import ray
        from ray.exceptions import RayActorError, RayError

        cpus = 0 if self.gpus else self.cpus
        make: Any = ray.remote(num_gpus=self.gpus, num_cpus=cpus)(_Worker)
        seats: list[_Seat] = []
        idle: list[_Seat] = []
        asked: dict[Any, tuple[_Seat, int]] = {}  # by the reference of the answer
        left, turn = deque(range(len(items))), 0
        died: dict[int, list[str]] = {}
        found: dict[int, Done] = {}  # answers that wait for their turn
        try:
            while left or asked:
                lag = turn + AHEAD * self.workers if ordered else len(items)
                while left and left[0] < lag and len(asked) < self.workers:
                    count = 0 if idle else min(self.workers - len(asked), len(left))
                    for worker in [make.remote(load, os.getcwd()) for _ in range(count)]:
                        host = "a machine that is gone"
                        with suppress(RayError):
                            host = str(ray.get(worker.host.remote(), timeout=LOOKING))
                        idle.append(_Seat(worker, host))
                        seats.append(idle[-1])
                    seat, number = idle.pop(), left.popleft()
                    asked[seat.worker.work.remote(number, items[number])] = seat, number
                [ref], _ = ray.wait([*asked], num_returns=1)
                seat, number = asked.pop(ref)
                hosts = died.setdefault(number, [])
                try:
                    done = replace(ray.get(ref), died=tuple(hosts))
                    idle.append(seat)
                except RayActorError:
                    hosts.append(seat.host)
                    if len(hosts) < ATTEMPTS:
                        left.appendleft(number)
                        continue
                    where = ", ".join(dict.fromkeys(hosts))
                    failed = f"its worker died {len(hosts)} times, on {where}; ray logs says why"
                    done = Done(number, None, failed, hosts[-1], tuple(hosts))
                if not ordered:
                    yield done
                    continue
                found[number] = done
                while turn in found:
                    yield found.pop(turn)
                    turn += 1
        finally:
            for seat in seats:
                ray.kill(seat.worker)
            files = [path for _, number in asked.values() if clears for path in clears[number]]
            if files:
                # A list waits for the answer of each machine.
                list(self.everywhere(partial(_cleared, files), 3 * PATIENCE))


class _Seat(NamedTuple):
    """A worker, and the name of its machine, which nobody could ask once it has died."""

    worker: Any
    host: str


@contextmanager
def connected(cluster: Cluster, device: str = "auto") -> Iterator[Machines]:
    """Connect to a cluster, or start Ray on this machine; a connection that is there is used.

    Args:
        device: of a worker: "cpu" leaves GPUs out.

    Raises:
        ValueError: nothing answers at the address, the device has a number, there are no GPUs for
            "cuda", or more workers than there is room for.
        ModuleNotFoundError: Ray is missing.
    """
    check_device(device)
    check_installed()
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError("Ray divides the work by itself: leave accelerate launch out")
    wanted = {**QUIET, **(ALONE if _is_alone(cluster.address) else {})}
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    level = logging.getLogger("ray").level
    try:
        import ray

        if ray.is_initialized():
            yield _machines(cluster, device)
            return
        with _process_kept():
            _connect(cluster.address)
            try:
                yield _machines(cluster, device)
            finally:
                ray.shutdown()
    finally:
        for name in ours:
            os.environ.pop(name, None)
        logging.getLogger("ray").setLevel(level)


def check_device(device: str) -> None:
    """Raise ValueError for a device by its number, which Ray gives to its workers."""
    if ":" in device:
        raise ValueError(f"Ray gives each worker a GPU: leave the number out of device {device}")


def versions() -> dict[str, str]:
    """Return the versions that decide what a file is."""
    found = {"gen_accel": __version__}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _connect(address: str) -> None:
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if _is_alone(address):
        quiet |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        address = LOCAL
    elif address != AUTO:
        _check_answers(address)
    with _silent():
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = {LOCAL: "on this machine", AUTO: "as it was started here"}.get(address)
            where = where or f"at {address}"
            said = TOKEN if "AuthenticationError" in str(error.__context__) else _said(error)
            raise ValueError(
                f"Ray cannot be used {where}, --ray local starts another: {said}"
            ) from error


def _is_alone(address: str) -> bool:
    """Whether Ray is started on this machine alone, as no cluster is asked for or known here."""
    known = "RAY_ADDRESS" in os.environ or CURRENT.exists()
    return address == LOCAL or (address == AUTO and not known)


def _check_answers(address: str) -> None:
    """Refuse an address where nobody listens, for which Ray itself tries for a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"no cluster of Ray answers at {address} ({error}): `ray start --head` prints the "
            "address of one"
        ) from None


def _machines(cluster: Cluster, device: str) -> Machines:
    """Choose the machines and the size of a worker."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in nodes}
    total = sum(gpus.values())
    if device == "cuda" and not total:
        raise ValueError("device cuda is not there: no machine of Ray has a GPU")
    if total and device in ("auto", "cuda"):
        fitting = [node for node in nodes if gpus[node["NodeID"]]]
        workers = cluster.workers or total
        if workers > total:
            raise ValueError(
                f"{workers} workers of Ray need a GPU each, the cluster has {total}: ask for fewer"
            )
        return Machines(_sorted(fitting), workers, 1, 0)
    cpus = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in nodes}
    fitting = [node for node in nodes if cpus[node["NodeID"]]]
    workers, total = cluster.workers or len(fitting), sum(cpus.values())
    if workers > total or not fitting:
        raise ValueError(
            f"{max(1, workers)} workers of Ray need a processor each, the cluster has {total}: "
            "ask for fewer"
        )
    each = total // workers
    while sum(count // each for count in cpus.values()) < workers:
        each -= 1
    return Machines(_sorted(fitting), workers, 0, each)


def _sorted(nodes: Sequence[Any]) -> list[Machine]:
    found = [Machine(node["NodeID"], node["NodeManagerHostname"]) for node in nodes]
    return sorted(found, key=lambda machine: (machine.host, machine.node))


@contextmanager
def _process_kept() -> Iterator[None]:
    """Put back what answers SIGTERM, and the mode of authentication, which Ray sets and leaves."""
    before, mode = signal.getsignal(signal.SIGTERM), os.environ.get(MODE)
    try:
        yield
    finally:
        if mode is None:
            os.environ.pop(MODE, None)
        if before is not None and signal.getsignal(signal.SIGTERM) is not before:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep Ray's core, which is no Python, off stderr while it starts."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _Worker:
    """An actor that works on items.

    Args:
        load: called before the first item; returns what is called with each item.
        folder: start of relative paths, if this machine has it.
    """

    def __init__(self, load: Callable[[], Callable[[Any], Any]], folder: str) -> None:
        self._load = load
        with suppress(OSError):
            os.chdir(folder)
        self._work: Callable[[Any], Any] | None = None

    def host(self) -> str:
        return platform.node()

    def work(self, number: int, item: Any) -> Done:
        result = failed = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                if self._work is None:
                    self._work = self._load()
                result = self._work(item)
            except Exception as error:
                failed = _said(error)
        told = dict.fromkeys(str(one.message) for one in caught if _is_ours(one))
        loads = self._work is None
        return Done(number, result, failed, platform.node(), (), tuple(told), loads)


def _is_ours(warning: warnings.WarningMessage) -> bool:
    """Whether a warning is meant for users, as they see it without Ray."""
    return issubclass(warning.category, UserWarning | RuntimeWarning)


def _called(work: Callable[[], Any]) -> Any:
    return work()


def _look(marks: Sequence[Path], reads: Sequence[Path], expected: dict[str, str]) -> str | None:
    """Say what this machine lacks; None where it lacks nothing."""
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


def _cleared(files: Sequence[Path]) -> None:
    """Remove half-written files of workers that were killed, as soon as they have ended."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        for path in files:
            clear_killed(expanded(path))
        if not any(is_begun(expanded(path)) for path in files):
            return
        time.sleep(0.05)


def _said(error: BaseException) -> str:
    """Say an error in a line, without the traceback that Ray puts before it."""
    cause: Any = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = lines[-1] if isinstance(cause, Exception) and "Traceback" in str(cause) else None
    text = (text or " ".join(lines))[:MOST_SAID]
    if isinstance(cause, ValueError | OSError | ImportError | MemoryError) and text:
        return text
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
