"""Attention over kept blocks and the rest in one pass in C++: what concerns this code alone."""

from functools import partial

import pytest
import torch
from support.checks import assert_no_worse
from support.products import in_turns
from support.qkv import random_qkv

import gen_accel
from gen_accel import Piecewise, VideoShape, kernels
from gen_accel.kernels import reference, rest
from gen_accel.kernels.native import int8
from gen_accel.kernels.native import rest as native
from gen_accel.kernels.rest import pooled_shares

pytestmark = pytest.mark.usefixtures("poison", "built")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PLAIN, TEXT = VideoShape(6, 8, 8), VideoShape(5, 7, 9, text=13)
OPTIONS = [
    {"block_q": 16, "block_k": 16},
    {"block_q": 64, "block_k": 32, "sink": 1, "band": 0},
    {"block_q": 16, "block_k": 32, "order": "zeroth"},
    {"block_q": 24, "block_k": 16, "tile": "raster"},
]


class Noted(kernels.Runner):
    """Runner that keeps the plans of answers, and can run none itself."""

    def __init__(self, scale, name="auto"):
        super().__init__(self.refuse, name, scale, takes_answers=True)
        self.plan = None

    def refuse(self, *given):
        raise AssertionError("the method made a plan first")

    def answered(self, out, plan, kernel):
        self.plan = plan
        return out


def close_qkv(video, dim, dtype=FP32):
    """Queries, keys and values that change from token to token by little."""
    q, k, v = (x.float() for x in random_qkv(video, dim=dim))
    q = q.cumsum(2) / 5
    return [x.to(dtype) for x in (q, k + q + 1, v)]


@pytest.mark.parametrize("video", [PLAIN, TEXT], ids=str)
@pytest.mark.parametrize(
    ("options", "score", "dtype", "dim"),
    in_turns(OPTIONS * 3, ["spread", "loss", "pooled"], [FP32, FP16], [16, 40]),
    ids=str,
)
def test_it_keeps_what_a_plan_does_and_answers_as_the_reference(video, options, score, dtype, dim):
    q, k, v = close_qkv(video, dim, dtype)
    method, kernel = Piecewise(0.2, score=score, **options), Noted(dim**-0.5)
    out = method(q, k, v, video=video, kernel=kernel)
    plan = method.plan_for(q, k, v, video=video, kernel="gather")
    held = plan.real.view(-1, plan.block_q).any(-1)
    assert torch.equal(kernel.plan.keep[:, :, held], plan.keep[:, :, held])
    assert kernel.plan.entries == plan.entries
    run = partial(reference.kernel.forward, plan=kernel.plan, scale=dim**-0.5)
    assert_no_worse(out, run(q, k, v), run(q.double(), k.double(), v.double()))


@pytest.mark.parametrize("score", native.SCORES)
def test_in_bf16_next_to_all_blocks_are_the_same(score):
    q, k, v = close_qkv(TEXT, 32, BF16)
    method, kernel = Piecewise(0.2, score=score, block_q=16, block_k=16), Noted(32**-0.5)
    method(q, k, v, video=TEXT, kernel=kernel)
    plan = method.plan_for(q, k, v, video=TEXT, kernel="gather")
    assert (plan.keep.sum(-1) == kernel.plan.keep.sum(-1)).all()
    assert (plan.keep != kernel.plan.keep).float().mean() < 0.01


@pytest.mark.usefixtures("int8_kernel")
@pytest.mark.parametrize(
    ("options", "video", "dtype", "dim"),
    in_turns(OPTIONS, [PLAIN, TEXT], [FP32, BF16, FP16], [16, 40, 72]),
    ids=str,
)
def test_products_of_8_bits_choose_the_same_and_err_as_they_may(options, video, dtype, dim):
    q, k, v = close_qkv(video, dim, dtype)
    scale, method = dim**-0.5, Piecewise(0.2, score="pooled", **options)
    rounded, plain = (Noted(scale, name) for name in ("int8", "native"))
    out, exact = (method(q, k, v, video=video, kernel=x) for x in (rounded, plain))
    assert torch.equal(rounded.plan.keep, plain.plan.keep)
    more = kernels.allowance("int8", q, k, v, plain.plan, scale=scale)
    run = partial(reference.kernel.forward, plan=plain.plan, scale=scale)
    assert_no_worse(out, run(q, k, v), run(q.double(), k.double(), v.double()), more=more)
    assert not torch.equal(out, exact)
    given, _ = rest.attention(int8.kernel, q, k, v, plain.plan, scale=scale, kernel="int8")
    assert torch.equal(given, out)


