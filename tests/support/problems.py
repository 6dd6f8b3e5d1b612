"""Plans and methods that every kernel is held to, and how far a gradient may be off."""

from dataclasses import replace

import pytest
import torch
from support.checks import assert_no_worse

from gen_accel.kernels import Facts, allowance, kernel_of, reference
from gen_accel.plan import Plan, Rest, Route, Windows, unpack


def assert_gradients_no_worse(forward, other, inputs, low_dtype=torch.float32):
    """Hold the gradients of `forward` to those of `other`, as to its exact fp64 ones."""
    weight = torch.linspace(-1, 1, inputs[0].numel(), dtype=torch.float64).to(inputs[0].device)

    def gradients(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        return torch.autograd.grad((out * weight.to(dtype).view(out.shape)).sum(), leaves)

    exact, low = gradients(other, torch.float64), gradients(other, low_dtype)
    for actual, *rest in zip(gradients(forward, low_dtype), low, exact, strict=True):
        assert_no_worse(actual, *rest)


def differentiates(kernel):
    """Whether a gradient is no reason for a kernel to refuse."""
    where = (torch.device("cpu"),) * 3
    facts = [
        Facts(((1, 2, 64, 16),) * 3, (torch.float32,) * 3, where, grad=grad)
        for grad in (False, True)
    ]
    without, with_one = map(kernel_of(kernel).unsupported, facts)
    return without == with_one


def allowed(kernel, method, video, q, k, v, scale=None):
    """What the kernel may err more than its dtype makes it, for a method's plan of this call."""
    plan = method.plan_for(q, k, video=video)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return allowance(kernel, q, k, v, plan, scale=scale)


def random_plan(
    device, batch=1, heads=1, block_q=16, block_k=16, windows=False, route=False, rest=None
):
    """Tokens out of order among padding, 93 in 128 slots. The first query block sees padding alone
    and the last sees nothing."""
    g = torch.Generator().manual_seed(0)
    S, N = 128, 93
    held = torch.cat([torch.arange(32), torch.arange(64, S)])[torch.randperm(S - 32, generator=g)]
    slots = torch.full((S,), -1)
    slots[held[:N]] = torch.arange(N)
    keep = torch.rand(batch, heads, S // block_q, S // block_k, generator=g) < 0.5
    keep[:, :, [0, -1]] = False
    keep[:, :, 0, 32 // block_k : 64 // block_k] = True
    partial = None
    if windows:
        place = torch.randint(8, (2, S), generator=g, dtype=torch.int32)
        first = place - torch.randint(-1, 3, (2, S), generator=g)  # some windows are empty
        last = place + torch.randint(-1, 5, (2, S), generator=g)
        free = torch.arange(S) >= 64
        seen = torch.zeros(S, dtype=torch.int64)
        partial = Windows(first.int(), last.int(), place, free, seen)
    if route:
        picks = torch.rand(batch, heads, S, 3, generator=g) < 0.5
        partial = Route(picks, torch.arange(S // block_k) * 3 * block_k // S, block_k)
    return Plan(slots, keep, block_q, block_k, partial, rest=rest).to(device)


def all_picked(plan):
    """In which queries see all that they picked, and no less."""
    keep = plan.partial.touched(plan.real, plan.block_q, plan.block_k)
    return Plan(plan.slots, keep, plan.block_q, plan.block_k, plan.partial)


RESTS = {
    "around queries": Rest(),
    "around queries, first order": Rest("query", "first"),
    "around queries, second order": Rest("query", "second"),
    "around keys": Rest("key"),
    "around keys, first order": Rest("key", "first"),
}


def with_rest(plan, rest):
    return replace(plan, rest=rest)


def lse_slack(dtype):
    """Slack of a log-sum-exp beside the reference's, which is of fp32. An error e of it puts all
    weights of a row off by the factor exp(e): a sixteenth of the spacing of `dtype`."""
    return torch.finfo(dtype).eps / 16


def answers(function, inputs, dtype):
    """Output and log-sum-exp by `function(q, k, v)`, the gradients of a weighted sum of both, and
    where a row sees nothing; the log-sum-exp is 0 there, and its gradient no number, as where two
    parts are merged."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out, lse = function(*leaves)
    dark = lse.isneginf()
    over_out = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    over_lse = torch.linspace(1, -2, lse.numel()).view(lse.shape).to(lse)
    above = over_out, over_lse.masked_fill(dark, torch.nan)
    grads = torch.autograd.grad((out, lse), leaves, above)
    return [out.detach(), lse.detach().masked_fill(dark, 0.0), *grads], dark


def assert_answers_no_worse(function, other, inputs, more=0.0):
    """Hold all of `answers` of one to those of `other`, the reference's."""
    dtype = inputs[0].dtype
    (exact, dark), (low, _) = (answers(other, inputs, x) for x in (torch.float64, dtype))
    actual, found = answers(function, inputs, dtype)
    assert torch.equal(found, dark)
    slack = [more, lse_slack(dtype), 0.0, 0.0, 0.0]
    for *three, extra in zip(actual, low, exact, slack, strict=True):
        assert_no_worse(*three, more=extra)


PLANS = [
    pytest.param({}, id="one pattern"),
    pytest.param({"batch": 2, "heads": 2}, id="batch and heads"),
    pytest.param({"heads": 2, "block_q": 8, "block_k": 32}, id="heads, small query blocks"),
    pytest.param({"batch": 2, "block_q": 32, "block_k": 8}, id="batch, small key blocks"),
    pytest.param({"windows": True}, id="windows"),
    pytest.param({"route": True}, id="route"),
    pytest.param({"route": True, "batch": 2, "heads": 2, "block_k": 8}, id="route, batch, heads"),
    pytest.param(
        {"batch": 2, "heads": 2, "block_q": 32, "block_k": 8, "windows": True},
        id="windows, batch and heads, small key blocks",
    ),
]


def blind(plan):
    """(B, H, N) bool, tokens that see nothing."""
    return ~unpack(reference.pairs(plan).any(-1, keepdim=True), plan)[..., 0].expand(2, 2, -1)
