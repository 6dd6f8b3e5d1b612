"""Free memory, and errors for requests that cannot fit in it, raised before they are made."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

GROUP = Path("/sys/fs/cgroup")
SMALL = 64 << 20  # bytes; smaller requests are not checked

_SPARE: ContextVar[Callable[[], int] | None] = ContextVar("spare", default=None)


@contextmanager
def with_spare(spare: Callable[[], int]) -> Iterator[None]:
    """Count as free what this process would let go of: `spare()` bytes of the host's memory."""
    before = _SPARE.set(spare)
    try:
        yield
    finally:
        _SPARE.reset(before)


def check_room(what: str, size: int, fix: str, device: Any = None) -> None:
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


def free_bytes(device: Any) -> int | None:
    """Free bytes of a torch.device; None where unknown. On a GPU, includes memory that torch holds
    and does not use."""
    if device.type == "cuda":
        import torch

        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return _free_of_host() if device.type == "cpu" else None


def _free_of_host() -> int | None:
    """Bytes that Linux has free within the limit of the container; elsewhere all of the memory,
    None where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        rows = dict(line.split(":", 1) for line in lines)
        free = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return _all_of_host()
    limit, used = (_number_in(GROUP / f"memory.{name}") for name in ("max", "current"))
    free = free if limit is None or used is None else min(free, max(0, limit - used))
    spare = _SPARE.get()
    return free if spare is None else free + spare()


def _all_of_host() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None


def _number_in(file: Path) -> int | None:
    """Read a number from a file; None where there is no such file, or no limit, written "max"."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
