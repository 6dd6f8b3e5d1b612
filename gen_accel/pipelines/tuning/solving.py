"""From a profile to rules: a setting for each head of each layer at each step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gen_accel.attention_processors.methods.dense import Dense
from gen_accel.attention_processors.methods.mixed import Mixed, Rule, head_method
from gen_accel.method import Method
from gen_accel.parsing import check_options, shown
from gen_accel.pipelines.tuning.preset import Profile
from gen_accel.registry import AXES, Axis, Cost, Scale

MOST_UNITS = 2000


class Solution(NamedTuple):
    """A setting for each of U units.

    Args:
        settings: (U,) int64.
        cost, error: sums over the units.
    """

    settings: Tensor
    cost: float
    error: float


def choose(errors: Tensor, costs: Tensor, lam: float) -> Solution:
    """Choose the setting of least error + lam cost for each unit; among equals the cheapest.

    Args:
        errors, costs: (U, C) float64, not negative, inf for a setting that a unit cannot have.
        lam: 0 or more.
    """
    total = errors + lam * costs
    best = total.amin(1, keepdim=True)
    settings = costs.where(total <= best, torch.inf).argmin(1)
    picked = settings[:, None]
    sums = costs.gather(1, picked).sum().item(), errors.gather(1, picked).sum().item()
    return Solution(settings, *sums)


def within(errors: Tensor, costs: Tensor, bound: float, rounds: int = 60) -> Solution | None:
    """Choose the cheapest of the frontier whose summed error is at most `bound`; None if even the
    least error of each unit exceeds it."""
    least = choose(errors, costs, 0.0)
    if least.error > bound:
        return None
    low, high = 0.0, steepest(errors, costs)
    cheapest = choose(errors, costs, high)
    if cheapest.error <= bound:
        return cheapest
    best = least
    for _ in range(rounds):
        middle = (low * high) ** 0.5 if low > 0 else high / 2**20
        found = choose(errors, costs, middle)
        if found.error <= bound:
            low, best = middle, found
        else:
            high = middle
    return best


def frontier(errors: Tensor, costs: Tensor, points: int) -> list[Solution]:
    """List choices from the cheapest to the most exact, at most so many, evenly spread in cost.

    The first has the least cost of all choices, the last the least error.
    """
    high = steepest(errors, costs)
    found = {0.0: choose(errors, costs, 0.0), high: choose(errors, costs, high)}
    for lam in _prices(errors, costs, 16 * points):
        found[lam] = choose(errors, costs, lam)
    distinct = {(one.cost, one.error): one for one in found.values()}.values()
    rising = []
    for one in sorted(distinct, key=lambda one: one.cost):  # dearer ones must err less
        if not rising or one.error < rising[-1].error:
            rising.append(one)
    if len(rising) <= points:
        return rising
    low, span = rising[0].cost, rising[-1].cost - rising[0].cost
    wanted = [low + span * i / (points - 1) for i in range(points)]
    near = {min(range(len(rising)), key=lambda i: abs(rising[i].cost - cost)) for cost in wanted}
    return [rising[i] for i in sorted(near)]


def _prices(errors: Tensor, costs: Tensor, count: int) -> list[float]:
    """Values of lam from the least to the largest at which some unit changes its setting, evenly
    spread over their logarithm. Of many units, some are looked at."""
    some = slice(None, None, max(1, errors.shape[0] // MOST_UNITS))
    errors, costs = errors[some], costs[some]
    dearer = costs[:, :, None] - costs[:, None]
    gained = errors[:, None] - errors[:, :, None]
    prices = (gained / dearer)[(dearer > 0) & (gained > 0) & gained.isfinite()]
    if not len(prices):
        return []
    ends = prices.min().log10().item(), prices.max().log10().item()
    return torch.logspace(*ends, count, dtype=torch.float64).tolist()


def steepest(errors: Tensor, costs: Tensor) -> float:
    """A lam at which every unit takes its cheapest setting."""
    finite = errors.isfinite()
    gaps = (costs[:, :, None] - costs[:, None]).abs()
    least = gaps[gaps > 0].min().item() if (gaps > 0).any() else 1.0
    spread = errors.where(finite, 0.0).amax().item()
    return 2 * spread / least + 1.0


POINTS = 24


class Point(NamedTuple):
    """A choice of settings.

    Args:
        settings: (S, L, H) int64, numbers of candidates.
        cost: of all attention, as a share of dense.
        density: share of token pairs, dense steps counted as 1.
        predicted: relative error of the final latents: by each prompt, the root of the mean
            square.
    """

    settings: Tensor
    cost: float
    density: float
    predicted: float


@dataclass(frozen=True)
class SolveOptions:
    """Options of solving a profile.

    Args:
        cost: what is least, seconds of attention or token pairs.
        scale: over the prompts: "mean"; "even", by which no prompt decides alone; or "worst",
            whose sum bounds the error of each prompt.
        by: axes along which settings may differ.
    """

    cost: Cost = "seconds"
    scale: Scale = "mean"
    by: tuple[Axis, ...] = AXES

    def __post_init__(self) -> None:
        check_options(self)


def curve(profile: Profile, options: SolveOptions, points: int = POINTS) -> list[Point]:
    """List the best choices from the cheapest to dense."""
    found = frontier(*_problem(profile, options), points)
    return [_point(profile, choice, options) for choice in found]


def at_error(profile: Profile, error: float, options: SolveOptions) -> Point | None:
    """Find the cheapest choice with an error, see `bounded`, of at most `error`; None if even
    dense attention exceeds it."""
    found = within(*_problem(profile, options), error**2)
    return None if found is None else _point(profile, found, options)


def bounded(profile: Profile, settings: Tensor, options: SolveOptions) -> float:
    """Error of a choice, (S, L, H), as `at_error` bounds it: with scale "mean" the predicted one,
    with "worst" more, with "even" another weighting of the prompts."""
    errors = profile.unit_errors(scale=options.scale)
    return errors.gather(-1, settings[..., None]).sum().sqrt().item()


def settings_of(
    mixed: Mixed, layers: Sequence[int], heads: int, candidates: Sequence[Method]
) -> Tensor:
    """(S, L, H) numbers of the candidates that rules run; ValueError for another method."""
    rows = []
    for layer in layers:
        own = {one.for_layer(layer): i for i, one in enumerate(candidates)}
        by_step = mixed.for_layer(layer).methods
        for method in by_step:
            for head in range(heads):
                one = head_method(method, head)
                if one not in own:
                    raise ValueError(
                        f"the profile has no candidate {shown(one)}, which a rule names"
                    )
                rows.append(own[one])
    return torch.tensor(rows).view(len(layers), mixed.steps, heads).transpose(0, 1).contiguous()


def _problem(profile: Profile, options: SolveOptions) -> tuple[Tensor, Tensor]:
    """(U, C) errors and costs, where all costs of dense attention sum to 1."""
    errors = profile.unit_errors(scale=options.scale)
    costs = costs_of(profile, options.cost) / errors[..., 0].numel()
    alike = [i for i, axis in enumerate(AXES) if axis not in options.by]
    if alike:
        errors, costs = errors.sum(alike), costs.sum(alike)
    C = profile.errors.shape[-1]
    return errors.reshape(-1, C), costs.reshape(-1, C)


def costs_of(profile: Profile, cost: Cost) -> Tensor:
    """(S, L, H, C) float64, the price of a candidate for a head, as a share of dense."""
    S, L, H, C = profile.errors.shape[1:]
    each = profile.densities[:, None] if cost == "density" else profile.seconds[None, None]
    return each.double().expand(S, L, H, C)


def _point(profile: Profile, choice: Solution, options: SolveOptions) -> Point:
    whole = profile.errors.shape[1:4]
    sizes = [size if axis in options.by else 1 for axis, size in zip(AXES, whole, strict=True)]
    return point_of(profile, choice.settings.view(sizes).expand(whole).contiguous())


def point_of(profile: Profile, settings: Tensor) -> Point:
    """Sum up a choice."""
    index = settings[..., None]
    shares = [
        costs_of(profile, one).gather(-1, index).mean().item() for one in ("seconds", "density")
    ]
    predicted = profile.predicted(settings).square().mean().sqrt().item()
    return Point(settings, shares[0], shares[1], predicted)


def curve_of(points: Sequence[Point]) -> tuple[dict[str, float], ...]:
    """Describe the points of a frontier, as a preset holds them."""
    return tuple(
        {"cost": one.cost, "density": one.density, "predicted_error": one.predicted}
        for one in points
    )


def rules_of_point(point: Point, profile: Profile, candidates: Sequence[Method]) -> Mixed:
    """Rules of a choice. Equal neighbouring steps, and equal layers, share a rule; dense attention
    has one rule that says so."""
    settings, layers = point.settings, profile.layers.tolist()
    S, L, H = settings.shape
    held: dict[tuple[int, tuple[int, ...], tuple[int, int]], list[int]] = {}
    for place in range(L):
        first = 0
        for step in range(1, S + 1):
            if step < S and torch.equal(settings[step, place], settings[first, place]):
                continue
            of_heads: dict[int, list[int]] = {}
            for head, candidate in enumerate(settings[first, place].tolist()):
                of_heads.setdefault(candidate, []).append(head)
            for candidate, heads in of_heads.items():
                if not candidates[candidate].is_dense:
                    key = candidate, tuple(heads), (first, step)
                    held.setdefault(key, []).append(layers[place])
            first = step
    rules = [
        Rule(candidates[candidate], tuple(some), heads if len(heads) < H else None, steps)
        for (candidate, heads, steps), some in held.items()
    ]
    rules.sort(key=lambda rule: (rule.steps, rule.layers, rule.heads or ()))
    return Mixed(tuple(rules) or (Rule(Dense()),), S)
