"""The obligations of every operator in Triton: the rules of torch; views read where they lie."""

import importlib
import pkgutil

import pytest
import torch
from support.triton_plans import inputs, routed_plan

from gen_accel.kernels import triton as package
from gen_accel.kernels.triton import lists
from gen_accel.plan import Plan

pytestmark = pytest.mark.usefixtures("poison", "untuned")

for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
    importlib.import_module(module.name)  # which registers its operators

OPS = torch.ops.gen_accel
HEADS, SLOTS, BLOCK = 2, 32, 16


def small_plan(device):
    """Two blocks of tokens out of order, three slots padding; one pair of blocks is left out."""
    g = torch.Generator().manual_seed(0)
    order = torch.full((SLOTS,), -1)
    order[: SLOTS - 3] = torch.randperm(SLOTS - 3, generator=g)
    keep = torch.tensor([[1, 1], [1, 0]], dtype=torch.bool)[None, None]
    return Plan(order, keep, BLOCK, BLOCK).to(device)


def of_plan(device, make):
    plan = small_plan(device)
    return make(plan, inputs(plan, torch.float32, heads=HEADS))


def attention(device):
    return of_plan(device, lambda plan, qkv: (*qkv, *lists.prepare(plan), 0.3))


def int8(device):
    """Lists of the rows alone, without a gradient, and the output as narrow as q."""

    def of(plan, qkv):
        made = lists.prepare(plan)
        sizes = plan.block_q, plan.block_k, 0.3, False
        return *qkv, made.slots, made.rows, made.row_counts, made.rule, made.gain, *sizes

    return of_plan(device, of)


def continued(device):
    def of(plan, qkv):
        made = lists.prepare(plan)
        given = made.slots, made.rows, made.row_counts, made.rule, made.gain
        sizes = plan.block_q, plan.block_k, made.raster, 0.3, False
        return qkv[0].flip(2), torch.zeros(qkv[0].shape[:3], device=device), *qkv, *given, *sizes

    return of_plan(device, of)


def gathered(device):
    plan = routed_plan(device, 1, HEADS, BLOCK, BLOCK)
    route = plan.partial
    q, k, v = inputs(plan, torch.float32)
    return q, k, v, plan.slots, route.picks, route.group, BLOCK, 0.3


def rest(device):
    def make(plan, qkv):
        q = qkv[0]
        rise, weight = torch.ones(q.shape[:3], device=device), q[:, :, 0].square() + 1
        keep = plan.keep.expand(*q.shape[:2], -1, -1)
        given = keep, plan.slots_int32, *plan.held, rise, weight, *[None] * 5
        return *qkv, *given, BLOCK, BLOCK, True, 0.3, 0.01

    return of_plan(device, make)


def curve(device):
    def make(plan, qkv):
        return *qkv[:2], plan.slots_int32, plan.tokens, BLOCK, BLOCK, 0.3

    return of_plan(device, make)


def slope(device):
    def make(plan, qkv):
        return qkv[0].flip(2), *qkv, plan.slots_int32, BLOCK, BLOCK, True, 0.01

    return of_plan(device, make)


def slope_state(device):
    return of_plan(device, lambda plan, qkv: (*qkv[1:], plan.slots_int32, BLOCK))


def linear(device):
    def make(plan, qkv):
        sets = plan.keep.expand(1, HEADS, -1, -1)
        return *(x.abs() for x in qkv), plan.slots_int32, sets, BLOCK, BLOCK, 1e-5, 0

    return of_plan(device, make)


def spread(device):
    def make(plan, qkv):
        return qkv[0][:, :, :2].contiguous(), qkv[1], plan.slots_int32, BLOCK, 0.3

    return of_plan(device, make)


def block_sums(device):
    return of_plan(device, lambda plan, qkv: (qkv[0], plan.slots_int32, BLOCK, True))


def block_deviations(device):
    return of_plan(device, lambda plan, qkv: (qkv[0], plan.slots_int32, BLOCK))


def block_facts(device):
    return of_plan(
        device, lambda plan, qkv: (*qkv, plan.slots_int32, plan.tokens, BLOCK, BLOCK, 0.3)
    )


def block_lists(device):
    keep = small_plan(device).keep
    return keep, keep & False, 4


def select(device):
    """Of the second of two heads."""
    scores = torch.tensor([[1.0, 3, 2], [4, 4, 4]], device=device)[None, None]
    kinds = torch.tensor([[2, 2, 6], [3, 2, 6]], dtype=torch.uint8, device=device)
    before = torch.tensor([[0, 0], [0, 1]], dtype=torch.int32, device=device)
    keep = torch.zeros(1, HEADS, 2, 3, dtype=torch.bool, device=device)
    index = torch.zeros(1, HEADS, 5, dtype=torch.int32, device=device)
    counts = torch.zeros(1, HEADS, 2, 4, dtype=torch.int32, device=device)
    return scores, None, kinds, before, None, keep, index, counts, 1, 2


def least_taken(device):
    keys = torch.arange(40, dtype=torch.int32, device=device).view(2, 20)
    return keys, torch.tensor([3, 7], device=device), False


# Operator and its arguments, and whether it has a gradient.
TABLE = {
    "triton_attention": (attention, True),
    "triton_int8": (int8, False),
    "triton_continued": (continued, False),
    "triton_gathered": (gathered, True),
    "triton_rest": (rest, True),
    "triton_curve": (curve, True),
    "triton_slope": (slope, True),
    "triton_slope_state": (slope_state, False),
    "triton_linear_sets": (linear, True),
    "triton_spread": (spread, False),
    "triton_block_sums": (block_sums, False),
    "triton_block_deviations": (block_deviations, False),
    "triton_block_facts": (block_facts, False),
    "triton_block_lists": (block_lists, False),
    "triton_least_taken": (least_taken, False),
    "triton_select": (select, False),
}


def is_rows(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim == 4


def leaves(given):
    """The arguments, with a gradient recorded of rows of tokens."""
    return [x.detach().requires_grad_() if is_rows(x) else x for x in given]


DIFFERENTIABLE = [name for name, (_, has_gradient) in TABLE.items() if has_gradient]


@pytest.mark.turns(5)
@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_it_obeys_the_rules_of_torch(name, device):
    make, has_gradient = TABLE[name]
    given, checks = make(device), ["test_schema", "test_faketensor"]
    if has_gradient:
        given = leaves(given)
        checks.append("test_autograd_registration")
    torch.library.opcheck(getattr(OPS, name).default, tuple(given), test_utils=checks)


@pytest.mark.turns(5)
@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_views_are_read_where_they_lie(name, device):
    """Of models, (B, N, H, D) with two axes swapped; outputs and gradients bit for bit."""
    plain = TABLE[name][0](device)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) if is_rows(x) else x for x in plain]
    results = []
    for given in (plain, swapped):
        given = leaves(given)
        out, *others = getattr(OPS, name)(*given)
        grads = torch.autograd.grad(out.square().sum(), [x for x in given if is_rows(x)])
        results.append([x.detach() for x in (out, *others, *grads)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_every_operator_is_here():
    known = torch._C._dispatch_get_all_op_names()
    names = {name.split("::")[1] for name in known if name.startswith("gen_accel::triton_")}
    assert {name for name in names if not name.endswith("_backward")} == TABLE.keys()
