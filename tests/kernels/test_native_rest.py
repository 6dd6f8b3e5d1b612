"""The pooled rest, log-sum-exps and spreads in C++: what concerns this code alone."""

import pytest
import torch
from support.checks import assert_no_worse
from support.problems import assert_gradients_no_worse, random_plan
from support.products import in_turns

from gen_accel import kernels
from gen_accel.kernels import choosing, native, reference
from gen_accel.kernels import rest as pooled
from gen_accel.kernels.native import int8, rest
from gen_accel.kernels.rest import Curve, curve_of
from gen_accel.plan import Plan, Rest, slots_of

pytestmark = pytest.mark.usefixtures("poison", "built")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RESTS = {
    "query": Rest("query"),
    "key": Rest("key"),
    "second": Rest("query", "second"),
    "first": Rest("query", "first"),
    "key, first": Rest("key", "first"),
}
KINDS = ["query", "key", "second", "first", "key, first"]
SCALE = 0.3


def plan_of(kind, block_q, block_k, slots, *, patterns=(1, 2), density=0.3, empty=0):
    """Tokens out of order among padding, the last `empty` slots all padding. The first query block
    keeps all, the last nothing."""
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(*patterns, slots // block_q, slots // block_k, generator=g) < density
    keep[:, :, 0], keep[:, :, -1] = True, False
    held = torch.randperm(slots - empty, generator=g)[: slots - empty - 7]
    places = torch.full((slots,), -1)
    places[held] = torch.randperm(len(held), generator=g)
    return Plan(places, keep, block_q, block_k, rest=RESTS[kind])


def with_rest(plan, kernel="native", scale=SCALE):
    def run(q, k, v):
        facts = {"scale": scale, "kernel": kernel}
        if q.dtype == torch.float64 or kernel == "reference":
            return reference.kernel.forward(q, k, v, plan, scale=scale)
        return pooled.attention(native.kernel, q, k, v, plan, **facts)[0]

    return run


def by_reference(plan, scale=SCALE):
    return with_rest(plan, "reference", scale)


SIZES = [  # slots of a query block, of a key block, of all, and the head dim
    (64, 64, 384, 64),
    (30, 50, 300, 33),
    (8, 128, 384, 17),  # more query blocks than a group holds, and key blocks in one chunk
    (160, 16, 480, 128),  # more key blocks than a chunk holds
    (7, 5, 245, 256),
]


@pytest.mark.turns(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "dtype"), in_turns(SIZES, [FP32, BF16, FP16]), ids=str)
def test_matches_reference(size, dtype, kind, qkv):
    *sizes, dim = size
    plan = plan_of(kind, *sizes, empty=sizes[1] if sizes[0] == 30 else 0)
    inputs = [x.to(BF16).float() for x in qkv(plan.tokens, batch=1, dim=dim)]
    q, k, v = (x.to(dtype) for x in inputs)
    # Where a second order reaches its bound the gradient jumps, and roundings decide on which side
    # a score lies: many scores lie there that are sharper than those of models.
    scale = min(SCALE, dim**-0.5) if kind == "second" else SCALE
    ours, theirs = with_rest(plan, scale=scale), by_reference(plan, scale)
    exact = theirs(q.double(), k.double(), v.double())
    assert_no_worse(ours(q, k, v), theirs(q, k, v), exact)
    assert_gradients_no_worse(ours, theirs, inputs, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_fp32_where_the_processor_has_no_others(kind, monkeypatch, qkv):
    monkeypatch.setattr(rest, "multiplies_bf16", lambda: False)
    plan = plan_of(kind, 30, 50, 300)
    inputs = [x.to(BF16).float() for x in qkv(plan.tokens, batch=1, dim=33)]
    q, k, v = (x.to(BF16) for x in inputs)
    exact = by_reference(plan)(q.double(), k.double(), v.double())
    assert_no_worse(with_rest(plan)(q, k, v), by_reference(plan)(q, k, v), exact)
    assert_gradients_no_worse(with_rest(plan), by_reference(plan), inputs, BF16)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_any_scale(kind, scale, qkv):
    plan = plan_of(kind, 16, 32, 192)
    inputs = qkv(plan.tokens, batch=1)
    exact = by_reference(plan, scale)(*(x.double() for x in inputs))
    low = by_reference(plan, scale)(*inputs)
    assert_no_worse(with_rest(plan, scale=scale)(*inputs), low, exact)
    ours, theirs = with_rest(plan, scale=scale), by_reference(plan, scale)
    assert_gradients_no_worse(ours, theirs, inputs)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["query", "key", "second", "first"])
