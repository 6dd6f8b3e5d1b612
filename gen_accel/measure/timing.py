"""Comparable timings: taken in turn on one device, together with its name."""

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    device: torch.device,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Time each call in each round, in turn, A B A B, so that a slow machine slows both.

    Each runs once before the clock starts, unless they are `warm` already. On a GPU every call is
    waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in () if warm else calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def device_name(device: torch.device) -> str:
    """Name of the graphics card or the processor, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
