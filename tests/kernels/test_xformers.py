"""The xformers kernel. Without a GPU, its masks are written out and attended to in plain torch."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from support import xformers as stand_in
from support.checks import assert_no_worse
from support.problems import PLANS, RESTS, assert_gradients_no_worse, random_plan

from gen_accel.attention_processors import BlockMixture, Dense, Neighborhood, Radial
from gen_accel.kernels import facts_of, reference, rest, run, xformers
from gen_accel.plan import Plan, Rest, Route, unpack
from gen_accel.registry import install
from gen_accel.video import VideoShape

pytestmark = pytest.mark.usefixtures("poison")

EVEN, RAGGED, TEXT = VideoShape(4, 8, 8), VideoShape(5, 9, 10), VideoShape(3, 7, 5, text=13)

# Windows as large as their stride fall into groups that do not see each other.
GROUPED = [
    pytest.param(Dense().plan(RAGGED), id="dense, padded"),
    pytest.param(Dense().plan(TEXT), id="dense, text"),
    pytest.param(Neighborhood((-1, -1, -1)).plan(RAGGED), id="whole axes"),
    pytest.param(Neighborhood((2, 4, 4), stride=(2, 4, 4)).plan(EVEN), id="a window a group"),
    pytest.param(Neighborhood((-1, 4, 4), stride=(1, 4, 4)).plan(EVEN), id="all frames a group"),
    pytest.param(
        Neighborhood((2, 8, 8), stride=(2, 8, 8)).plan(VideoShape(4, 16, 16)),
        id="many blocks a group",
    ),
]
COPIED = [
    pytest.param(
        Neighborhood((2, 4, 4), stride=(2, 4, 4)).plan(VideoShape(4, 8, 8, 13)), id="text"
    ),
    pytest.param(Radial(block=32).plan(RAGGED), id="radial"),
    pytest.param(Radial("paper", block=16).plan(TEXT), id="radial of the paper, text"),
    pytest.param(Radial("code-2025-11", sink=False, block=24).plan(TEXT), id="radial, raster"),
]
RANDOM = [
    pytest.param(random_plan("cpu", **options.values[0]), id=options.id)
    for options in PLANS
    if "windows" not in options.values[0]
]
ALL = GROUPED + COPIED + RANDOM


@pytest.fixture
def library():
    return pytest.importorskip("xformers.ops.fmha", reason="needs xformers", exc_type=ImportError)


def written_out(q, k, v, attn_bias):
    """What xformers computes, from the mask as a matrix."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    mask = attn_bias.materialize((q.shape[2], k.shape[2]), dtype=wide)
    weights = (0.3 * q.to(wide) @ k.to(wide).transpose(-1, -2) + mask).softmax(-1)
    return (weights @ v.to(wide)).to(q.dtype).transpose(1, 2), None


def on_paper(plan):
    return lambda q, k, v: xformers.over_runs(q, k, v, plan, written_out)[0]


def by_reference(plan):
    return lambda q, k, v: reference.kernel.forward(q, k, v, plan, scale=0.3)


def samples(plan):
    """How many the kernel sees at batch 2 and 2 heads."""
    return 4 if plan.keep.shape[1] > 1 else 2


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("plan", ALL)
def test_the_masks_hold_exactly_the_pairs_of_the_plan(plan):
    n, N = samples(plan), plan.tokens
    found = torch.zeros(n * N, n * N)
    for query, key, mask in xformers._runs(plan, n).parts:
        open_pairs = mask.materialize((len(query), len(key))) == 0
        where = query[:, None].expand(open_pairs.shape), key.expand(open_pairs.shape)
        found.index_put_(where, open_pairs.float(), accumulate=True)
    pairs = unpack(unpack(reference.pairs(plan), plan).mT, plan).mT
    pairs = pairs.expand(2, 2, N, N)[:, : n // 2].flatten(0, 1)
    assert torch.equal(found, torch.block_diag(*pairs.float()))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("plan", GROUPED)
def test_groups_are_put_in_order_and_nothing_is_copied(plan):
    (part,) = xformers._runs(plan, 2).parts
    every_token = torch.arange(2 * plan.tokens)
    assert torch.equal(part.query.sort().values, every_token)
    assert torch.equal(part.key.sort().values, every_token)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", ALL)
def test_forward_matches_reference(plan, dtype, qkv):
    inputs = [x.cpu() for x in qkv(plan.tokens, dtype)]
    exact = by_reference(plan)(*(x.double() for x in inputs))
    assert_no_worse(on_paper(plan)(*inputs), by_reference(plan)(*inputs), exact)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("plan", ALL)
def test_gradient_matches_reference(plan, qkv):
    inputs = [x.cpu() for x in qkv(plan.tokens)]
    assert_gradients_no_worse(on_paper(plan), by_reference(plan), inputs)


@pytest.fixture(params=[True, False], ids=["packed", "run by run"])
def fmha(request, monkeypatch):
    """A library whose operator gives its log-sum-exp in either form."""
    made = stand_in.library(request.param)
    monkeypatch.setattr(xformers, "_fmha", lambda: made)
    monkeypatch.setattr(xformers, "_operators", lambda *kind: (made.operators, []))


@pytest.mark.usefixtures("fmha")
@pytest.mark.parametrize("keys", [1 << 18, 300], ids="{} keys at once".format)
@pytest.mark.parametrize(
    "options", [{}, {"batch": 2, "heads": 2}, {"heads": 2, "block_q": 8, "block_k": 32}], ids=str
)
def test_the_log_sum_exp_matches_the_reference(options, keys, qkv, monkeypatch):
    monkeypatch.setattr(xformers, "KEYS", keys)
    plan = random_plan("cpu", **options)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.cpu() for x in qkv(plan.tokens, dtype)]
        exact = reference.kernel.forward_lse(*(x.double() for x in inputs), plan, scale=0.3)
        low = reference.kernel.forward_lse(*inputs, plan, scale=0.3)
        out, lse = xformers.kernel.forward_lse(*inputs, plan, scale=0.3)
        assert_no_worse(out, low[0], exact[0])
        dark = exact[1].isneginf()
        assert dark.any()
        assert torch.equal(lse.isneginf(), dark)
        assert_no_worse(*(x.masked_fill(dark, 0.0) for x in (lse, low[1], exact[1])))


