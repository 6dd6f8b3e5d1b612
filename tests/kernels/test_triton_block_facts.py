"""Our Triton kernels for facts of blocks, held to torch; interpreted on the CPU."""

import pytest
import torch
from support.checks import assert_no_worse
from support.launches import Launches, record
from support.triton_plans import inputs

from gen_accel import Piecewise, VideoShape
from gen_accel.functional import attention
from gen_accel.kernels import choosing, dispatch, rest, rest_cost, run
from gen_accel.kernels.triton import block_facts
from gen_accel.plan import Plan, Rest, pack, unpack

pytestmark = pytest.mark.usefixtures("poison", "untuned")

SCALE, SLOTS = 0.3, 144
VIDEO = VideoShape(2, 6, 8, text=7)
METHOD = Piecewise(0.2, score="loss", block_q=32, block_k=16)


def plan_of(device, block_q=24, block_k=12, counts="all"):
    """Tokens in any order but for the last ones, a text, in blocks of their own that padding ends.
    The first block of queries and that of keys are padding."""
    g = torch.Generator().manual_seed(0)
    block = max(block_q, block_k)
    slots, tokens = torch.full((SLOTS,), -1), SLOTS - 2 * block
    slots[block:-block] = torch.randperm(tokens, generator=g)
    slots[-block:-5] = torch.arange(tokens, tokens + block - 5)
    keep = torch.ones(1, 1, SLOTS // block_q, SLOTS // block_k, dtype=torch.bool)
    order = Rest("query", "second", {"all": None, "video": tokens, "none": 0}[counts])
    return Plan(slots, keep, block_q, block_k, rest=order).to(device)


def facts_of(q, k, v, plan):
    assert plan.rest is not None
    return block_facts.facts_of(q, k, v, plan, plan.rest, scale=SCALE)


def by_torch(tensors, dtype, plan):
    """Facts in the order of `BlockFacts`; the common key is any, and 0 here. In fp32, offsets of
    keys are rounded for the state as products take them."""
    q, k, v = (x.to(dtype) for x in tensors)
    query, key = (
        (pack(x, plan) * plan.real[:, None]).unflatten(2, (-1, block)).sum(3)
        / plan.real.view(-1, block, 1).sum(1).clamp_min(1)
        for x, block in ((q, plan.block_q), (k, plan.block_k))
    )
    rise, weight = rest.plain_curve(q, k, plan, SCALE)
    off = rest._off_means(pack(k, plan), plan, plan.block_k)
    squares = unpack((off.square() * weight[:, :, None]).sum(-1, keepdim=True), plan)[..., 0]
    made = choosing.block_deviations(v, plan, plan.block_k, "gather")
    if dtype == torch.float32:
        off = off.to(tensors[0].dtype).float()
    return query, key, made, rise, weight, squares, key[:, :, 0] * 0, off.mT @ pack(v, plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocks", "dtype", "dim", "counts"),
    [
        ((24, 12), torch.float32, 24, "all"),
        ((12, 36), torch.float32, 40, "video"),  # key blocks of three tiles, two chunks
        ((36, 24), torch.bfloat16, 40, "video"),
        ((24, 24), torch.float16, 16, "all"),
    ],
    ids=str,
)
def test_facts_match_torch(blocks, dtype, dim, counts, device):
    """Also of tokens that are far apart in memory, and of keys that have much in common."""
    plan = plan_of(device, *blocks, counts=counts)
    swapped = (x.transpose(1, 2).contiguous() for x in inputs(plan, dtype, dim, batch=2, heads=2))
    q, k, v = (x.transpose(1, 2) for x in swapped)
    made = facts_of(q, k + 5, v - 3, plan)
    low, exact = (by_torch((q, k + 5, v - 3), x, plan) for x in (torch.float32, torch.float64))
    for name, result, *others in zip(made._fields, made, low, exact, strict=True):
        if name == "common":
            assert (result - k.double().mean(2) - 5).abs().max() < 1
        elif name == "state":
            assert_no_worse(result, others[0].to(result.dtype), others[1])
        else:
            some = (x[:, :, 3:] if name == "deviations" else x for x in (result, *others))
            assert_no_worse(*some, factor=4.0)


def test_where_no_block_counts_there_is_no_curve(device):
    plan = plan_of(device, counts="none")
    q, k, v = inputs(plan, torch.float32)
    made = facts_of(q, k, v, plan)
    for x in (made.rise, made.weight, made.squares, made.common):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.fixture
def triton_alone(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch.build, "is_built", lambda: False)


def drawn(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, VIDEO.tokens, 16, generator=g).to(dtype) for _ in "qkv"]


@pytest.mark.slow
@pytest.mark.usefixtures("triton_alone")
def test_the_choice_hands_facts_on_to_the_rest(monkeypatch):
    """To the last bit what the rest would make, also of some heads at a time."""
    q, k, v = drawn(torch.bfloat16)
    plan = METHOD.plan_for(q, k, v, video=VIDEO, kernel="triton")
    wanted = run(q, k, v, plan, scale=0.25, kernel="triton")
    monkeypatch.setattr(rest, "WIDE", 4 * q.numel() // 2)
    made, own = [], block_facts.facts_of
    monkeypatch.setattr(
        block_facts, "facts_of", lambda *given, **more: made.append(0) or own(*given, **more)
    )
    out = attention(q, k, v, video=VIDEO, method=METHOD, kernel="triton")
    assert len(made) == 1
    assert torch.equal(out, wanted)


@pytest.mark.slow
@pytest.mark.usefixtures("triton_alone")
def test_a_call_makes_facts_in_four_launches(monkeypatch):
    def call():
        return attention(*drawn(), video=VIDEO, method=METHOD, kernel="triton")

    call()  # what is made once
    counted = Launches()
    record(monkeypatch, counted)
    with torch.no_grad(), counted:
        call()
    of_facts = "block_squares", "slope_parts", "head_facts", "weighed_squares"
    assert [counted.done[f"{name}_kernel"] for name in of_facts] == [1] * 4
    assert not {"sums_kernel", "common_kernel", "aten::sum"} & {*counted.done}
    assert (
        sum(work.launches for work in rest_cost.facts(rest_cost.Problem(2, VIDEO.tokens, 16))) == 4
    )
    assert counted.waits == []
    assert counted.random == []


def test_facts_serve_the_call_that_they_are_of_and_once(device):
    plan = plan_of(device)
    q, k, v = inputs(plan, torch.float32)
    for given, scale in (((q, k, v.clone()), 0.3), ((q, k, v), 0.2)):
        plan.hand_on(q, k, v, 0.3, "facts")
        assert plan.taken_facts(*given, scale) is None
        assert plan.taken_facts(q, k, v, 0.3) is None
    plan.hand_on(q, k, v, 0.3, "facts")
    assert plan.taken_facts(q, k, v, 0.3) == "facts"


def test_a_call_with_a_gradient_hands_nothing_on(device):
    """Nor one under autocast, whose kernel casts; but one whose gradient is turned off."""
    plan = plan_of(device)
    q, k, v = (x.requires_grad_() for x in inputs(plan, torch.float32))

    def make():
        return rest.block_facts(q, k, v, plan, plan.rest, scale=SCALE, kernel="triton")

    assert make() is None
    with torch.no_grad():
        assert make() is not None
        with torch.autocast(device.type, torch.bfloat16):
            assert make() is None
