"""The methods at a density, as far as their options reach it."""

from collections.abc import Callable, Sequence
from itertools import product
from statistics import linear_regression
from typing import Any

from gen_accel import (
    BlockMixture,
    Neighborhood,
    Piecewise,
    Radial,
    SparseLinear,
    VideoShape,
)

DENSITIES = (0.05, 0.1, 0.2, 0.3)
BOX = (4, 4, 4)
CHUNKS = (8, 48, 72)
UNPOOLED = ("Radial", "Neighborhood", "BlockMixture", "SparseLinear")
DEFAULT = "default"  # row of `choices`, with which the others are paired
POOLED = ("Piecewise", "PISA", "PISA, raster", "Sol-Attn", "Sol-Attn, raster")


def old(density: float, video: VideoShape) -> dict[str, Any]:
    """The methods without a rest."""
    return {
        "Radial": radial(density, video),
        "Neighborhood": neighborhood(density, video),
        "BlockMixture": BlockMixture(
            select="topk",
            scope="query_head",
            chunks=CHUNKS,
            topk=tuple(max(1, round(density * count)) for count in CHUNKS),  # pyright: ignore
        ),
        "SparseLinear": SparseLinear(density, block_q=64, combine="alpha"),
    }


def pooled(density: float, densities: Callable[[Any], float]) -> dict[str, Any]:
    """Methods with a rest: ours, and PISA's and Sol-Attn's rules, in boxes and in raster order.

    Args:
        densities: of a method, measured: shares of key blocks are not shares of token pairs.
    """

    def by_share(**options: Any) -> Piecewise:
        share = solved(lambda x: densities(Piecewise(x, **options)), density, 0.005, 0.5)
        return Piecewise(share, **options)

    def by_tau(**options: Any) -> Piecewise:
        # A higher tau keeps less.
        tau = -solved(lambda x: densities(sol(-x, **options)), density, -6.0, 2.0)
        return sol(tau, **options)

    pisa: Any = {"centre": "key", "score": "mean", "order": "first"}
    return {
        "Piecewise": by_share(),
        "PISA": by_share(**pisa),
        "PISA, raster": by_share(**pisa, tile="raster"),
        "Sol-Attn": by_tau(),
        "Sol-Attn, raster": by_tau(tile="raster"),
    }


def equal_time(rows: Sequence[dict[str, Any]], density: float) -> dict[str, float]:
    """Densities at which the methods without a rest take as long as `Piecewise` at `density`.

    Args:
        rows: of errors, which hold the milliseconds of a call. The time of a method is taken as
            linear in its density.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "ms" in row:
            points.setdefault(row["method"], []).append(
                (row["density"], row["ms"] / row["dense_ms"])
            )
    wanted = next(
        row["ms"] / row["dense_ms"]
        for row in rows
        if (row["method"], row["asked"]) == ("Piecewise", density)
    )
    found = {}
    for name in UNPOOLED:
        slope, start = linear_regression(*zip(*points[name], strict=True))
        found[name] = round((wanted - start) / slope, 3)
    return found


def sol(tau: float, **options: Any) -> Piecewise:
    """Sol-Attn's rule: a threshold on the scores of means, the neighbouring blocks exact."""
    rule: Any = {"select": "threshold", "centre": "key", "score": "mean", "band": 1}
    return Piecewise(tau=tau, **rule, **options)


def solved(rising: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Place where a function comes to `target` and does not yet exceed it, by bisection."""
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > target else (middle, high)
    return round(low, 4)


def radial(density: float, video: VideoShape) -> Radial:
    """Radial attention with the factor of decay that comes nearest."""
    factors = [1.3**power for power in range(-12, 9)]
    return min(
        (Radial(decay_factor=round(factor, 3)) for factor in factors),
        key=lambda method: abs(method.density(video) - density),
    )


def neighborhood(density: float, video: VideoShape) -> Neighborhood:
    """Neighborhood attention of the nearest window whose sides are alike shares of the grid."""
    frames, rows, columns = video.grid
    sides = product({-1, *range(3, frames + 1, 2)}, range(2, rows + 1))
    windows = ((f if f < frames else -1, r, min(r, columns)) for f, r in sides)
    share = {window: _share(window, video) for window in windows}
    near = min(abs(kept - density) for kept in share.values()) + 0.01
    # Of those as near, the one whose window is a like share of time and of a frame.
    best = min(
        (window for window, kept in share.items() if abs(kept - density) <= near),
        key=lambda window: abs((window[0] % (frames + 1)) / frames - window[1] / rows),
    )
    return Neighborhood(best)


def _share(window: tuple[int, int, int], video: VideoShape) -> float:
    kept = 1.0
    for size, whole in zip(window, video.grid, strict=True):
        kept *= 1.0 if size == -1 else size / whole
    return kept
