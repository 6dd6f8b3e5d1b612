"""Our Triton kernels for the first order of a rest, held to torch; interpreted on the CPU."""

import pytest
import torch
from support.checks import assert_no_worse
from support.launches import Launches, record
from support.triton_plans import inputs

from gen_accel.kernels import rest, rest_cost
from gen_accel.kernels.triton import configs, slope
from gen_accel.plan import Plan, Rest

pytestmark = pytest.mark.usefixtures("poison", "untuned", "several_parts")

SCALE = 0.3


@pytest.fixture
def several_parts(monkeypatch):
    monkeypatch.setattr(configs, "PART_ROWS", 1)


def plan_of(device, centre="query", block_q=24, block_k=12, order="first"):
    """72 slots in any order. The first block of queries and that of keys are padding, and the end
    of the last ones."""
    g = torch.Generator().manual_seed(0)
    slots, empty = torch.full((72,), -1), max(block_q, block_k)
    slots[empty:-5] = torch.randperm(72 - empty - 5, generator=g)
    keep = torch.ones(1, 1, 72 // block_q, 72 // block_k, dtype=torch.bool)
    return Plan(slots, keep, block_q, block_k, rest=Rest(centre, order)).to(device)


def given(plan, dtype, dim=16, batch=1, heads=1):
    """The output of the columns, q, k and v."""
    tensors = inputs(plan, dtype, dim, batch, heads)
    g = torch.Generator().manual_seed(1)
    return [torch.randn(tensors[0].shape, generator=g).to(plan.slots.device), *tensors]


def plain(out, q, k, v, plan, *, scale):
    """All of the softmax is the rest's."""
    total = torch.zeros(out.shape[:3], dtype=out.dtype, device=out.device)
    return rest.plain_slope(out, total - torch.inf, total, q, k, v, plan, scale=scale)


def results(added, plan, tensors, dtype):
    """The output and the gradients of all four tensors, all in q's dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [tensors[0].to(wide).requires_grad_()]
    leaves += [x.detach().to(dtype).requires_grad_() for x in tensors[1:]]
    out = added(*leaves, plan, scale=SCALE)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device)
    grads = torch.autograd.grad((out * weight.view(out.shape)).sum(), leaves)
    assert [x.dtype for x in grads] == [x.dtype for x in leaves]
    return [x.detach().to(dtype) for x in (out, *grads)]


def assert_matches_torch(plan, tensors):
    dtype = tensors[-1].dtype
    exact, low = (results(plain, plan, tensors, x) for x in (torch.float64, dtype))
    actual = results(slope.added, plan, tensors, dtype)
    for result, *others in zip(actual, low, exact, strict=True):
        assert_no_worse(result, *others)


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("centre", "blocks", "dtype", "dim", "shape"),
    [
        ("query", (24, 12), torch.float32, 24, (2, 1)),
        ("key", (12, 36), torch.float32, 64, (1, 1)),  # two tiles in a block, two chunks
        ("query", (36, 12), torch.bfloat16, 40, (1, 2)),
        ("key", (24, 24), torch.float16, 16, (1, 1)),
    ],
    ids=str,
)
def test_outputs_and_gradients_match_torch(centre, blocks, dtype, dim, shape, device):
    plan = plan_of(device, centre, *blocks)
    assert_matches_torch(plan, given(plan, dtype, dim, *shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_tokens_have_in_common_takes_no_digits(dtype, device):
    """Of keys, and around queries of these, whose means are taken off."""
    plan = plan_of(device)
    out, q, k, v = given(plan, dtype)
    assert_matches_torch(plan, [out, q + 20, k + 20, v])


def test_sums_of_a_head_are_the_same_beside_others(device):
    """To the last bit, at any number of heads."""
    plan = plan_of(device)
    tensors = given(plan, torch.float32, heads=2)
    alone = slope.added(*(x[:, :1] for x in tensors), plan, scale=SCALE)
    assert torch.equal(slope.added(*tensors, plan, scale=SCALE)[:, :1], alone)


def test_nothing_waits_and_nothing_is_random(device, monkeypatch):
    plan = plan_of(device)
    plan.tokens, plan.slots_int32  # noqa: B018  (made once)
    tensors = [x.requires_grad_() for x in given(plan, torch.bfloat16, heads=2)]
    modelled = rest_cost.first_order(rest_cost.Problem(2, plan.tokens, 16))
    counted = Launches()
    record(monkeypatch, counted)
    with counted:
        slope.state_of(*tensors[2:], plan)
        forward = counted.count
        out = slope.added(*tensors, plan, scale=SCALE)
        torch.autograd.grad(out.sum(), tensors)
    kernels = {name: times for name, times in counted.done.items() if name.endswith("_kernel")}
    assert forward == sum(work.launches for work in modelled), counted.done
    assert kernels == {
        "slope_parts_kernel": 3,
        "slope_add_kernel": 1,
        "slope_queries_backward_kernel": 1,
        "slope_keys_backward_kernel": 2,
    }
    assert counted.waits == []
    assert counted.random == []