@pytest.mark.usefixtures("fmha")
@pytest.mark.parametrize("asked", RESTS)
def test_a_rest_is_added(asked, qkv):
    plan = random_plan("cpu", heads=2, rest=RESTS[asked])
    inputs = [x.cpu() for x in qkv(plan.tokens)]
    found = rest.attention(xformers.kernel, *inputs, plan, scale=0.3, kernel="xformers")
    low = reference.kernel.forward_lse(*inputs, plan, scale=0.3)
    exact = reference.kernel.forward_lse(*(x.double() for x in inputs), plan, scale=0.3)
    for three in zip(found, low, exact, strict=True):
        assert_no_worse(*three)


@pytest.mark.usefixtures("fmha")
def test_a_plan_that_keeps_nothing_has_no_log_sum_exp(qkv):
    plan = Plan(torch.arange(64), torch.zeros(1, 1, 4, 4, dtype=torch.bool), 16, 16)
    out, lse = xformers.kernel.forward_lse(*(x.cpu() for x in qkv(64)), plan, scale=0.3)
    assert (out == 0).all()
    assert lse.isneginf().all()


def test_a_gradient_of_the_log_sum_exp_is_refused(qkv):
    inputs = [x.cpu() for x in qkv(93)]
    said = "its log-sum-exp has no gradient"
    for one, lse in ((None, True), (Rest(), False)):
        plan = random_plan("cpu", rest=one)
        assert said in xformers.kernel.unsupported(facts_of(*inputs, plan, grad=True, lse=lse))
        assert said not in xformers.kernel.unsupported(facts_of(*inputs, plan, lse=lse))


