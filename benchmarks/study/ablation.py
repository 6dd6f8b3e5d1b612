"""Ablation of a pooled rest: choice x rest x tile x query block x density."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from statistics import mean
from typing import Any, get_args

import torch
from torch import Tensor

from gen_accel import VideoShape
from gen_accel.attention_processors.methods.blocks import Layout
from gen_accel.kernels import Runner, run
from study.captured import Captured
from study.errors import relative_error
from study.settings import DENSITIES, solved
from study.variants import Choice, Pooling, Variant

TILES = ((4, 4, 4), (1, 6, 12), (33, 2, 1), "raster")
GROUPS = (64, 128, 256)
OWN: dict[str, Any] = {"choice": "loss", "tile": (4, 4, 4), "block_q": 64, "density": 0.2}
MADE_AT = 3  # the step, counted from 0, whose pattern "reuse" takes


def cells(
    calls: Sequence[Captured], video: VideoShape, *, whole: bool
) -> Iterator[dict[str, Any]]:
    """One row a cell: its options, the mean error over the calls and the mean density.

    Args:
        calls: at several steps, `MADE_AT` among them, which is measured by none.
        whole: all combinations; else those that differ from `OWN` in one part and the rest.
    """
    for tile, group, choice in product(TILES, GROUPS, get_args(Choice)):
        options = {"tile": tile, "block_q": group, "choice": choice}
        others = [name for name, value in options.items() if value != OWN[name]]
        if others[1:] and not whole:
            continue
        first = Variant(choice, tile=tile, block_q=group)  # pyright: ignore[reportArgumentType]
        layout = first.layout(video)
        known = {(c.prompt, c.step, c.layer): first.scores(c.q, c.k, c.v, layout) for c in calls}
        measured = [call for call in calls if call.step != MADE_AT]
        for density in DENSITIES:
            if whole or not others or density == OWN["density"]:
                yield from _at_density(first, density, layout, known, measured)


def _at_density(
    first: Variant,
    density: float,
    layout: Layout,
    known: dict[tuple[int, int, int], Tensor],
    calls: Sequence[Captured],
) -> Iterator[dict[str, Any]]:
    options = {"choice": first.choice, "tile": first.tile, "block_q": first.block_q}
    step = MADE_AT if first.choice == "reuse" else None
    scores = [known[c.prompt, c.step if step is None else step, c.layer] for c in calls]
    found: dict[str, Any] = setting(first, density, layout, scores)
    for rest in get_args(Pooling):
        variant = replace(first, **found, rest=rest)
        errors, shares = [], []
        for call, known_scores in zip(calls, scores, strict=True):
            plan = variant.plan_by(known_scores, layout)
            kernel = Runner(lambda q, k, v, plan: run(q, k, v, plan, scale=q.shape[3] ** -0.5))
            with torch.no_grad():
                out = variant.attend(call.q, call.k, call.v, plan, kernel)
            errors.append(relative_error(out, call.dense))
            shares.append(kept_share(plan.keep, layout))
        yield {
            **options,
            "rest": rest,
            "asked": density,
            "density": mean(shares),
            "error": mean(errors),
            "worst_error": max(errors),
        }


def setting(
    variant: Variant, density: float, layout: Layout, scores: Sequence[Tensor]
) -> dict[str, float]:
    """The option by which a choice of blocks comes to a density, over the given scores."""

    def kept(**option: float) -> float:
        changed: Any = option
        made = replace(variant, **changed)
        return mean(kept_share(made.keep(x, layout), layout) for x in scores)

    if variant.choice == "threshold":
        return {"tau": -solved(lambda x: kept(tau=-x), density, -6.0, 2.0)}
    return {"share": solved(lambda x: kept(share=x), density, 0.005, 0.5)}


def kept_share(keep: Tensor, layout: Layout) -> float:
    """Share of the token pairs that `keep`, (B, H, Kq, Kk), holds."""
    held_q, held_k = (x[:, 0] for x in layout.slots.held)
    kept = (keep.float() @ held_k @ held_q).mean().item()
    return kept / layout.slots.tokens**2
