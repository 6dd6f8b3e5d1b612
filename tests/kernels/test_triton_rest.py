"""Our Triton kernels for the rest of a plan, held to the reference; interpreted on the CPU."""

import autotune
import pytest
import torch
from support.checks import assert_no_worse
from support.launches import Launches, record
from support.products import NIGHTLY
from support.triton_plans import differentiated, inputs, odd_plan, routed_plan

from gen_accel.kernels import reference
from gen_accel.kernels import rest as dispatch
from gen_accel.kernels import triton as package
from gen_accel.kernels.rest import Curve, curve_of
from gen_accel.kernels.triton import configs, launch, packing, rest, tuned
from gen_accel.plan import Plan, Rest

pytestmark = pytest.mark.usefixtures("poison", "untuned")

RESTS = {
    "key": Rest("key"),
    "query": Rest("query"),
    "key, first": Rest("key", "first"),
    "second": Rest("query", "second"),
}


def plan_of(rest, device, batch=1, heads=1, block_q=16, block_k=16, slots=64, padding=0):
    """Tokens out of order, `padding` slots of the last block and all of the first one empty. The
    first query blocks keep all, the last ones nothing."""
    g = torch.Generator().manual_seed(0)
    order = torch.full((slots,), -1)
    first = block_k if padding else 0
    order[first : slots - padding] = torch.randperm(slots - first - padding, generator=g)
    keep = torch.rand(batch, heads, slots // block_q, slots // block_k, generator=g) < 0.4
    keep[:, :, :2] = True
    keep[:, :, -1] = False
    return Plan(order, keep, block_q, block_k, rest=RESTS[rest]).to(device)


# Blocks that their tiles divide; blocks of two tiles, a pattern for each head; short and odd ones.
PLANS = {
    "divide": {},
    "two tiles": {"heads": 2, "block_q": 48, "block_k": 48, "slots": 144, "padding": 7},
    "odd": {"block_q": 24, "block_k": 12, "slots": 72, "padding": 5},
    "a batch": {"batch": 2, "block_q": 8, "block_k": 32, "padding": 3},
}
LOW = [("odd", "key", torch.float16, 24), ("divide", "query", torch.bfloat16, 24)]
LOW += [("a batch", "second", torch.bfloat16, 24)]
SOME = [("divide", "key", torch.float32, 16), ("odd", "query", torch.float32, 24), *LOW]
SOME += [("odd", "key, first", torch.bfloat16, 24), ("two tiles", "key", torch.float32, 16)]
EVERY = [("two tiles", "second", torch.bfloat16, 64)]
EVERY += [(name, rest, torch.float32, 16) for name in PLANS for rest in RESTS]
EVERY += [
    (name, rest, dtype, 40)
    for name in PLANS
    for rest in RESTS
    for dtype in (torch.bfloat16, torch.float16)
]


def by_triton(plan, scale=0.3):
    def run(*leaves):
        given = {"scale": scale, "kernel": "triton"}
        return dispatch.attention(package.kernel, *leaves, plan, **given)

    return run


def added(*given):
    return dispatch.added(*given, scale=0.3, kernel="triton")


def plain(out, lse, q, k, v, plan, curve, *, scale):
    """`rest.added` in torch."""
    joint, total = dispatch.plain(out, lse, q, k, v, plan, curve, scale=scale)
    if plan.rest.order != "zeroth":
        joint = dispatch.plain_slope(joint, lse, total, q, k, v, plan, scale=scale)
    return joint, total


def assert_matches_reference(plan, tensors, scale=0.3):
    dtype = tensors[0].dtype

    def by_reference(*leaves):
        return reference.kernel.forward_lse(*leaves, plan, scale=scale)

    exact = differentiated(by_reference, tensors, torch.float64, lse_weight=0.1)
    low = differentiated(by_reference, tensors, dtype, lse_weight=0.1)
    actual = differentiated(by_triton(plan, scale), tensors, dtype, lse_weight=0.1)
    assert actual[1].dtype == torch.float32
    for results in (exact, low, actual):
        # Pooled keys are rounded to q's dtype, and so the log-sum-exp is no better.
        results[1] = results[1].to(torch.float64 if results is exact else dtype)
    for result, *others in zip(actual, low, exact, strict=True):
        assert_no_worse(result, *others)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "dtype", "dim"), SOME + (EVERY if NIGHTLY else []), ids=str
)
def test_outputs_and_gradients_match_reference(name, kind, dtype, dim, device):
    plan = plan_of(kind, device, **PLANS[name])
    heads = 2 if name == "odd" else None  # which share a pattern
    tensors = inputs(plan, dtype, dim, heads=heads)
    assert_matches_reference(plan, tensors)
    # Without a gradient, where the kept keys go on with the rest.
    exact = [*reference.kernel.forward_lse(*(x.double() for x in tensors), plan, scale=0.3)]
    low = [*reference.kernel.forward_lse(*tensors, plan, scale=0.3)]
    actual = [*by_triton(plan)(*tensors)]
    assert [x.dtype for x in actual] == [dtype, torch.float32]
    assert torch.equal(actual[1].isneginf(), exact[1].isneginf())
    for results, rounded in ((actual, dtype), (low, dtype), (exact, torch.float64)):
        results[1] = results[1].masked_fill(exact[1].isneginf(), 0.0).to(rounded)
    for result, *others in zip(actual, low, exact, strict=True):
        assert_no_worse(result, *others)


