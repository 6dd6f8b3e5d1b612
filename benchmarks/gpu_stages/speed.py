"""Attention calls: dense ones, the goals beside them, tuned kernels, long clips."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import dense
import torch
from clock import turns
from kernel_speed import Case, How, chosen_by_auto, drawn, rows
from ledger import Failed, Kind, Line, Skipped
from parity import brief, planned, step
from torch import Tensor

from gen_accel.kernels import facts_of, unsupported
from gen_accel.kernels.triton import configs, tuned
from gen_accel.plan import Plan, Rest

from .correct import plan_of_rule
from .setting import COMPILES, Setting, kind

DIRECTIONS = ("forward", "both")
BACKWARD = 3.5  # products of a forward and backward pass, in those of a forward pass
COMPILING = 30.0  # seconds that a kernel takes which is compiled for each plan
DENSITY = 0.2  # of the plan that is tuned on
TUNED_TOKENS, TUNED_HEADS = 32_768, 12


def dense_lines(at: Setting) -> Iterator[Line]:
    """Every dense attention that there is, on the shapes of the goals."""
    shapes = {(case.video, case.heads): case for case in at.goals()}
    for direction in DIRECTIONS:
        for case in shapes.values():
            name = f"dense on {case.video}, {case.heads} heads, {direction}"
            yield Line(name, 45.0, partial(_dense, at, case, at.how(direction)))


def _dense(at: Setting, case: Case, how: How) -> dict[str, Any]:
    inputs, backward = drawn(case, how), how.direction == "both"
    found = dense.baselines(at.device)
    found["FlexAttention"] = dense.compiled_flex("eager" if at.dry else "inductor")
    runs, reasons = dense.tried(found, inputs, backward)
    if not runs:
        raise Failed("no dense attention runs", unavailable=reasons)
    flops = 4 * case.video.tokens**2 * case.heads * how.dim * (BACKWARD if backward else 1)
    taken = {}
    for name, baseline in runs.items():
        with baseline.active():
            call = {name: step(baseline.run, inputs, backward)}
            one = turns(call, rounds=how.rounds, device=how.device)[name]
        tflops = flops / one.kernel_ms / 1e9
        taken[name] = {"ms": one.ms, "kernel_ms": one.kernel_ms, "tflops": tflops}
    best = min(taken, key=lambda name: taken[name]["ms"])
    said = f"best is {best}, {taken[best]['ms']:.2f} ms, {taken[best]['tflops']:.0f} TFLOP/s"
    return {"baselines": taken, "unavailable": reasons, "best": best, "says": said}


def goal_lines(
    at: Setting,
    direction: str,
    cases: Sequence[Case],
    kernels: Sequence[str],
    *,
    cap: float = 35.0,
    rounds: int | None = None,
) -> Iterator[Line]:
    """Each kernel on each case, beside dense attention, the first kernel on all of them first."""
    for kernel in kernels:
        for case in cases:
            how = at.how(direction, kernel)._replace(rounds=rounds or at.rounds)
            name = f"{kernel}, {brief(case.method)} on {case.video}, {direction}"
            most = cap + (COMPILING if kernel in COMPILES else 0.0)
            yield Line(name, most, partial(_goal, case, how, kernel), partial(_needs, case, how))


def _needs(case: Case, how: How) -> list[Kind]:
    return [kind(case, how)]


def _goal(case: Case, how: How, kernel: str) -> dict[str, Any]:
    inputs = drawn(case, how)
    plan = planned(case.video, case.method, inputs)
    facts = facts_of(*inputs, plan, grad=how.direction == "both")
    if reasons := unsupported(kernel, facts):
        raise Skipped("; ".join(reasons))
    auto = chosen_by_auto(inputs, plan)
    del inputs, plan, facts
    (row,) = rows(case, how)
    if "refused" in row:
        raise Failed(row["refused"])
    said = (
        f"{row['dense_ms']:.2f} ms {row['dense_kernel']}, {row['ms']:.2f} ms, "
        f"{row['speedup']:.2f}x at density {row['density']:.3f}, "
        f"{row['share_of_ideal']:.2f} of 1 / density"
    )
    if "kernel_speedup" in row:
        said += f"; kernels alone {row['kernel_speedup']:.2f}x"
    return {**row, "auto": auto, "tuned": sorted(tuned.read()), "says": said}


def tune_lines(at: Setting) -> Iterator[Line]:
    """The fastest configurations, as rows of configs.TABLE; later calls on this machine take
    them."""
    if "triton" not in at.timed:
        return
    sizes = [(at.dims[0], block) for block in at.blocks[:2]]
    sizes += [(dim, block) for dim in at.dims[1:] for block in at.blocks[:2]]
    for ruled in (False, True):
        for dim, block in sizes[: 1 if at.dry else None]:
            words = "with a rule" if ruled else "whole blocks"
            name = f"tune D{dim} blocks of {block}, {words}"
            yield Line(name, 90.0, partial(_tune, at, dim, block, ruled))


def _tune(at: Setting, dim: int, block: int, ruled: bool) -> dict[str, Any]:
    import autotune  # imports triton, which may be missing

    plan = _plan_to_tune(at, block, ruled).to(at.device)
    generator = torch.Generator(at.device).manual_seed(0)
    heads = at.heads if at.dry else TUNED_HEADS
    shape = (1, heads, plan.tokens, dim)
    q, k, v = (
        torch.randn(shape, generator=generator, device=at.device).bfloat16() for _ in range(3)
    )
    tuned.read.cache_clear()
    try:
        found = autotune.tune(q, k, v, plan, scale=dim**-0.5)
    finally:  # a candidate that was tried when the time was over is in memory
        tuned.read.cache_clear()
    kept = {name: list(config) for name, config in found.items()}
    by_kind = {name.split("/")[1]: config for name, config in found.items()}
    rows = table_rows(by_kind, configs.architecture(q.device), q, block)
    return {"found": kept, "rows": rows, "says": "; ".join(rows)}


def _plan_to_tune(at: Setting, block: int, ruled: bool) -> Plan:
    """Static, of the size of the goals; of a dry run small."""
    if at.dry or ruled:
        grid = at.grid if at.dry else (21, 30, 52)
        return plan_of_rule(grid, 0, block, "windows" if ruled else "none", at.heads)
    blocks = TUNED_TOKENS // block
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(1, 1, blocks, blocks, generator=g) < DENSITY
    return Plan(torch.arange(TUNED_TOKENS), keep, block, block, rest=Rest("query", "second"))


def table_rows(
    found: dict[str, configs.LaunchConfig], arch: str, q: Tensor, block: int
) -> list[str]:
    """Rows for TABLE, PACKED and TURNS of what was tuned, or for their short forms where tiles are
    cut to the block; kinds that were not tuned stay as they are.

    Args:
        found: by kind, with "packed " before those over packed operands.
    """
    D, rows = q.shape[3], []
    for table, before in (("TABLE", ""), ("PACKED", configs.PACKING)):
        kinds = [before + kind for kind in configs.KINDS]
        if not found.keys() & set(kinds):
            continue
        chosen = [
            found.get(kind) or configs.from_table(arch, kind, D, q.dtype, block) for kind in kinds
        ]
        made = ", ".join(f"_C({', '.join(map(str, config))})" for config in chosen)
        rows.append(f'{table} "{arch}" {configs.bucket(D)}: ({made}), of blocks of {block}')
    if chosen := [found[kind] for kind in configs.TURN_KINDS if kind in found]:
        made = ", ".join(f"_C({', '.join(map(str, config))})" for config in chosen)
        rows.append(f'TURNS "{arch}" {configs.bucket(D)}: ({made}), of blocks of {block}')
    return rows
