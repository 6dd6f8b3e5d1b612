"""Plans that kernels are held to the reference on: one for each rule on token pairs."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from gen_accel import Neighborhood, VideoShape
from gen_accel.plan import Plan, Rest, Route, Windows

OF_METHOD = 0  # in the place of a block's size: the plan is one of Neighborhood's
RULES = ("none", "windows", "route", "gain")
# In the place of a rule.
RESTS = {
    "query": Rest("query"),
    "key": Rest("key"),
    "first": Rest("query", "first"),
    "second": Rest("query", "second"),
}
KEPT = 0.4  # share of the block pairs, and of the picks
NEAR = 4  # windows reach this part of the grid to each side


def plan_of_rule(grid: tuple[int, int, int], text: int, block: int, rule: str, heads: int) -> Plan:
    """A plan on the CPU with padding, tokens out of order, and one of RULES or RESTS.

    Args:
        block: slots of a query and of a key block, or OF_METHOD.
    """
    if block == OF_METHOD:
        half = [max(2, size // 2) for size in grid]
        window = Neighborhood((half[0], half[1], half[2]))
        return window.plan(VideoShape(*grid, text=text))
    g = torch.Generator().manual_seed(block)
    video = math.prod(grid)
    shuffled = rule != "windows"  # of tokens in order, windows leave something out
    order = torch.randperm(video, generator=g) if shuffled else torch.arange(video)
    words = _padded(torch.arange(video, video + text), block)
    slots = torch.cat([_padded(order, block), words])
    S = len(slots)
    blocks = S // block
    keep = torch.rand(1, heads, blocks, blocks, generator=g) < KEPT
    keep |= torch.eye(blocks, dtype=torch.bool)
    real = slots >= 0
    if rule == "windows":
        windows = _windows(grid, slots, len(words))
        return Plan(slots, windows.touched(real, block, block)[None, None], block, block, windows)
    if rule == "route":
        group = torch.arange(blocks) // 2
        picks = torch.rand(1, heads, S, int(group[-1]) + 1, generator=g) < KEPT
        route = Route(picks, group, block)
        return Plan(slots, route.touched(real, block, block), block, block, route)
    gain = None
    if rule == "gain":
        gain = 0.3 + 0.7 * torch.rand(1, 1, blocks, blocks, generator=g)
    return Plan(slots, keep, block, block, gain=gain, rest=RESTS.get(rule))


def _padded(tokens: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, -len(tokens) % block), value=-1)


def _windows(grid: tuple[int, int, int], slots: Tensor, words: int) -> Windows:
    """Around each token of the video; the last `words` slots are of the text."""
    video = math.prod(grid)
    sides = torch.stack(torch.unravel_index(slots.clamp(0, video - 1), grid)).int()
    near = torch.tensor(grid, dtype=torch.int32)[:, None] // NEAR
    every = torch.arange(len(slots))
    free = every >= len(slots) - words
    rule = Windows(sides - near, sides + near, sides, free, torch.zeros_like(slots))
    seen = (rule.allows(every[:, None], every) & (slots >= 0)).sum(1)
    return replace(rule, seen=seen)
