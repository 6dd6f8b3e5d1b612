"""Time of a call by kernel: the share of each, launches, and what lies between kernels."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from kernel_speed import Case, drawn
from ledger import Kind, Line
from parity import brief, call, step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .setting import Setting, kind

CALLS = 5
TOLD = 4  # kernels that the line names


class Span(NamedTuple):
    """One kernel, from start to end in microseconds."""

    name: str
    start: float
    end: float


def lines(at: Setting) -> Iterator[Line]:
    """Profile the first goal, the call that README shows."""
    case = at.goals()[0]
    name = f"{brief(case.method)} on {case.video}, by kernel"
    yield Line(name, 35.0, partial(_profiled, at, case), partial(_needs, at, case))


def _needs(at: Setting, case: Case) -> list[Kind]:
    return [kind(case, at.how("forward"))]


def _profiled(at: Setting, case: Case) -> dict[str, Any]:
    inputs = drawn(case, at.how("forward"))
    run = step(call(case.video, case.method, "auto", inputs[0]), inputs, False)
    run()  # compiles what it launches
    on_gpu = at.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as found:
        for _ in range(CALLS):
            run()
        if on_gpu:
            torch.cuda.synchronize(at.device)
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spans = [
        Span(one.name, one.time_range.start, one.time_range.end)
        for one in found.events() or ()
        if one.device_type == where
    ]
    return shares(spans, CALLS)


def shares(spans: Sequence[Span], calls: int) -> dict[str, Any]:
    """Sum up spans by name, as milliseconds and launches of one call, the longest first, and the
    time between them."""
    busy, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    whole = end - min(span.start for span in spans)
    kernels = []
    for name in dict.fromkeys(span.name for span in spans):
        own = [span.end - span.start for span in spans if span.name == name]
        kernels.append(
            {"kernel": name, "ms": sum(own) / calls / 1e3, "launches": len(own) / calls}
        )
    kernels.sort(key=lambda one: -one["ms"])
    ms, gaps = whole / calls / 1e3, (whole - busy) / calls / 1e3
    told = [f"{one['kernel'][:40]} {one['ms']:.2f} ms" for one in kernels[:TOLD]]
    said = (
        f"{ms:.2f} ms, {len(spans) / calls:.0f} launches, {gaps:.2f} ms between; {', '.join(told)}"
    )
    found = {"ms": ms, "gaps_ms": gaps, "launches": len(spans) / calls, "kernels": kernels}
    return found | {"says": said}
