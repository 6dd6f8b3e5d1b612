"""Plans for our Triton kernels, and the reference that they are held to."""

import torch
from support.checks import assert_no_worse
from support.problems import random_plan

from gen_accel.kernels import reference
from gen_accel.kernels import triton as package
from gen_accel.plan import Plan, Route


def routed_plan(device, batch=2, heads=2, block_q=16, block_k=16):
    """`random_plan` in which each query sees half of the groups of two key blocks."""
    plan = random_plan(device, batch, heads, block_q, block_k)
    g = torch.Generator().manual_seed(1)
    Kk = plan.keep.shape[3]
    picks = torch.rand(batch, heads, plan.slots.numel(), -(-Kk // 2), generator=g) < 0.5
    picks[:, :, 64:80] = True  # whole blocks too
    route = Route(picks, torch.arange(Kk) // 2, block_k).to(device)
    return Plan(plan.slots, plan.keep, block_q, block_k, route, dynamic=True)


def odd_plan(device, block_q, block_k, slots):
    """Blocks of any size, the last slots padding."""
    g = torch.Generator().manual_seed(2)
    keep = torch.rand(1, 1, slots // block_q, slots // block_k, generator=g) < 0.6
    keep[:, :, :, 0] = True
    order = torch.full((slots,), -1)
    order[: slots - 5] = torch.randperm(slots - 5, generator=g)
    return Plan(order, keep, block_q, block_k).to(device)


PLANS = {
    "heads, small query blocks": lambda device: random_plan(device, 1, 2, 8, 32),
    "windows, small key blocks": lambda device: random_plan(device, 1, 2, 32, 8, True),
    "route": lambda device: routed_plan(device, 2, 1),
    "blocks of 24 and 36": lambda device: odd_plan(device, 24, 36, 144),
    "one pattern": lambda device: random_plan(device),
    "batch and heads": lambda device: random_plan(device, batch=2, heads=2),
    "batch, small key blocks": lambda device: random_plan(device, 2, 1, 32, 8),
    "windows": lambda device: random_plan(device, windows=True),
    "windows, blocks of two tiles": lambda device: random_plan(device, 1, 2, 64, 64, True),
    "route, small key blocks": lambda device: routed_plan(device, 1, 2, 32, 8),
    "route, key blocks of two tiles": lambda device: routed_plan(device, 2, 1, 16, 64),
    "blocks of 36 and 57": lambda device: odd_plan(device, 36, 57, 684),
    "blocks of 72 and 1": lambda device: odd_plan(device, 72, 1, 72),
    "blocks of 20 and 1": lambda device: odd_plan(device, 20, 1, 40),
    "blocks of 91 and 455": lambda device: odd_plan(device, 91, 455, 455),
}


def inputs(plan, dtype, dim=16, batch=None, heads=None):
    """One head and sample for each pattern of the plan without `batch` and `heads`."""
    g = torch.Generator().manual_seed(0)
    shape = batch or len(plan.keep), heads or plan.keep.shape[1], plan.tokens, dim
    return [torch.randn(shape, generator=g).to(plan.slots.device, dtype) for _ in range(3)]


def by_reference(q, k, v, plan, scale):
    """Output and logsumexp."""
    out = reference.kernel.forward(q, k, v, plan, scale=scale)
    return out, reference.logsumexp(q, k, plan, scale=scale)


def differentiated(function, tensors, dtype, lse_weight=0.0):
    """Outputs and gradients of a weighted sum of them, rows that see nothing left out of lse."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out, lse = function(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device)
    loss = (out * weight.view(out.shape)).sum()
    if lse_weight:
        seen = lse.isfinite()
        loss = loss + lse_weight * lse.where(seen, 0.0).double().square().sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def assert_matches_reference(plan, tensors, scale=0.3, lse_weight=0.0):
    dtype = tensors[0].dtype

    def reference_of(*leaves):
        return by_reference(*leaves, plan, scale)

    def ours(*leaves):
        return package.kernel.forward_lse(*leaves, plan, scale=scale)

    exact = differentiated(reference_of, tensors, torch.float64, lse_weight)
    low = differentiated(reference_of, tensors, dtype, lse_weight)
    actual = differentiated(ours, tensors, dtype, lse_weight)
    dark = exact[1] == -torch.inf
    assert torch.equal(actual[1] == -torch.inf, dark)
    for results in (exact, low, actual):
        results[1] = results[1].masked_fill(dark, 0.0)
    for result, *rest in zip(actual, low, exact, strict=True):
        assert_no_worse(result, *rest)
