"""Memory: how much is free, errors for requests that cannot fit in it, raised before they are
made, and plans and layouts that are kept by method and grid."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import is_dataclass
from functools import wraps
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GROUP = Path("/sys/fs/cgroup")
COUNTS = (GROUP / "memory.events", Path("/proc/vmstat"))  # of the container, of the machine
SMALL = 64 << 20  # bytes; smaller requests are not checked
# Bytes that all functions remember together. A result that takes more is remembered alone, until
# the next one is asked for.
MOST = 512 << 20
# Least bytes that a result takes beside its tensors.
LEAST = 1 << 14

Function = TypeVar("Function", bound=Callable[..., Any])

_SPARE: ContextVar[Callable[[], int] | None] = ContextVar("spare", default=None)


@contextmanager
def with_spare(spare: Callable[[], int]) -> Iterator[None]:
    """Count as free what this process would let go of: `spare()` bytes of the host's memory."""
    before = _SPARE.set(spare)
    try:
        yield
    finally:
        _SPARE.reset(before)


def check_room(what: str, size: int, fix: str, device: "torch.device | None" = None) -> None:
    """Refuse a request for more memory than is free.

    Args:
        what: begins the sentence, as in "3 frames of 480 x 832".
        size: lower bound in bytes, so that nothing is refused that would fit.
        fix: advice for the end of the message.
        device: a torch.device; None is the host.

    Raises ValueError with the memory asked for and the memory that is free.
    """
    if size < SMALL:
        return
    free = _free_of_host() if device is None else free_bytes(device)
    if free is not None and size > free:
        where = "" if device is None or device.type == "cpu" else f" on {device}"
        raise ValueError(
            f"{what} cannot fit: at least {in_words(size)} of memory, and {in_words(free)} are "
            f"free{where}; {fix}"
        )


def in_words(size: int) -> str:
    """Format bytes for a person, from megabytes to petabytes."""
    if size >= 10**18:  # which no machine has, however many more it is
        return "1000 PB"
    for unit, power in (("PB", 15), ("TB", 12), ("GB", 9)):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size / 1e6:.1f} MB"


def free_bytes(device: "torch.device") -> int | None:
    """Free bytes of a torch.device; None if unknown. On a GPU, includes memory that torch holds
    and does not use."""
    if device.type == "cuda":
        import torch

        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return _free_of_host() if device.type == "cpu" else None


def _free_of_host() -> int | None:
    """Bytes that Linux has free within the limit of the container; elsewhere all of the memory,
    None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        rows = dict(line.split(":", 1) for line in lines)
        free = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        with suppress(AttributeError, OSError, ValueError):  # not on Windows
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return None
    limit, used = (_number_in(GROUP / f"memory.{name}") for name in ("max", "current"))
    free = free if limit is None or used is None else min(free, max(0, limit - used))
    spare = _SPARE.get()
    return free if spare is None else free + spare()


def kills_of_memory() -> int | None:
    """Number of processes that Linux has killed for want of memory, of this container where it
    counts them; None if unknown."""
    for file in COUNTS:
        with suppress(OSError, ValueError):
            rows = dict(line.split() for line in file.read_text(encoding="ascii").splitlines())
            if "oom_kill" in rows:
                return int(rows["oom_kill"])
    return None


def _number_in(file: Path) -> int | None:
    """Read a number from a file; None without such a file, or for no limit, written "max"."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


class PlanCache:
    """Results of functions by their arguments, the least recently used forgotten first.

    A result may grow after it was made, as a plan does when a kernel prepares it, so the sizes of
    all are taken again when one is added. A forgotten result lives on while it is in use.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._known: OrderedDict[tuple, Any] = OrderedDict()
        self._lock = RLock()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Return the result known by `key`, which is hashable, or else call `make`."""
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        made = make()
        with self._lock:
            self._known[key] = made
            self._shrink()
        return made

    def forget(self) -> None:
        """Forget all results."""
        with self._lock:
            self._known.clear()

    def bytes(self) -> int:
        """Bytes of all results together."""
        with self._lock:
            return sum(map(bytes_of, self._known.values()))

    def _shrink(self) -> None:
        sizes = {key: bytes_of(made) for key, made in self._known.items()}
        total = sum(sizes.values())
        while total > self.most and len(self._known) > 1:
            key, _ = self._known.popitem(last=False)
            total -= sizes[key]


PLAN_CACHE = PlanCache(MOST)


def plan_cached(function: Function) -> Function:
    """Make `PLAN_CACHE` remember the results of a function by its arguments, which are positional
    and hashable. torch.compile does not trace it: a graph takes the result as it is."""

    import torch

    @torch.compiler.disable(reason="a plan is made once for a grid, between two graphs")
    @wraps(function)
    def cached(*args: object) -> object:
        return PLAN_CACHE.get((function, *args), lambda: function(*args))

    made: Any = cached
    return made


def bytes_of(result: object) -> int:
    """Bytes of the tensors that a result holds, each storage once, and `LEAST`."""
    return LEAST + sum(dict(map(_storage, _tensors(result))).values())


def _storage(x: "Tensor") -> tuple[int, int]:
    """Identity of a tensor's storage, and its bytes."""
    try:
        storage = x.untyped_storage()
    except NotImplementedError:  # a tensor wrapped by torch.func
        return id(x), x.numel() * x.element_size()
    return storage._cdata, storage.nbytes()


def _tensors(held: Any) -> Iterator["Tensor"]:
    if hasattr(held, "untyped_storage"):
        yield held
    elif isinstance(held, (tuple, list)):
        for one in held:
            yield from _tensors(one)
    elif isinstance(held, dict):
        yield from _tensors([*held.values()])
    elif is_dataclass(held):
        yield from _tensors(vars(held))
