"""Processor time of all but this process, and whether it was missed."""

import time

from gen_accel.extras import needed_for

with needed_for("a look at the machine's load", extra="video"):
    import psutil

OTHERS = 0.15  # of all cores, used by others, from which on they take time from us
IDLE = 0.15  # of all cores, idle, from which on there was room for all


class Bystanders:
    """Processor time of others, counted from when this is made."""

    def __init__(self) -> None:
        self._start = _times()

    def busy(self) -> str | None:
        """Say that others took processor time that this process would have had since; None where
        they did not."""
        wall, own, used, idle = (
            now - then for now, then in zip(_times(), self._start, strict=True)
        )
        cores = psutil.cpu_count() or 1
        others = max(0.0, used - own) / max(wall, 1e-9)
        if others < OTHERS * cores or idle / max(wall, 1e-9) >= IDLE * cores:
            return None
        return f"the machine was busy: other processes used {others:.1f} of {cores} cores"


def _times() -> tuple[float, float, float, float]:
    """Seconds on the clock, of this process on all cores, of all processes, and idle."""
    times = psutil.cpu_times()._asdict()
    idle = times["idle"] + times.get("iowait", 0.0)
    guests = times.get("guest", 0.0) + times.get("guest_nice", 0.0)  # within user and nice
    used = sum(times.values()) - idle - guests
    return time.perf_counter(), time.process_time(), used, idle
