"""Calls that may be killed, may not end, or may eat the machine: each in a process of its own.

A server has imported all that they need, and forks once for each call, which takes a twentieth of
a second. What a call changes in memory is gone after it.
"""

import contextlib
import functools
import gc
import os
import pickle
import pkgutil
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from support.forked import CONTEXT, IMPORTED
from support.paths import environment

OTHERS = "matplotlib.backends.backend_agg", "rich.progress", "yaml"
CPU_SECONDS = 20
MEMORY = 1 << 30  # bytes, beyond what the server has
LOST = 70  # exit code of a child that could not tell how it ended
WALL_SECONDS = 300.0  # a process that sleeps; machines may stop for a while


@dataclass(frozen=True)
class Limits:
    """What a call may take.

    Args:
        cpu: seconds.
        memory: bytes of data, beyond those of the server.
        file: bytes of a file, beyond which a disk is full; None: any.
        wall: seconds by the clock.
    """

    cpu: int = CPU_SECONDS
    memory: int = MEMORY
    file: int | None = None
    wall: float = WALL_SECONDS


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Args:
        code: of the process; -9 where signal 9 ended it.
        result: what the call returned; None where it did not.
        opened: what descriptors lead to that it left open.
        seconds: of CPU.
    """

    code: int
    out: str
    err: str
    result: Any
    opened: list[str]
    seconds: float


class Cell:
    """The server.

    Args:
        home: a folder for what `prepare` writes. Caches lie beside it.

    Attributes:
        seconds: of CPU, of all calls that ended.
    """

    def __init__(self, home: Path) -> None:
        here, there = CONTEXT.Pipe()
        self._pipe: Connection = here
        self.seconds = 0.0
        rest = home.with_name(f"{home.name}-rest")
        rest.mkdir()
        env = environment(
            XDG_CACHE_HOME=str(rest), TMPDIR=str(rest), HF_HOME=str(rest), COLUMNS="200"
        )
        env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        context: Any = CONTEXT
        self._process = context.Process(target=_serve, args=(there, env), daemon=True)
        self._process.start()
        there.close()

    def prepare(self, call: Callable[..., Any], *args: Any) -> Any:
        """Run in the server itself: all calls after it find what it made."""
        return self._ask("prepare", _name(call), args)

    def start(
        self, call: Callable[..., Any], *args: Any, folder: Path, limits: Limits | None = None
    ) -> int:
        """Begin a call in `folder`; the number of its process."""
        return self._ask("start", _name(call), args, str(folder), limits or Limits())

    def wait(self, process: int, seconds: float = WALL_SECONDS) -> Outcome | None:
        """The end of a process; None if there is none within `seconds`."""
        found = self._ask("wait", process, seconds)
        self.seconds += 0 if found is None else found.seconds
        return found

    def __call__(
        self, call: Callable[..., Any], *args: Any, folder: Path, limits: Limits | None = None
    ) -> Outcome:
        """A call from its beginning to its end, which is made where it does not come."""
        process = self.start(call, *args, folder=folder, limits=limits)
        found = self.wait(process, (limits or Limits()).wall)
        if found is None:
            os.kill(process, signal.SIGKILL)
            found = self.wait(process)
        assert found is not None
        return found

    def close(self) -> None:
        self._pipe.send(("close",))
        self._process.join()

    def _ask(self, *request: Any) -> Any:
        self._pipe.send(request)
        answer, failed = self._pipe.recv()
        if failed:
            raise RuntimeError(answer)
        return answer


def _name(call: Callable[..., Any]) -> str:
    return f"{call.__module__}:{call.__qualname__}"


def _found(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


def _serve(pipe: Connection, env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = env["PYTHONPATH"].split(os.pathsep)
    _import_all()
    running: dict[int, Running] = {}
    while True:
        kind, *request = pipe.recv()
        if kind == "close":
            return
        try:
            match kind:
                case "prepare":
                    name, args = request
                    answer = _found(name)(*args)
                case "start":
                    answer, one = _fork(*request)
                    running[answer] = one
                case _:
                    answer = _waited(running, *request)
            pipe.send((answer, False))
        except Exception:
            pipe.send((traceback.format_exc(), True))


def _import_all() -> None:
    """What any call may need, once."""
    import torch

    import gen_accel

    torch.set_num_threads(1)
    ours = [one.name for one in pkgutil.walk_packages(gen_accel.__path__, "gen_accel.")]
    ours = [name for name in ours if not name.startswith("gen_accel.ui")]  # of servers alone
    for module in (*IMPORTED, *OTHERS, *ours):
        with contextlib.suppress(ImportError):  # an extra that is not here
            import_module(module)
    # The parser and the families too are made once, which takes longer than most calls.
    import typer.main

    from gen_accel.attention_processors.families import served_classes
    from gen_accel.cli import app

    typer.main.get_command = functools.cache(typer.main.get_command)
    typer.main.get_command(app)
    served_classes()


class Running:
    """A call under way, and what it says: through pipes, which no limit of a file's size holds."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self.ends = {number: os.pipe() for number in ("out", "err", "result")}
        self.said = dict.fromkeys(self.ends, b"")

    def in_child(self) -> None:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(self.ends[name][1], number)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115

    def in_server(self) -> None:
        for reader, writer in self.ends.values():
            os.close(writer)
            os.set_blocking(reader, False)
            self.open.add(reader)

    def drain(self) -> None:
        for name, (reader, _) in self.ends.items():
            with contextlib.suppress(BlockingIOError):
                while part := os.read(reader, 1 << 16):
                    self.said[name] += part
                self.open.discard(reader)  # nobody writes to it any more

    def ended(self, process: int, seconds: float) -> bool:
        """Wait for the end of a process, and take what it says until then."""
        number, until = os.pidfd_open(process), time.monotonic() + seconds
        try:
            while True:
                left = max(0.0, until - time.monotonic())
                ready, _, _ = select.select([number, *self.open], [], [], left)
                self.drain()
                if number in ready or not ready:
                    return number in ready
        finally:
            os.close(number)

    def close(self) -> None:
        self.drain()
        for reader, _ in self.ends.values():
            os.close(reader)


