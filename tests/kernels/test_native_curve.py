"""The second order of a rest as its kernel takes it, in C++."""

import pytest
import torch
from support.checks import assert_no_worse

from gen_accel.kernels import rest
from gen_accel.kernels.native import rest as native
from gen_accel.plan import Plan, Rest

pytestmark = pytest.mark.usefixtures("poison", "built")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALE = 0.3


def plan_of(block_q, block_k, slots, patterns=(1, 2), tokens=None):
    """Tokens out of order among padding; a query block without tokens."""
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(*patterns, slots // block_q, slots // block_k, generator=g) < 0.3
    order = torch.full((slots,), -1)
    held = torch.randperm(slots - block_q, generator=g)[: slots - block_q - 7]
    order[held] = torch.randperm(len(held), generator=g)
    return Plan(order, keep, block_q, block_k, rest=Rest("query", "second", tokens))


def made(run, inputs, dtype, plan):
    """Rise, weight and the gradients of both."""
    q, k = (x.to(dtype).requires_grad_() for x in inputs)
    rise, weight = run(q, k, plan, SCALE)
    above = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in (rise, weight)]
    return rise.detach(), weight.detach(), *torch.autograd.grad((rise, weight), (q, k), above)


@pytest.mark.parametrize(
    ("sizes", "dtype", "patterns"),
    [
        ((16, 32, 192), FP32, (1, 2)),
        ((30, 50, 300), BF16, (2, 2)),
        ((7, 5, 245), FP16, (1, 1)),
        ((64, 64, 384), BF16, (2, 1)),
    ],
    ids=str,
)
def test_matches_torch(sizes, dtype, patterns, qkv):
    plan = plan_of(*sizes, patterns)
    q, k, _ = qkv(plan.tokens, batch=2, heads=2)
    inputs = [x.to(BF16).float() for x in (q, k + 20)]
    exact, low = (made(rest.plain_curve, inputs, x, plan) for x in (torch.float64, dtype))
    for found, *others in zip(made(native.curve_of, inputs, dtype, plan), low, exact, strict=True):
        assert_no_worse(found, *others)


def test_nothing_rises_where_no_block_counts_or_queries_are_equal(qkv):
    q, k, _ = qkv(192 - 16 - 7, batch=1)
    rise, _, *grads = made(native.curve_of, (q, k), FP32, plan_of(16, 32, 192, tokens=0))
    assert not any(x.any() for x in (rise, *grads))
    same = torch.ones_like(q)
    rise, weight, *grads = made(native.curve_of, (same, k), FP32, plan_of(16, 32, 192))
    assert not any(x.any() for x in (rise, weight))
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("which", [0, 1])
def test_counts_of_other_blocks_are_refused(which, qkv):
    plan = plan_of(16, 32, 192)
    q, k, _ = qkv(plan.tokens)
    counts = [x.expand(*q.shape[:2], -1).contiguous() for x in plan.counted_blocks()]
    counts[which] = counts[which][..., 1:]
    with pytest.raises(ValueError, match=r"of_[qk] must be .* on the CPU, got"):
        native._curve(q, k, *counts, plan.slots, 192, 16, 32, SCALE)