@pytest.mark.slow
def test_what_keys_have_in_common_takes_no_digits_of_their_variance(device):
    """Nor of the gradients."""
    plan = plan_of("second", device, **PLANS["odd"])
    q, k, v = inputs(plan, torch.float32, 24, heads=2)
    assert_matches_reference(plan, [q, k + 60, v], scale=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["key", "second"])
def test_what_keys_have_in_common_takes_no_digits_of_16_bits(kind, device):
    """Nor what queries have. Of the rest alone: where kept keys are multiplied in 16 bits, their
    part of the gradient of queries loses digits too."""
    plan = plan_of(kind, device, **PLANS["odd"])
    q, k, v = inputs(plan, torch.bfloat16, 24)
    q, k = q + 3, k + 30
    kept = reference.kernel.forward_lse(*(x.double() for x in (q, k, v)), plan.kept, scale=0.2)

    def results(added, dtype):
        def run(*qkv):
            wide = torch.promote_types(dtype, torch.float32)
            curve = curve_of(*qkv[:2], plan, 0.2)
            return added(*(x.to(wide) for x in kept), *qkv, plan, curve, scale=0.2)

        out, lse, *grads = differentiated(run, (q, k, v), dtype, lse_weight=0.1)
        return out.to(dtype), lse.to(dtype), *grads

    exact, low = (results(plain, x) for x in (torch.float64, torch.bfloat16))
    for result, *others in zip(results(rest.added, torch.bfloat16), low, exact, strict=True):
        assert_no_worse(result, *others)


@pytest.mark.slow
def test_gradients_of_a_curve_match_those_of_torch(device):
    """Of a curve that is given, apart from what it is made of."""
    plan = plan_of("second", device, **PLANS["odd"])
    q, k, v = inputs(plan, torch.float32)
    kept = reference.kernel.forward_lse(q, k, v, plan.kept, scale=0.3)

    def gradients(added, dtype):
        def run(rise, weight, *qkv):
            given = (x.to(dtype) for x in kept)
            return added(*given, *qkv, plan, Curve(rise, weight), scale=0.3)

        leaves = *curve_of(q, k, plan, 0.3), q, k, v
        return differentiated(run, leaves, dtype, lse_weight=0.1)

    exact = gradients(plain, torch.float64)
    low = gradients(plain, torch.float32)
    actual = gradients(rest.added, torch.float32)
    for result, *others in zip(actual, low, exact, strict=True):
        assert_no_worse(result, *others)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESTS)