def _fork(name: str, args: Sequence[Any], folder: str, limits: Limits) -> tuple[int, Running]:
    call, one = _found(name), Running()
    gc.freeze()  # a collection in the child would copy all pages
    process = os.fork()
    if process == 0:
        code = LOST
        try:
            code = _run(one, call, args, folder, limits)
        finally:
            os._exit(code)
    one.in_server()
    return process, one


def _run(
    one: Running, call: Callable[..., Any], args: Sequence[Any], folder: str, limits: Limits
) -> int:
    """In the child; its exit code."""
    os.setsid()  # what it started ends with it, see `_waited`
    os.chdir(folder)
    one.in_child()
    _limit(limits)
    before, code, result = _descriptors(), 0, None
    try:
        result = call(*args)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    gc.collect()
    opened = sorted(where for _, where in _descriptors() - before)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os.write(one.ends["result"][1], pickle.dumps((result, opened)))
    return code


def _limit(limits: Limits) -> None:
    status = Path("/proc/self/status").read_text().splitlines()
    data = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    most = data + limits.memory
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu, limits.cpu))
    if limits.file is not None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file, hard))


def _descriptors() -> set[tuple[str, str]]:
    """Numbers of those open, with what they lead to."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


def _waited(running: dict[int, Running], process: int, seconds: float) -> Outcome | None:
    one = running[process]
    if not one.ended(process, seconds):
        return None
    _, status, used = os.wait4(process, 0)
    with contextlib.suppress(ProcessLookupError):  # an ffmpeg that outlives whom it worked for
        os.killpg(process, signal.SIGKILL)
    running.pop(process).close()
    result, opened = pickle.loads(one.said["result"]) if one.said["result"] else (None, [])
    out, err = (one.said[name].decode(errors="replace") for name in ("out", "err"))
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, out, err, result, opened, used.ru_utime + used.ru_stime)


def command_line(arguments: Sequence[str]) -> None:
    """`gen-accel` with these arguments."""
    from gen_accel.cli import main

    sys.argv = ["gen-accel", *arguments]
    main()
