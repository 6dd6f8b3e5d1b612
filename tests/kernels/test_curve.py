"""The second order of a rest at its bound, the same by all that run here."""

from functools import partial

import pytest
import torch
from support.problems import assert_answers_no_worse

from gen_accel import kernels
from gen_accel.kernels import facts_of, reference, rest
from gen_accel.kernels.native import rest as native
from gen_accel.kernels.rest import Curve
from gen_accel.plan import MOST_GAINED, Plan, Rest

pytestmark = pytest.mark.usefixtures("poison", "one_thread", "built", "untuned")

BY = ["gather", "native", "triton"]


def plan_of(order="second", blocks=4, kept=0.3):
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(1, 1, blocks, blocks, generator=g) < kept
    return Plan(torch.arange(16 * blocks), keep, 16, 16, rest=Rest("query", order))


def skip_without(kernel, plan, tensors):
    if reasons := kernels.unsupported(kernel, facts_of(*tensors, plan)):
        pytest.skip("; ".join(reasons))


def gains(q, k, v, monkeypatch):
    """What the logarithms of weights of the rest gain without a bound."""
    monkeypatch.setattr(reference, "MOST_GAINED", torch.inf)
    bent, flat = (
        reference.pooled(q, k, v, plan_of(order), scale=0.25).scores
        for order in ("second", "first")
    )
    monkeypatch.undo()
    return (bent - flat)[flat.isfinite()]


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", BY)
def test_where_it_bites_for_some_queries_the_answers_are_the_same(kernel, dtype, monkeypatch, qkv):
    """Output, log-sum-exp and gradients, of queries of which every fourth lies far from the mean
    and no score so near to the bound that roundings would decide."""
    plan = plan_of()
    tensors = [x.cpu() for x in qkv(64, batch=1, heads=6)]  # errors of fewer are luck
    tensors[0][:, :, ::4] *= 8
    tensors = [x.to(dtype) for x in tensors]
    skip_without(kernel, plan, tensors)
    gained = gains(*(x.double() for x in tensors), monkeypatch) / MOST_GAINED
    assert 0.1 < (gained > 1).double().mean() < 0.5
    assert (gained - 1).abs().min() > 0.3

    def rounded(run):
        """Pooled keys are in the dtype of q, and so the log-sum-exp is no better."""

        def both(q, k, v):
            out, lse = run(q, k, v, plan, scale=0.25)
            return out, lse.to(q.dtype)

        return both

    by_kernel = partial(kernels.run_lse, kernel=kernel)
    assert_answers_no_worse(rounded(by_kernel), rounded(reference.kernel.forward_lse), tensors)


def at_the_bound():
    """q, k and v, in fp64, of whose scores each gains as much as it may: the keys of a block are 1
    off their mean, the queries 2.5."""
    tensors = torch.zeros(3, 1, 1, 16, 16, dtype=torch.float64)
    side = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(8)
    tensors[:, ..., 0] = torch.stack([2.5 * side, side, side])[:, None, None]
    return list(tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("further", "slope"), [(0.0, 0.0), (1e-5, 0.0), (-1e-5, 2.0)])
def test_of_the_reference_the_gradient_ends_there(further, slope, dtype):
    q, k, v = (x.to(dtype) for x in at_the_bound())
    q = (q * (1 + further)).requires_grad_()
    _, lse = reference.kernel.forward_lse(q, k, v, plan_of(blocks=1, kept=0.0), scale=1.0)
    (grad,) = torch.autograd.grad(lse.sum(), q)
    torch.testing.assert_close(
        grad.abs().max(), torch.tensor(slope, dtype=dtype), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("further", [0.0, 1e-5, -1e-5])
@pytest.mark.parametrize("kernel", BY)
def test_the_gradient_ends_there(kernel, further):
    """To the last bit: of a curve that is given, whose numbers have no rounding."""
    plan, tensors = plan_of(blocks=1, kept=0.0), [x.float() for x in at_the_bound()]
    skip_without(kernel, plan, tensors)
    added = {"gather": rest.plain, "native": native.added}.get(kernel)
    if added is None:
        from gen_accel.kernels.triton import rest as triton

        added = triton.added
    rise = torch.full((1, 1, 16), MOST_GAINED * (1 + further))
    weight = torch.eye(16)[None, :1]
    leaves = [x.requires_grad_() for x in (rise, weight, *tensors)]
    nothing = torch.zeros(1, 1, 16, 16), torch.full((1, 1, 16), -torch.inf)
    _, total = added(*nothing, *leaves[2:], plan, Curve(rise, weight), scale=1.0)
    gained = total - torch.tensor(16.0).log()
    assert (gained - MOST_GAINED).abs().max() < 1e-3
    grads = torch.autograd.grad(total.sum(), leaves)
    assert [bool(x.any()) for x in grads[:2]] == [further < 0] * 2