def test_rows_that_nothing_is_left_out_of_are_as_they_were(kind, device):
    """Bit for bit, in both directions, as what came there has no gradient but its own."""
    plan = plan_of(kind, device, heads=1, padding=4)
    q, k, v = inputs(plan, torch.float32)
    out, lse = (
        x.requires_grad_() for x in reference.kernel.forward_lse(q, k, v, plan.kept, scale=0.3)
    )
    joint, total = added(out, lse, q, k, v, plan)
    whole = plan.slots[16:32]  # the first query block is padding
    assert (whole >= 0).all()
    assert torch.equal(joint[:, :, whole], out[:, :, whole])
    assert torch.equal(total[:, :, whole], lse[:, :, whole])
    others = plan.slots[32:][plan.slots[32:] >= 0]
    assert (total[:, :, others] > lse[:, :, others]).all()
    given = torch.randn(joint.shape).to(device), torch.randn(total.shape).to(device)
    grads = torch.autograd.grad((joint, total), (out, lse), given)
    for grad, wanted in zip(grads, given, strict=True):
        assert torch.equal(grad[:, :, whole], wanted[:, :, whole])


def test_a_plan_that_keeps_nothing_is_all_rest(device):
    """And one of no keys at all gives zeros."""
    plan = plan_of("key", device)
    plan = Plan(plan.slots, torch.zeros_like(plan.keep), 16, 16, rest=plan.rest)
    tensors = inputs(plan, torch.float32)
    out, lse = by_triton(plan)(*tensors)
    wanted, total = reference.kernel.forward_lse(*tensors, plan, scale=0.3)
    torch.testing.assert_close((out, lse), (wanted, total))


@pytest.mark.slow
def test_chunks_and_heads_at_a_time_decide_nothing(device, monkeypatch):
    """Four chunks of half a head, one more than rooms, by a small cache; then in one, and in the
    backward pass head by head."""
    plan = plan_of("second", device, block_q=12, block_k=12, slots=36, padding=3)
    tensors = inputs(plan, torch.float32, heads=2)
    monkeypatch.setattr(configs, "group", lambda config, blocks: 2)  # of three query blocks
    monkeypatch.setattr(configs, "card_size", lambda device: configs.CardSize(1, 1600))
    launched = []
    own = launch.launch

    def watched(kernel, *given, **sizes):
        launched.append(kernel.__name__)
        return own(kernel, *given, **sizes)

    monkeypatch.setattr(launch, "launch", watched)
    some = differentiated(by_triton(plan), tensors, None, lse_weight=0.1)
    assert launched.count("rest_turns_kernel") == 1
    assert launched.count("pool_kernel") == 4
    launched.clear()
    monkeypatch.setattr(configs, "card_size", lambda device: configs.CardSize(1, 1 << 31))
    monkeypatch.setattr(rest, "HELD", 1)
    others = differentiated(by_triton(plan), tensors, None, lse_weight=0.1)
    assert launched.count("pool_kernel") == 2
    torch.testing.assert_close(some, others)


@pytest.mark.slow
def test_tuning_times_the_rest_too(device):
    """Which later calls obey, with an answer that stays."""
    plan = plan_of("second", device, block_q=16, block_k=16, slots=32, padding=3)
    tensors = q, k, v = inputs(plan, torch.float32, batch=1, heads=1)
    found = autotune.tune(q, k, v, plan, scale=0.3)
    kinds = {name.split("/")[1]: name for name in found}
    assert {*configs.TURN_KINDS} < {*kinds}
    assert len(kinds) == 5
    own = [16, 16, 4, 1]
    tuned.write({kinds[kind]: own for kind in configs.TURN_KINDS})
    assert [list(config) for config in configs.choose_turns(q, 16, 16)] == [own, own]
    assert_matches_reference(plan, tensors)


