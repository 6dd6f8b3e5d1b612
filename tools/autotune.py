"""Time a handful of configurations on this machine and keep the fastest. Never done unasked."""

import time
from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from gen_accel.kernels.triton import block_sparse, configs, rest, tuned
from gen_accel.kernels.triton.block_facts import facts_of
from gen_accel.kernels.triton.configs import LaunchConfig
from gen_accel.kernels.triton.lists import prepare
from gen_accel.plan import Plan


@torch.no_grad()
def tune(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> dict[str, LaunchConfig]:
    """Return the fastest configuration of each kernel, by `tuned.key`, and save it to
    `tuned.path()`.

    Every later call with this head dim, dtype and these block sizes takes it.

    Args:
        q, k, v: (B, H, N, D), of the size that matters.
        plan: static, so that its lists serve both directions. With a rest of the second order its
            kernel is timed too.
    """
    if plan.dynamic:
        raise ValueError("plan must be static to be timed, got one that was made for one call")
    lists = prepare(plan)
    out, lse = block_sparse.attention(q, k, v, *lists, scale)
    given = torch.ones_like(out), torch.ones_like(lse)

    def forward() -> None:
        block_sparse.attention(q, k, v, *lists, scale)

    def backward() -> None:
        block_sparse.attention_backward(*given, q, k, v, out, lse, *lists, scale)

    arch, gain = configs.architecture(q.device), lists.gain is not None
    ruled = bool(lists.rule) or gain
    sizes = lists.gain, lists.block_q, lists.block_k, lists.raster, scale
    one = block_sparse.way("forward", (k, v), lists[:3], *sizes)
    two = block_sparse.way("backward", (k, v, q, given[0]), lists[:3], *sizes)
    kept = tuned.read()
    found = {}
    runs: list[tuple[str, Callable[[], object], LaunchConfig, bool]] = []
    kinds = (one + "forward", forward), (two + "dq", backward), (two + "dkdv", backward)
    for kind, run in kinds:
        kind = configs.row(kind, ruled)
        block = configs.worked_off(kind, plan.block_q, plan.block_k)
        config = configs.from_table(arch, kind, q.shape[3], q.dtype, block, gain)
        runs.append((kind, run, config, ruled))
    if plan.rest is not None and plan.rest.order == "second":
        facts = facts_of(q, k, v, plan, plan.rest, scale=scale)
        pooled = partial(rest.pooled, q, k, v, plan, facts=facts, scale=scale)
        table = configs.turns(arch, q.shape[3], q.dtype, plan.block_q, plan.block_k)
        for kind, config in zip(configs.TURN_KINDS, table, strict=True):
            runs.append((kind, pooled, config, False))
    for kind, run, first, named in runs:
        name = tuned.key(arch, kind, q, plan.block_q, plan.block_k, named)
        seconds = {}
        for config in _candidates(first):
            kept[name] = list(config)
            seconds[config] = _seconds(run, q.device)
        found[name] = min(seconds, key=lambda config: seconds[config])
        kept[name] = list(found[name])
    tuned.write({name: list(config) for name, config in found.items()})
    return found


def _candidates(config: LaunchConfig) -> set[LaunchConfig]:
    """Configuration from the table, and variants that differ from it in one number."""
    return {
        config,
        config._replace(tile_m=max(16, config.tile_m // 2)),
        config._replace(tile_n=max(16, config.tile_n // 2)),
        config._replace(tile_n=2 * config.tile_n),
        config._replace(num_warps=12 - config.num_warps),
        config._replace(num_stages=max(1, config.num_stages - 1)),
        config._replace(num_stages=config.num_stages + 1),
    }


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time on a GPU, one run under the interpreter; infinite where it does not fit."""
    try:
        if device.type == "cpu":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        with torch.accelerator.device_index(device.index):
            milliseconds = triton.testing.do_bench(run, return_mode="median")
        assert isinstance(milliseconds, float)
        return milliseconds / 1000
    except (OutOfResources, CompilationError, PTXASError):
        return float("inf")
