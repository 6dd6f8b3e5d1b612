"""Errors of attention on captured q, k and v, and its cost in time."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from parity import planned
from torch import Tensor

from gen_accel import SparseLinear, VideoShape, attention
from gen_accel.measure.machine import interleaved
from study.captured import Captured
from study.variants import Variant


def relative_error(out: Tensor, dense: Tensor) -> float:
    """||out - dense|| / ||dense||, in L2."""
    return ((out - dense).norm() / dense.norm()).item()


def error_of(
    method: Any, calls: Sequence[Captured], video: VideoShape, branches: Any = None
) -> dict[str, float]:
    """Mean and worst relative L2 error over the calls, and the mean density.

    Args:
        branches: by the number of a layer, parameters that were fitted; None: none.
    """
    errors, densities = [], []
    for call in calls:
        own = method.for_layer(call.layer)
        branch = None if branches is None else branches[call.layer]
        out = attention(call.q, call.k, call.v, video=video, method=own, branch=branch)
        errors.append(relative_error(out, call.dense))
        plan = planned(video, own, [call.q, call.k])
        densities.append(plan.density)
    return {"error": mean(errors), "worst_error": max(errors), "density": mean(densities)}


def density_of(method: Any, calls: Sequence[Captured], video: VideoShape) -> float:
    """Mean share of token pairs that a method keeps in the calls."""
    plans = (planned(video, method.for_layer(x.layer), [x.q, x.k]) for x in calls)
    return mean(plan.density for plan in plans)


def oracle(density: float, rest: Any, calls: Sequence[Captured], video: VideoShape) -> dict:
    """The choice of blocks by their true mass."""
    variant = Variant("oracle", rest, share=density)
    errors = [
        relative_error(attention(x.q, x.k, x.v, video=video, method=variant), x.dense)
        for x in calls
    ]
    return {"error": mean(errors), "worst_error": max(errors), "density": density}


def milliseconds(
    methods: dict[str, Any], call: Captured, video: VideoShape, rounds: int, branches: Any
) -> dict[str, float]:
    """Milliseconds of one call, dense ("dense") and by each method, in turns; medians.

    Args:
        branches: by the number of a layer, the parameters of `SparseLinear`.
    """
    q, k, v = call.q, call.k, call.v
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    }
    for name, method in methods.items():
        own = method.for_layer(call.layer)
        more = {"branch": branches[call.layer]} if isinstance(own, SparseLinear) else {}
        calls[name] = partial(attention, q, k, v, video=video, method=own, **more)
    with torch.no_grad():
        seconds = interleaved(calls, rounds=rounds, device=q.device)
    return {name: 1e3 * median(found) for name, found in seconds.items()}