@pytest.mark.usefixtures("library")
def test_the_gradient_of_a_key_that_many_calls_see_is_added_up_in_fp32(qkv, monkeypatch):
    """256 in the middle of 64 halves, each of which bf16 would lose beside it."""
    monkeypatch.setattr(xformers, "KEYS", 2)
    keep = torch.eye(65, dtype=torch.bool)[None, None]
    keep[..., 0] = True
    plan = Plan(torch.arange(65), keep, 1, 1)
    _, k, v = (x.cpu() for x in qkv(65, torch.bfloat16, batch=1, heads=1))
    inputs = torch.zeros_like(k), k, v  # so that a query weighs both of its keys by a half
    weight = torch.ones(65, 1)
    weight[32] = 512

    def gradient(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        return torch.autograd.grad((out * weight.to(dtype)).sum(), leaves[2])[0]

    low = gradient(by_reference(plan), torch.bfloat16)
    exact = gradient(by_reference(plan), torch.float64)
    assert_no_worse(gradient(on_paper(plan), torch.bfloat16), low, exact)


@pytest.mark.usefixtures("library")
def test_the_size_of_a_call_does_not_change_the_answer(qkv, monkeypatch):
    inputs = [x.cpu() for x in qkv(RAGGED.tokens)]
    whole, split = Radial(block=32).plan(RAGGED), replace(Radial(block=32).plan(RAGGED))
    together = on_paper(whole)(*inputs)
    monkeypatch.setattr(xformers, "KEYS", 300)
    apart = on_paper(split)(*inputs)
    assert len(xformers._runs(whole, 2).parts) == 1 < len(xformers._runs(split, 2).parts)
    exact = by_reference(whole)(*(x.double() for x in inputs))
    assert_no_worse(apart, together, exact)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("plan", RANDOM)
def test_a_query_that_sees_nothing_is_zero_and_so_is_its_gradient(plan, qkv):
    inputs = [x.cpu().detach().requires_grad_() for x in qkv(plan.tokens)]
    blind = ~unpack(reference.pairs(plan).any(-1, keepdim=True), plan)[..., 0].expand(2, 2, -1)
    out = on_paper(plan)(*inputs)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    assert blind.any()
    assert (out[blind] == 0).all()
    assert (grads[0][blind] == 0).all()
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.usefixtures("library")
def test_a_plan_that_keeps_nothing_gives_zeros(qkv):
    plan = Plan(torch.arange(64), torch.zeros(1, 1, 4, 4, dtype=torch.bool), 16, 16)
    inputs = [x.cpu().detach().requires_grad_() for x in qkv(64)]
    out = on_paper(plan)(*inputs)
    assert (out == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.usefixtures("library")
def test_a_plan_met_while_sampling_serves_training(qkv):
    plan = replace(Radial(block=32).plan(EVEN))
    inputs = [x.cpu() for x in qkv(plan.tokens)]
    with torch.inference_mode():
        on_paper(plan)(*inputs)
    assert_gradients_no_worse(on_paper(plan), by_reference(plan), inputs)


WHOLE = Dense().plan(EVEN)


def routed(cut):
    """Every query picks both groups of keys, but for the first where it is `cut`."""
    picks = torch.ones(1, 1, 256, 2, dtype=torch.bool)
    picks[:, :, 0, 0] = not cut
    rule = Route(picks, torch.arange(4) // 2, 64)
    return Plan(torch.arange(256), torch.ones(1, 1, 2, 4, dtype=torch.bool), 128, 64, rule)


REASONS = {
    "device": (WHOLE, {}, "runs on CUDA only, got cpu"),
    "dtype": (WHOLE, {"dtype": torch.float64}, "bfloat16 and float32, got torch.float64"),
    "dim": (WHOLE, {"dim": 20}, "multiple of 8, got 20"),
    "windows": (Neighborhood((2, 3, 3)).plan(EVEN), {}, "a rule on token pairs cuts"),
    "route": (routed(cut=True), {}, "a rule on token pairs cuts 2 of those kept"),
}


@pytest.mark.parametrize(("plan", "options", "words"), REASONS.values(), ids=REASONS)
def test_what_it_cannot_run_is_refused_with_the_reason(plan, options, words, qkv):
    inputs = [x.cpu() for x in qkv(256, **options)]
    assert words in "; ".join(xformers.kernel.unsupported(facts_of(*inputs, plan)))
    with pytest.raises(ValueError, match="xformers: "):
        run(*inputs, plan, scale=0.3, kernel="xformers")


def test_a_plan_made_for_one_call_is_refused(qkv):
    kernel = partial(run, scale=0.3, kernel="xformers")
    with pytest.raises(ValueError, match="this one is for a single call"):
        BlockMixture()(*qkv(EVEN.tokens), video=EVEN, kernel=kernel)


@pytest.mark.parametrize("plan", [*GROUPED, *COPIED, routed(cut=False)])
def test_a_rule_that_excludes_nothing_is_no_reason(plan, qkv):
    facts = facts_of(*(x.cpu() for x in qkv(plan.tokens)), plan)
    reasons = "; ".join(xformers.kernel.unsupported(facts))
    assert "token pairs" not in reasons


def test_a_missing_library_is_a_reason_and_no_error(monkeypatch, qkv):
    monkeypatch.setitem(sys.modules, "xformers", None)
    reasons = xformers.kernel.unsupported(facts_of(*qkv(256), WHOLE))
    assert reasons[0] == f"xformers is not installed: {install('xformers')}"


@pytest.mark.usefixtures("library")
def test_xformers_own_reasons_are_passed_on():
    operators, reasons = xformers._operators(64, torch.float32, torch.device("cpu"), True, False)
    assert operators is None
    assert len(reasons) == len(xformers.OPERATORS)
    assert all("device=cpu" in reason for reason in reasons)


@pytest.mark.gpu
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", ALL)
def test_xformers_matches_reference(plan, dtype, qkv):
    plan = plan.to(torch.device("cuda"))
    inputs = qkv(plan.tokens, dtype, dim=64, grad=True)
    if reasons := xformers.kernel.unsupported(facts_of(*inputs, plan)):
        pytest.skip("; ".join(reasons))

    def results(function, kind):
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = function(*leaves)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    exact, low = (results(by_reference(plan), kind) for kind in (torch.float64, dtype))
    actual = results(lambda q, k, v: xformers.kernel.forward(q, k, v, plan, scale=0.3), dtype)
    for x, y, z in zip(actual, low, exact, strict=True):
        assert_no_worse(x, y, z)
