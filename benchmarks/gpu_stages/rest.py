"""The rest of a plan, pooled around mean keys, and around mean queries in each order: parity, then
its price."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from clock import turns
from kernel_speed import WAN
from ledger import Kind, Line
from parity import DTYPES, step

from gen_accel import Piecewise
from gen_accel.kernels import rest_cost, run
from gen_accel.plan import Plan, Rest

from .correct import parity_line
from .plans import RESTS
from .setting import Setting

DENSITY = 0.1


def lines(at: Setting) -> Iterator[Line]:
    """Each rest held to the reference, then timed beside attention over the kept keys alone."""
    if "triton" not in at.timed:
        return
    for block, kind in itertools.product(at.blocks[: 1 if at.dry else None], RESTS):
        yield parity_line(at, "triton", "bf16", at.dims[0], block, kind)
    timed = [*RESTS.items()][-1:] if at.dry else [*RESTS.items()]
    for direction, (kind, rest) in itertools.product(("forward", "both"), timed):
        holds = Kind("triton", "bf16", at.dims[0], kind, direction == "both")
        name = f"rest around each {rest.centre}'s mean, {rest.order} order, {direction}"
        yield Line(name, 25.0, partial(_timed, at, rest, direction), partial(list, [holds]))


def _timed(at: Setting, rest: Rest, direction: str) -> dict[str, Any]:
    plan, heads, dim = _plan(at, rest), at.heads if at.dry else 12, at.dims[0]
    generator = torch.Generator(at.device).manual_seed(0)
    shape = (1, heads, plan.tokens, dim)
    inputs = [
        torch.randn(shape, generator=generator, device=at.device).to(DTYPES["bf16"])
        for _ in range(3)
    ]
    calls = {
        name: step(
            partial(run, plan=some, scale=dim**-0.5, kernel="triton"), inputs, direction == "both"
        )
        for name, some in (("kept", plan.kept), ("with the rest", plan))
    }
    taken = turns(calls, rounds=at.rounds, device=at.device)
    kept, whole = (one.kernel_ms for one in taken.values())
    said = f"kept keys {kept:.2f} ms, with the rest {whole:.2f} ms, {whole / kept:.2f} times"
    even = _even(at, plan, heads, rest)
    return {
        "ms": {name: one.ms for name, one in taken.items()},
        "kernel_ms": {name: one.kernel_ms for name, one in taken.items()},
        "density": plan.density,
        "says": f"{said}; by the model from density {even:.2f} around queries",
    }


def _even(at: Setting, plan: Plan, heads: int, rest: Rest) -> float:
    """Density from which mean queries pay: in the order of this rest, and for mean keys beside
    queries in the second one."""
    from gen_accel.kernels.triton import configs

    problem = rest_cost.Problem(heads, plan.tokens, at.dims[0], plan.block_q, plan.block_k)
    own = rest.centre == "query"
    orders = rest_cost.Orders(query=rest.order) if own else rest_cost.AUTO
    return rest_cost.even_density(problem, configs.architecture(at.device), orders)


def _plan(at: Setting, rest: Rest) -> Plan:
    """Blocks at random, the same for all heads: boxes of the grid of Wan 1.3B at 480p, some with
    padding, as `Piecewise` lays them."""
    order, block_q, block_k = torch.arange(64), 32, 16
    if not at.dry:
        slots = Piecewise().layout(WAN, torch.device("cpu")).slots
        order, block_q, block_k = slots.slots, slots.block_q, slots.block_k
    generator = torch.Generator().manual_seed(0)
    blocks = len(order) // block_q, len(order) // block_k
    keep = torch.rand(1, 1, *blocks, generator=generator) < DENSITY
    keep[..., 0] = True  # no row of a dry run sees nothing
    return Plan(order, keep, block_q, block_k, rest=rest).to(at.device)