@pytest.mark.parametrize("name", ["divide", "odd"])
@pytest.mark.parametrize("kind", ["key, first", "query", "second"])
def test_some_heads_at_a_time_are_the_same(name, kind, device, monkeypatch):
    """To the last bit, of a plan with a pattern for each head, made for one call."""
    plan = plan_of(kind, device, **PLANS[name] | {"heads": 3})
    plan = Plan(plan.slots, plan.keep, plan.block_q, plan.block_k, dynamic=True, rest=plan.rest)
    tensors = inputs(plan, torch.bfloat16)
    wanted = by_triton(plan)(*tensors)
    monkeypatch.setattr(dispatch, "WIDE", 2 * 4 * plan.tokens * tensors[0].shape[3])
    heads = []
    own = rest.pooled

    def watched(q, *more, **options):
        heads.append(q.shape[1])
        return own(q, *more, **options)

    monkeypatch.setattr(rest, "pooled", watched)
    made = by_triton(plan)(*tensors)
    assert heads == [2, 1]
    assert torch.equal(made[0], wanted[0])
    assert torch.equal(made[1], wanted[1])


@pytest.mark.parametrize("kind", ["key", "query", "second"])
def test_nothing_waits_and_nothing_is_random(kind, device, monkeypatch):
    plan = plan_of(kind, device, block_q=32, block_k=16)
    plan.held, plan.tokens, plan.slots_int32, plan.is_raster  # noqa: B018  (made once)
    tensors = [x.requires_grad_() for x in inputs(plan, torch.bfloat16, heads=2)]
    out, lse = (
        x.detach() for x in reference.kernel.forward_lse(*tensors, plan.kept, scale=0.3, wide=True)
    )
    curve = curve_of(*tensors[:2], plan, 0.3)
    if curve is not None:
        curve = Curve(*(x.detach().requires_grad_() for x in curve))
    counted = Launches()
    record(monkeypatch, counted)
    with counted:
        joint, total = rest.added(out, lse, *tensors, plan, curve, scale=0.3)
        forward = sum(count for name, count in counted.done.items() if name.endswith("_kernel"))
        torch.autograd.grad(joint.sum() + total.sum(), [*tensors, *(curve or ())])
    assert forward == {"key": 4, "query": 3, "second": 7}[kind], counted.done
    assert counted.done["sums_kernel"] == {"key": 4, "query": 2, "second": 4}[kind]
    assert counted.waits == []
    assert counted.random == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spread_is_the_log_sum_exp_of_mean_queries(dtype, device):
    """In 16 bits, too, with what the mean query has beyond them."""
    plan = plan_of("query", device, heads=1, block_q=24, block_k=12, slots=72, padding=5)
    q, k, _ = inputs(plan, dtype, 24, heads=2)
    means = q[:, :, :3].double() * 1.001
    scores = (means @ k.double().mT * 0.3)[..., plan.slots.clamp_min(0)]
    scores = scores.masked_fill(~plan.real, -torch.inf).unflatten(-1, (-1, 12))
    made = rest.spread(means.float(), k, plan, scale=0.3)
    assert made.dtype == torch.float32
    assert (made[..., 0] == -torch.inf).all()
    wanted = scores.logsumexp(-1)
    error = (made[..., 1:].double() - wanted[..., 1:]).abs().max()
    assert error < (1e-6 if dtype == torch.float32 else 3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["gathered tokens", "packed", "gathered queries"])
def test_wide_outputs_are_those_before_rounding(way, device, monkeypatch):
    monkeypatch.setattr(packing, "pays", lambda *facts: way == "packed")
    plan = odd_plan(device, 32, 32, 64)
    if way == "gathered queries":
        plan = routed_plan(device, 1, 1, 16, 16)
        plan.leaves_out_picks = False
    tensors = inputs(plan, torch.bfloat16)

    def run(wide):
        def both(*leaves):
            return package.kernel.forward_lse(*leaves, plan, scale=0.3, wide=wide)

        return differentiated(both, tensors, None, lse_weight=0.1)

    (wide, *others), (out, *same) = run(True), run(False)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, out.float(), rtol=2**-7, atol=0.0)
    assert not torch.equal(wide, out.float())
    assert torch.equal(others[0], same[0])
    for x, y in zip(others[1:], same[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.02)
