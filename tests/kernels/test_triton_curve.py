"""Our Triton kernels for the curve of a rest, held to torch; interpreted on the CPU."""

from functools import partial

import pytest
import torch
from support.checks import assert_no_worse
from support.launches import Launches, record
from support.triton_plans import differentiated, inputs

from gen_accel.kernels.rest import curve_of, plain_curve
from gen_accel.plan import Plan, Rest

pytestmark = pytest.mark.usefixtures("poison", "untuned")

SCALE = 0.3


def plan_of(device, batch=1, heads=1, block_q=24, block_k=12, tokens=None):
    """Slots of three query blocks or more in any order. The first block of queries and that of
    keys are padding, and the end of the last ones; the second query block keeps all."""
    g = torch.Generator().manual_seed(0)
    count, empty = 3 * max(block_q, 24), max(block_q, block_k)
    slots = torch.full((count,), -1)
    slots[empty:-5] = torch.randperm(count - empty - 5, generator=g)
    keep = torch.rand(batch, heads, count // block_q, count // block_k, generator=g) < 0.4
    keep[:, :, 1] = True
    return Plan(slots, keep, block_q, block_k, rest=Rest("query", "second", tokens)).to(device)


def by_torch(q, k, plan):
    return plain_curve(q, k, plan, SCALE)


def by_triton(q, k, plan):
    made = curve_of(q, k, plan, SCALE, "triton")
    assert made is not None
    return made


def results(make, tensors, dtype, plan):
    """Of a curve, and the gradients of q and k through both of it."""
    return differentiated(partial(make, plan=plan), tensors, dtype, lse_weight=0.1)


def assert_matches_torch(plan, tensors):
    exact = results(by_torch, tensors, torch.float64, plan)
    low = results(by_torch, tensors, tensors[0].dtype, plan)
    actual = results(by_triton, tensors, tensors[0].dtype, plan)
    for result, *others in zip(actual, low, exact, strict=True):
        assert_no_worse(result, *others)


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "blocks", "dtype", "dim"),
    [
        ((1, 1), (24, 12), torch.float32, 24),
        ((2, 2), (12, 36), torch.float32, 64),  # key blocks of two tiles
        ((2, 2), (36, 12), torch.bfloat16, 24),
        ((1, 1), (24, 24), torch.bfloat16, 64),
    ],
    ids=str,
)
def test_curves_and_gradients_match_torch(pattern, blocks, dtype, dim, device):
    plan = plan_of(device, *pattern, *blocks)
    assert_matches_torch(plan, inputs(plan, dtype, dim, heads=2)[:2])


def test_what_keys_have_in_common_takes_no_digits(device):
    plan = plan_of(device)
    q, k, _ = inputs(plan, torch.float32, 24)
    assert_matches_torch(plan, [q, k + 20])


def test_where_no_block_counts_there_is_no_curve(device):
    plan = plan_of(device, tokens=0)
    for x in results(by_triton, inputs(plan, torch.float32, batch=2)[:2], None, plan):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.slow
def test_keys_that_are_alike_leave_no_rise_and_a_weight(device):
    plan = plan_of(device)
    q, k, _ = inputs(plan, torch.float32)
    k = torch.ones_like(k)
    assert_matches_torch(plan, [q, k])
    rise, weight, dq, dk = results(by_triton, [q, k], None, plan)
    assert not rise.any()
    assert weight.all()
    assert dq.any()
    assert not dk.any()


def test_nothing_waits_and_nothing_is_random(device, monkeypatch):
    plan = plan_of(device)
    results(by_triton, inputs(plan, torch.bfloat16)[:2], None, plan)  # what is made once
    q, k, _ = (x.requires_grad_() for x in inputs(plan, torch.bfloat16, heads=2))
    counted = Launches()
    record(monkeypatch, counted)
    with counted:
        made = by_triton(q, k, plan)
        torch.autograd.grad([x.sum() for x in made], [q, k])
    kernels = {name: times for name, times in counted.done.items() if name.endswith("_kernel")}
    assert kernels == {
        "block_squares_kernel": 3,
        "head_facts_kernel": 1,
        "weighed_squares_kernel": 1,
        "off_means_backward_kernel": 2,
    }
    assert counted.waits == []
    assert counted.random == []
