"""Choice of a setting for each unit, at the least cost within a bound on the summed error.

A unit is a head of a layer at a step. Each picks the setting with the least error + lam cost. For
any lam this is the cheapest choice of all whose error is as small (Everett, 1963,
https://doi.org/10.1287/opre.11.3.399), so that a row of lam gives a frontier, and no solver is
needed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MOST_UNITS = 2000


class Choice(NamedTuple):
    """A setting for each of U units.

    Args:
        settings: (U,) int64.
        cost, error: sums over the units.
    """

    settings: Tensor
    cost: float
    error: float


def choose(errors: Tensor, costs: Tensor, lam: float) -> Choice:
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
    return Choice(settings, *sums)


def within(errors: Tensor, costs: Tensor, bound: float, rounds: int = 60) -> Choice | None:
    """Choose the cheapest of the frontier whose summed error is at most `bound`.

    Returns:
        None where even the least error of each unit exceeds it.
    """
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


def frontier(errors: Tensor, costs: Tensor, points: int) -> list[Choice]:
    """List choices from the cheapest to the most exact, at most so many, evenly spread in cost.

    The first has the least cost of all choices, the last the least error.
    """
    high = steepest(errors, costs)
    found = {0.0: choose(errors, costs, 0.0), high: choose(errors, costs, high)}
    for lam in _prices(errors, costs, 16 * points):
        found[lam] = choose(errors, costs, lam)
    distinct = sorted(
        {(one.cost, one.error): one for one in found.values()}.values(), key=_by_cost
    )
    rising = []
    for one in distinct:  # dearer ones must err less
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


def _by_cost(choice: Choice) -> float:
    return choice.cost
