"""Seconds of calls that take turns: of a whole call, and of what a GPU does in it alone."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from gen_accel.measure.machine import interleaved

ENOUGH = 0.1  # seconds of one call that need no more rounds than `FEWEST`
FEWEST = 3
GIANT = 1.0  # seconds of one call from which two rounds have to do
LONG = 0.05  # seconds of a call beside which those of the host do not count
AHEAD = 1.5  # times that the host needs for a call, for which the device waits before it
CYCLES = 1_000_000  # of a sleep by which its clock is read


class Taken(NamedTuple):
    """Seconds of one call in each round.

    Args:
        whole: by the clock on the wall, from the call until the device is done.
        kernel: by CUDA events, with nothing of the call in the cache of the device and nothing
            to wait for from the host. On a CPU the same as `whole`.
    """

    whole: list[float]
    kernel: list[float]

    @property
    def ms(self) -> float:
        return 1e3 * statistics.median(self.whole)

    @property
    def kernel_ms(self) -> float:
        return 1e3 * statistics.median(self.kernel)


def turns(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, device: torch.device
) -> dict[str, Taken]:
    """Each call in each round, A B A B, after a first one that does not count.

    Args:
        rounds: exactly so many on a CPU; on a GPU at most, and fewer where calls are long.
    """
    if device.type != "cuda":
        return {
            name: Taken(seconds, seconds)
            for name, seconds in interleaved(calls, rounds=rounds, device=device).items()
        }
    first = interleaved(calls, rounds=1, device=device)
    rounds = needed([seconds[0] for seconds in first.values()], rounds)
    rest = interleaved(calls, rounds=rounds - 1, device=device, warm=True)
    whole = {name: [*first[name], *rest[name]] for name in calls}
    kernel = _by_events(calls, whole, device)
    return {name: Taken(whole[name], kernel[name]) for name in calls}


def needed(seconds: list[float], rounds: int) -> int:
    """Rounds, at most `rounds`, in which each call takes `ENOUGH` seconds in all or has `rounds`.

    Args:
        seconds: of one of each call.
    """
    if max(seconds) > GIANT:
        return min(rounds, 2)
    return min(rounds, max(FEWEST, *(math.ceil(ENOUGH / one) for one in seconds)))


def _by_events(
    calls: Mapping[str, Callable[[], Any]], whole: dict[str, list[float]], device: torch.device
) -> dict[str, list[float]]:
    """Seconds by CUDA events, of as many rounds as by the clock on the wall."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    other = torch.empty(max(size, 1 << 26), dtype=torch.uint8, device=device)
    short = {name: call for name, call in calls.items() if min(whole[name]) < LONG}
    waits = _waits(short, device)
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {x: [] for x in calls}
    for _ in range(len(next(iter(whole.values())))):
        for name, call in calls.items():
            other.zero_()
            if name in waits:
                torch.cuda._sleep(waits[name])
            marks[name].append(_marked(call))
    torch.cuda.synchronize(device)
    return {
        name: [start.elapsed_time(end) / 1e3 for start, end in pairs]
        for name, pairs in marks.items()
    }


def _waits(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, int]:
    """Cycles for which the device sleeps before each call, so that the host is ahead of it and no
    launch is waited for."""
    sleep = partial(torch.cuda._sleep, CYCLES)
    sleep()
    start, end = _marked(sleep)
    torch.cuda.synchronize(device)
    rate = CYCLES / max(start.elapsed_time(end) / 1e3, 1e-6)
    found = {}
    for name, call in calls.items():
        begin = time.perf_counter()
        call()
        found[name] = math.ceil(AHEAD * (time.perf_counter() - begin) * rate)
        torch.cuda.synchronize(device)
    return found


def _marked(call: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    return start, end