def test_heads_keep_as_many_as_they_are_told():
    q, k, v = close_qkv(PLAIN, 16)
    sparse, dense = (Piecewise(share, block_q=16, block_k=16) for share in (0.1, 0.5))
    both, kernel = sparse.together([sparse, dense, dense][: q.shape[1]]), Noted(0.25)
    both(q, k, v, video=PLAIN, kernel=kernel)
    assert torch.equal(kernel.plan.keep, both.plan_for(q, k, v, video=PLAIN).keep)


@pytest.mark.parametrize(
    ("options", "video", "dtype", "order"),
    in_turns(
        [{"block_q": 16, "block_k": 16}, {"block_q": 24, "block_k": 16, "tile": "raster"}],
        [PLAIN, TEXT],
        [FP32, BF16, FP16],
        ["zeroth", "first", "second"],
    ),
    ids=str,
)
def test_shares_are_as_in_torch(options, video, dtype, order):
    q, k, _ = close_qkv(video, 40, dtype)
    plan = Piecewise(0.2, order=order, **options).plan_for(q, k, video=video)
    ours, plain = (pooled_shares(q, k, plan, scale=0.2, kernel=x) for x in ("native", "gather"))
    held, held_k = (plan.real.view(-1, x).any(-1) for x in (plan.block_q, plan.block_k))
    assert ours[:, :, ~held].isneginf().all()
    assert ours[..., ~held_k].isneginf().all()
    exact = pooled_shares(q.double(), k.double(), plan, scale=0.2, kernel="gather")
    ours, plain, exact = (x[:, :, held].exp() for x in (ours, plain, exact))
    if dtype == BF16:  # the products round what torch multiplies in fp32
        torch.testing.assert_close(ours, exact.float(), rtol=0.05, atol=2e-3)
    else:
        assert_no_worse(ours, plain, exact)


@pytest.mark.parametrize(
    "options",
    [
        {"critical": 0.2, "budget": "head"},
        {"budget": "mass", "mass": 0.6},
        {"select": "threshold", "threshold": "exact", "tau": 0.5},
    ],
    ids=str,
)
def test_what_needs_all_scores_first_chooses_by_shares_in_c_plus_plus(options, monkeypatch):
    q, k, v = close_qkv(TEXT, 16)
    method = Piecewise(score="pooled", block_q=16, block_k=16, **options)
    plain = method.plan_for(q, k, v, video=TEXT, kernel="gather")
    asked = []
    run = native.shares
    monkeypatch.setattr(native, "shares", lambda *a, **b: asked.append(a) or run(*a, **b))
    plan = method.plan_for(q, k, v, video=TEXT)
    held = plan.real.view(-1, plan.block_q).any(-1)
    assert asked
    assert torch.equal(plan.keep[:, :, held], plain.keep[:, :, held])


@pytest.mark.parametrize(
    "options",
    [
        {"budget": "head"},
        {"alike": 0.5},
        {"score": "mean"},
        {"rest": None},
        {"centre": "key"},
        {"select": "threshold"},
        {"block_q": 512, "block_k": 512, "tile": "raster"},
    ],
    ids=str,
)
def test_elsewhere_a_plan_comes_first(options):
    q, k, v = close_qkv(PLAIN, 16)
    method = Piecewise(**({"critical": 0.2} if "select" not in options else {}), **options)
    with pytest.raises(AssertionError, match="a plan first"):
        method(q, k, v, video=PLAIN, kernel=Noted(0.25))


def test_where_a_gradient_is_needed_a_plan_comes_first():
    q, k, v = close_qkv(PLAIN, 16)
    method = Piecewise(0.2, block_q=16, block_k=16)
    with pytest.raises(AssertionError, match="a plan first"):
        method(q.requires_grad_(), k, v, video=PLAIN, kernel=Noted(0.25))
    out = gen_accel.attention(q, k, v, video=PLAIN, method=method)
    with torch.no_grad():
        torch.testing.assert_close(
            out, gen_accel.attention(q, k, v, video=PLAIN, method=method), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same_blocks(threads):
    q, k, v = close_qkv(TEXT, 16)
    method, kernel = Piecewise(0.2, block_q=16, block_k=16), Noted(0.25)
    one = method(q, k, v, video=TEXT, kernel=kernel)
    keep, before = kernel.plan.keep, torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        many = method(q, k, v, video=TEXT, kernel=kernel)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(kernel.plan.keep, keep)
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("int8_kernel")
@pytest.mark.parametrize("kernel", ["native", "int8"])
def test_scores_of_any_size_and_nan(kernel):
    q, k, v = close_qkv(PLAIN, 16)
    method = Piecewise(0.2, block_q=16, block_k=16)
    run = partial(gen_accel.attention, k=k, v=v, video=PLAIN, method=method, kernel=kernel)
    huge = run(q * 1e4)
    assert torch.isfinite(huge).all()
    q[0, 0, 5, 3] = torch.nan
    out = run(q)
    assert out[0, 0, 5].isnan().all()
    assert not out[1].isnan().any()
