"""Memory that there is, and what cannot fit in it refused before it is asked for."""

import os
from pathlib import Path
from typing import Any

GROUP = Path("/sys/fs/cgroup")
SMALL = 64 << 20  # bytes that are not worth a look at what is free


def check_room(what: str, size: int, fix: str, device: Any = None) -> None:
    """Refuse what needs more memory than is free.

    Args:
        what: begins the sentence, as in "3 frames of 480 x 832".
        size: bytes that it takes at the least, so that nothing is refused that would fit.
        fix: what to do instead.
        device: a torch.device; None is the host.

    Raises ValueError with what is asked for and what there is.
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
    """Bytes as a person reads them, from megabytes to petabytes."""
    if size >= 10**18:  # which no machine has, however many more it is
        return "1000 PB"
    for unit, power in (("PB", 15), ("TB", 12), ("GB", 9)):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size / 1e6:.1f} MB"


def free_bytes(device: Any) -> int | None:
    """Bytes that can still be had on a torch.device; None where nobody tells. Of a GPU, with those
    that torch holds and does not use."""
    if device.type == "cuda":
        import torch

        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return _free_of_host() if device.type == "cpu" else None


def _free_of_host() -> int | None:
    """Bytes that Linux has left within the limit of the container; elsewhere all that there are,
    and None where nobody tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        rows = dict(line.split(":", 1) for line in lines)
        free = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return _all_of_host()
    limit, used = (_number_in(GROUP / f"memory.{name}") for name in ("max", "current"))
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _all_of_host() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not of Windows
        return None


def _number_in(file: Path) -> int | None:
    """Number in a file; None where there is no such file, or no limit, which is written "max"."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