def test_queries_and_keys_far_from_zero(kind, dtype, qkv):
    """What they have in common must not drown what they differ by. A slope around keys is left
    out: it grows with what queries have in common."""
    plan = plan_of(kind, 16, 32, 192)
    q, k, v = qkv(plan.tokens, batch=1, dim=64)
    q, k, v = (x.to(dtype) for x in (q + 3, k + 3, v))
    exact = by_reference(plan)(q.double(), k.double(), v.double())
    assert_no_worse(with_rest(plan)(q, k, v), by_reference(plan)(q, k, v), exact)
    inputs = [x.float() for x in (q, k, v)]
    assert_gradients_no_worse(with_rest(plan), by_reference(plan), inputs, dtype)


@pytest.mark.parametrize("blocks", [(16, 32, 192), (7, 5, 245)], ids=str)
@pytest.mark.parametrize("centre", ["query", "key"])
def test_where_all_are_equal_but_for_the_slope(centre, blocks, qkv):
    """Keys whose scores are all 0 weigh alike; what is left is the slope of the values."""
    plan = plan_of("first", *blocks)
    plan.rest = Rest(centre, "first")
    q, k, v = qkv(plan.tokens, batch=1)
    q[..., 3:], k[..., :3] = 0, 0  # no score, and no slope; then one that is small
    run = with_rest(plan)
    torch.testing.assert_close(run(q, k, v), by_reference(plan)(q, k, v))
    k[..., :3] = 1e-3 * torch.randn(k[..., :3].shape)
    inputs = [x.to(BF16).float() for x in (q, k, v)]
    exact = by_reference(plan)(*(x.double() for x in inputs))
    assert_no_worse(run(*inputs), by_reference(plan)(*inputs), exact)
    assert_gradients_no_worse(run, by_reference(plan), inputs, FP32)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_left_out_the_answer_stays_bit_for_bit(kind, dtype, qkv):
    q, k, v = (x.requires_grad_() for x in qkv(377, dtype))
    for density in (0.3, 1.0):
        plan = plan_of(kind, 16, 32, 384, density=density)
        if density == 1.0:
            plan.keep[:] = True
        given = native.kernel.forward_lse(q, k, v, plan.kept, scale=SCALE, wide=True)
        kept, lse = (x.detach().requires_grad_() for x in given)
        out, total = rest.added(kept, lse, q, k, v, plan, curve_of(q, k, plan, SCALE), scale=SCALE)
        same = plan.places < (16 if density == 0.3 else 384)
        assert same.sum() > 10
        assert torch.equal(out[:, :, same], kept[:, :, same].to(out.dtype))
        assert torch.equal(total[:, :, same], lse[:, :, same])
        assert (total[:, :, ~same] > lse[:, :, ~same]).all()
    above = torch.ones_like(out), torch.ones_like(total)
    *of_kept, dq, dk, dv = torch.autograd.grad((out, total), (kept, lse, q, k, v), above)
    assert all((x == 1).all() for x in of_kept)
    assert not any(x.any() for x in (dq, dk, dv))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_both_results_reach_all_five_tensors(kind, qkv):
    """Held to torch's own, of tensors that attention did not make."""
    plan = plan_of(kind, 16, 32, 192)
    q, k, v = qkv(plan.tokens, batch=1)
    inputs = [v.flip(2), k[..., 0] + 1, q, k, v]

    def gradients(kernel, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out, total = pooled.added(*leaves, plan, scale=SCALE, kernel=kernel)
        above = torch.linspace(-1, 1, out.numel()).to(dtype).view(out.shape)
        return torch.autograd.grad((out, total), leaves, (above, above[..., 3]))

    exact, low = (gradients("gather", dtype) for dtype in (torch.float64, FP32))
    for found, *others in zip(gradients("native", FP32), low, exact, strict=True):
        assert_no_worse(found, *others)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_and_patterns_of_their_own(kind, qkv):
    """Twice the same sample gives twice the same, and each sample and head has its pattern."""
    plan = plan_of(kind, 16, 32, 192, patterns=(2, 2))
    one = qkv(plan.tokens, batch=1)
    two = [torch.cat([x, x]).requires_grad_() for x in one]
    out = with_rest(plan)(*two)
    grads = torch.autograd.grad(out.square().sum(), two)
    for sample in range(2):
        keep = plan.keep[sample : sample + 1]
        alone = Plan(plan.slots, keep, 16, 32, rest=plan.rest)
        leaves = [x.clone().requires_grad_() for x in one]
        expected = with_rest(alone)(*leaves)
        assert torch.equal(out[sample : sample + 1], expected)
        for found, like in zip(
            grads, torch.autograd.grad(expected.square().sum(), leaves), strict=True
        ):
            torch.testing.assert_close(found[sample : sample + 1], like, rtol=1e-4, atol=1e-5)


def test_what_is_not_of_the_same_tokens_is_refused(qkv):
    plan = plan_of("query", 16, 32, 192)
    q, k, v = qkv(plan.tokens)
    lse = torch.zeros(q.shape[:3])
    for out, other, name in ((q[:, :, 1:], lse, "out"), (q, lse[:, :, 1:], "lse")):
        with pytest.raises(ValueError, match=f"{name} must be .* on the CPU, got"):
            rest.added(out, other, q, k, v, plan, scale=SCALE)
    for curve in (Curve(lse[:, :, 1:], q[:, :, 0]), Curve(lse, q[:, 0])):
        with pytest.raises(ValueError, match=r"(rise|weight) must be .* on the CPU, got"):
            rest.added(q, lse, q, k, v, plan, curve, scale=SCALE)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("kind", ["blocks", "windows", "route"])
def test_log_sum_exps(kind, dtype, qkv):
    """Of what the last query block sees there is nothing."""
    windows, route = kind == "windows", kind == "route"
    plan = random_plan(torch.device("cpu"), heads=2, windows=windows, route=route)
    if route:
        keep = plan.partial.touched(plan.real, plan.block_q, plan.block_k)
        plan = Plan(plan.slots, keep, plan.block_q, plan.block_k, plan.partial)
    q, k, v = (x.to(BF16).to(dtype) for x in qkv(plan.tokens, batch=1))
    exact = reference.logsumexp(q.double(), k.double(), plan, scale=SCALE)
    low = reference.logsumexp(q, k, plan, scale=SCALE)
    out, lse = native.kernel.forward_lse(q, k, v, plan, scale=SCALE)
    seen = exact.isfinite()
    assert 0 < seen.sum() < seen.numel()
    assert_no_worse(lse[seen], low[seen], exact[seen])
    assert (lse[~seen] == -torch.inf).all()
    assert not out[~seen].any()
    assert torch.equal(out, native.kernel.forward(q, k, v, plan, scale=SCALE))
    wide, _ = native.kernel.forward_lse(q, k, v, plan, scale=SCALE, wide=True)
    assert wide.dtype == FP32
    assert torch.equal(wide.to(dtype), out)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_gradients_through_the_log_sum_exp(wide, dtype, qkv):
    plan = random_plan(torch.device("cpu"), heads=2, windows=True)
    inputs = [x.to(BF16).float() for x in qkv(plan.tokens, batch=1)]

    def by(kernel):
        def run(q, k, v):
            out, lse = kernel.kernel.forward_lse(q, k, v, plan, scale=SCALE, wide=wide)
            return (out + lse.masked_fill(lse == -torch.inf, 0)[..., None]).to(q.dtype)

        return run

    assert_gradients_no_worse(by(native), by(reference), inputs, dtype)


def test_the_gradient_of_the_log_sum_exp_alone(qkv):
    plan = random_plan(torch.device("cpu"), heads=2)
    inputs = qkv(plan.tokens, batch=1)

    def by(kernel):
        def run(q, k, v):
            lse = kernel.kernel.forward_lse(q, k, v, plan, scale=SCALE)[1]
            return lse.masked_fill(lse == -torch.inf, 0)[..., None] + 0 * v

        return run

    assert_gradients_no_worse(by(native), by(reference), inputs)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_log_sum_exps_of_8_bits(dtype, int8_kernel, qkv):
    """As far off as the scores are: q and k at steps of 1/127 of their largest number."""
    plan = random_plan(torch.device("cpu"), heads=2)
    q, k, v = qkv(plan.tokens, dtype, batch=1)
    out, lse = int8.kernel.forward_lse(q, k, v, plan, scale=SCALE)
    wide, again = int8.kernel.forward_lse(q, k, v, plan, scale=SCALE, wide=True)
    assert torch.equal(wide.to(dtype), out)
    assert torch.equal(again, lse)
    exact = reference.logsumexp(q.double(), k.double(), plan, scale=SCALE)
    seen = exact.isfinite()
    assert (lse[~seen] == -torch.inf).all()
    step = q.abs().max() * k.abs().max() / 127
    assert (lse - exact)[seen].abs().max() < SCALE * step * q.shape[3] ** 0.5


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_spreads(dtype):
    plan = plan_of("query", 6, 100, 1200, empty=100)
    slots = slots_of(plan.slots, 6, 100)
    g = torch.Generator().manual_seed(0)
    k = torch.randn(2, plan.tokens, 3, 33, generator=g).transpose(1, 2).to(dtype)
    means = torch.randn(2, 3, 200, 33, generator=g)
    found = choosing.block_spread(means, k, slots, scale=SCALE)
    low = choosing.block_spread(means, k, slots, scale=SCALE, kernel="gather")
    keys = k.double()[:, :, plan.slots.clamp_min(0)].unflatten(2, (-1, 100))
    scores = torch.einsum("bhid,bhjtd->bhijt", means.double(), keys) * SCALE
    exact = scores.masked_fill(~plan.real.view(-1, 100), -torch.inf).logsumexp(-1)
    assert (found[..., -1] == -torch.inf).all()
    assert torch.equal(low.isneginf(), found.isneginf())
    assert_no_worse(found[..., :-1], low[..., :-1], exact[..., :-1])


@pytest.mark.parametrize("slots", [torch.arange(64), torch.arange(64).flip(0)], ids=["raster", ""])
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 1, 64, 8), "query means must be .* on the CPU, got"),
        (
            (1, 2, 63, 8),
            r"slots? must be (dense \(64\) torch.int64 on the CPU|from -1 to 62, got 63)",
        ),
    ],
)
def test_spreads_of_other_keys_are_refused(shape, words, slots):
    slots = slots_of(slots, 16, 16)
    with pytest.raises(ValueError, match=words):
        choosing.block_spread(torch.zeros(1, 2, 4, 8), torch.zeros(shape), slots, scale=1.0)


@pytest.mark.parametrize("scale", [1e8, 1e9, 1e12])
@pytest.mark.parametrize("rest", RESTS.values(), ids=str)
def test_vast_scores_are_told_apart(rest, scale, qkv):
    """The softmax takes one key or one pooled key, forward and backward."""
    known = plan_of("query", 16, 32, 192)
    plan = Plan(known.slots, known.keep, 16, 32, rest=rest)
    inputs = qkv(plan.tokens)
    made = []
    for kernel, dtype in (
        ("native", torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = kernels.run(*leaves, plan, scale=scale, kernel=kernel)
        above = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
        made.append((out.detach(), *torch.autograd.grad(out, leaves, above)))
    for found, low, exact in zip(*made, strict=True):
        assert_no_worse(found, low, exact)
