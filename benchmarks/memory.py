"""The most memory that a call needs."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """MB that one call needed beyond what was in use before it; empty where none can tell."""
    used: dict[str, float] = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield used
        used["mb"] = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        return
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        yield used
        return
    with suppress(OSError, AttributeError):  # without glibc, memory kept for reuse is not seen
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    clear.write_text("5")  # the highest mark of resident memory starts afresh
    before = _status("VmRSS")
    yield used
    used["mb"] = max(0.0, (_status("VmHWM") - before) * 1.024e-3)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(next(x for x in text.splitlines() if x.startswith(field)).split()[1])
