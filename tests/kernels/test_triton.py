"""Our Triton kernels: interpreted on the CPU, see conftest.py, compiled if there is CUDA."""

import ast
import json
import sys
from pathlib import Path

import autotune
import pytest
import torch
import torch.nn.functional as F
from support.checks import assert_no_worse
from support.interpreter import run_python
from support.methods import CASES, TESTED
from support.problems import blind, random_plan
from support.products import NIGHTLY, in_turns
from support.triton_plans import (
    PLANS,
    assert_matches_reference,
    differentiated,
    inputs,
    odd_plan,
    routed_plan,
)

from gen_accel.functional import attention
from gen_accel.kernels import Facts, dispatch, facts_of
from gen_accel.kernels import triton as package
from gen_accel.kernels.choosing import block_deviations, block_spread
from gen_accel.kernels.triton import (
    block_sparse,
    configs,
    launch,
    linear,
    listing,
    lists,
    rest,
    sparse_backward,
    tuned,
)
from gen_accel.kernels.triton.linear import linear_sets
from gen_accel.plan import Plan, slots_of
from gen_accel.video import VideoShape

forward_lse = package.kernel.forward_lse

pytestmark = pytest.mark.usefixtures("poison", "untuned")

# As in conftest.py, for the interpreter.
SMALL = [VideoShape(3, 4, 8), VideoShape(3, 5, 6), VideoShape(3, 5, 5, text=9)]
if NIGHTLY:
    SMALL = [VideoShape(3, 8, 8), VideoShape(3, 7, 9), VideoShape(3, 7, 5, text=13)]

QUICK = list(PLANS)[:4]
OTHERS = ("windows", "route, small key blocks")  # by day
REST = [name for name in PLANS if name not in QUICK and (NIGHTLY or name in OTHERS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK + REST)
def test_outputs_and_gradients_match_reference(name, device):
    plan = PLANS[name](device)
    assert_matches_reference(plan, inputs(plan, torch.float32), lse_weight=0.1)


# By day the last case of each method.
SOME_CASES = [row.cases[-1] for row in TESTED.values()]

# By day each dtype on half of the small plans and bf16 on one of the others.
LOW = [(name, dtype) for name in PLANS for dtype in (torch.bfloat16, torch.float16)]
SOME_LOW = [*in_turns(QUICK[:3], (torch.bfloat16, torch.float16))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), LOW if NIGHTLY else SOME_LOW, ids=str)
def test_low_precision_matches_reference(name, dtype, device):
    plan = PLANS[name](device)
    assert_matches_reference(plan, inputs(plan, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (1, torch.float32),
        (48, torch.float32),
        (64, torch.bfloat16),
        (80, torch.float16),
        pytest.param(256, torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_any_head_dim(dim, dtype, device):
    plan = random_plan(device, block_q=32, block_k=16)
    assert_matches_reference(plan, inputs(plan, dtype, dim), scale=dim**-0.5)


@pytest.mark.parametrize("scale", [-0.3, pytest.param(0.0, marks=pytest.mark.slow)])
def test_any_scale(scale, device):
    plan = random_plan(device, block_q=32, block_k=32)
    assert_matches_reference(plan, inputs(plan, torch.float32), scale=scale)


@pytest.mark.slow
def test_views_are_read_in_place_and_answered_in_kind(device):
    """Models hand over (B, N, H, D) with two axes swapped, three views of one tensor."""
    plan = random_plan(device, block_q=32, block_k=32)
    plain = inputs(plan, torch.float32, heads=2)
    fused = torch.stack([x.transpose(1, 2) for x in plain], dim=3)
    views = [x.transpose(1, 2) for x in fused.unbind(3)]
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    wanted = differentiated(lambda *x: forward_lse(*x, plan, scale=0.3), plain, None)
    for given in (views, swapped):
        actual = differentiated(lambda *x: forward_lse(*x, plan, scale=0.3), given, None)
        assert all(torch.equal(x, y) for x, y in zip(actual, wanted, strict=True))
    copies = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            copies.append(func.name())
            return func(*args, **kwargs or {})

    prepared = lists.prepare(plan)
    with torch.no_grad(), Watch():
        out, _ = torch.ops.gen_accel.triton_attention(*swapped, *prepared, 0.3)
    assert out.stride() == swapped[0].stride()
    assert copies == ["gen_accel::triton_attention"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["windows, small key blocks", "batch, small key blocks"])
def test_a_row_that_sees_nothing_is_zero_and_so_is_its_gradient(name, device):
    plan = PLANS[name](device)
    dark = blind(plan)
    assert dark.any()
    q, k, v = (x.requires_grad_() for x in inputs(plan, torch.float32, batch=2, heads=2))
    out, lse = forward_lse(q, k, v, plan, scale=0.3)
    assert (out[dark] == 0).all()
    assert torch.equal(lse == -torch.inf, dark)
    # As when two parts are merged by their logsumexp, the gradient at -inf is no number.
    given = torch.ones_like(lse).masked_fill(dark, torch.nan)
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), given))
    assert (grads[0][dark] == 0).all()
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "video"), in_turns(CASES if NIGHTLY else SOME_CASES, SMALL[::-1]), ids=str
)
def test_every_method_matches_reference(method, qkv, video):
    def by(name):
        given = {"video": video, "method": method, "kernel": name}
        return lambda q, k, v: (attention(q, k, v, **given), q.sum(-1))

    # Of one head alone the largest error of the reference is a matter of luck.
    inputs = qkv(video.tokens, batch=1, heads=3)
    exact, low = (differentiated(by("reference"), inputs, x) for x in (torch.float64, None))
    for result, *others in zip(
        differentiated(by("triton"), inputs, None), low, exact, strict=True
    ):
        assert_no_worse(result, *others)


def test_a_plan_that_keeps_nothing_gives_zeros(device):
    keep = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    plan = Plan(torch.arange(64), keep, 32, 32).to(device)
    results = differentiated(
        lambda *x: forward_lse(*x, plan, scale=0.3),
        inputs(plan, torch.float32),
        None,
    )
    assert (results.pop(1) == -torch.inf).all()
    assert all((result == 0).all() for result in results)


def test_nan_in_blocks_that_are_not_seen_goes_nowhere(device):
    """Neither token 0, which padding might be mistaken for, nor a dropped block is read."""
    slots = torch.cat([torch.arange(60), torch.full((4,), -1)])
    keep = torch.eye(4, dtype=torch.bool)[None, None]
    plan = Plan(slots, keep, 16, 16).to(device)
    q, k, v = inputs(plan, torch.float32)
    for x in (q, k, v):
        x[:, :, :16] = torch.nan
    results = differentiated(lambda *x: forward_lse(*x, plan, scale=0.3), (q, k, v), None)
    assert all(torch.isfinite(result[:, :, 16:]).all() for result in results)


def test_a_dynamic_plan_does_without_columns_while_generating(device):
    plan = routed_plan(device)
    with torch.no_grad():
        assert lists.prepare(plan).columns is None
    assert lists.prepare(plan).columns is not None


def assert_lists(keep, whole, index, counts):
    """Each row has a list of its own of what it keeps, masked blocks first, in order."""
    patterns = zip(*(x.flatten(0, 1).tolist() for x in (keep, whole, index, counts)), strict=True)
    for kept, full, entries, numbers in patterns:
        ends = 0
        assert sorted(turn for *_, turn in numbers) == list(range(len(numbers)))
        for row, of_row, (masked, total, start, _) in zip(kept, full, numbers, strict=True):
            held = [i for i, seen in enumerate(row) if seen]
            some = [i for i in held if not of_row[i]]
            assert start == (ends if total else 0)
            start = ends
            ends += total
            assert entries[start:ends] == some + [i for i in held if i not in some]
            assert masked == len(some)


def test_lists_hold_each_kept_block_once_masked_ones_first(device):
    plan = random_plan(device, 2, 2, 32, 8, windows=True)
    made = lists.prepare(plan)
    assert made is lists.prepare(plan)
    assert_lists(plan.keep, plan.whole, made.rows, made.row_counts)
    assert_lists(plan.keep.mT, plan.whole.mT, made.columns, made.column_counts)
    total = made.row_counts[..., 1]
    assert (total.gather(-1, made.row_counts[..., 3].long()).diff() <= 0).all(), "longest first"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 40, 70), (1, 2, 33, 129)], ids=str)
def test_lists_by_counting_hold_what_those_by_sorting_hold(shape, device):
    generator = torch.Generator().manual_seed(0)
    keep, whole = (torch.rand(shape, generator=generator).to(device) < p for p in (0.3, 0.5))
    whole = whole[:, :, :1].expand(shape) & keep
    for kept, full in ((keep, whole), (keep.mT, whole.mT)):
        made = listing.block_lists(kept, full, shape[2] * shape[3])
        assert_lists(kept, full, *made)
        index, counts = lists.listed(kept & ~full, kept)
        assert_lists(kept, full, index, counts)
        assert torch.equal(made[1][..., :3], counts[..., :3])
        tight = listing.block_lists(kept, full, index.shape[2])
        assert_lists(kept, full, *tight)


def test_tiles_waste_little():
    wanted = {1: 16, 16: 16, 36: 64, 57: 64, 72: 128, 128: 128, 129: 64, 455: 128, 4096: 128}
    assert {block: configs.tile(block, 128) for block in wanted} == wanted


@pytest.mark.slow
def test_a_compiled_function_sees_one_operator(device):
    plan = odd_plan(device, 16, 32, 64)
    prepared = lists.prepare(plan)
    tensors = inputs(plan, torch.float32)

    def block(q, k, v):
        out, _ = torch.ops.gen_accel.triton_attention(q * 1.5, k, v, *prepared, 0.3)
        return 2 * out, q.sum(-1)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(
        differentiated(compiled, tensors, None), differentiated(block, tensors, None), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def plain_sets(phi_q, phi_k, v, slots, sets, block_q, block_k, eps):
    given = sets.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)
    places = torch.argsort(slots)[len(slots) - phi_q.shape[2] :]
    given = given[..., places, :][..., places]
    weights = (phi_q @ phi_k.mT) * given
    out = weights @ v / (weights.sum(-1, keepdim=True) + eps)
    return torch.where(given.any(-1, keepdim=True), out, 0.0)


def linear_inputs(dtype, device, slots, dim, block_q, block_k, heads=2):
    """Softmax features of tokens in any order, five slots padding, and an empty set for the first
    query block. Returns q, k and v, with heads inmost but one, and the slots and the sets."""
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(2, slots - 5, heads, dim, generator=g).to(device) for _ in range(3)]
    phi_q, phi_k, v = (y.transpose(1, 2) for y in (x[0].softmax(-1), x[1].softmax(-1), x[2]))
    order = torch.randperm(slots, generator=g)
    order = torch.where(order < slots - 5, order, -1).int().to(device)
    shape = 2, 1, slots // block_q, slots // block_k
    sets = (torch.rand(shape, generator=g) < 0.5).to(device)
    sets[:, :, 0] = False
    return [phi_q.to(dtype), phi_k.to(dtype), v.to(dtype)], (order, sets)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "slots", "dim", "block_q", "block_k"),
    [
        (torch.float32, 72, 16, 36, 24),
        pytest.param(torch.bfloat16, 128, 48, 64, 32, marks=pytest.mark.slow),
        pytest.param(torch.float32, 96, 80, 96, 8, marks=pytest.mark.nightly),
        pytest.param(torch.float16, 160, 64, 40, 80, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_linear_branch_matches_its_definition(dtype, slots, dim, block_q, block_k, device):
    heads = 2 if dtype == torch.float32 else 1
    tensors, sets = linear_inputs(dtype, device, slots, dim, block_q, block_k, heads)
    given = *sets, block_q, block_k, 1e-5

    def both(function):
        return lambda *x: (function(*x, *given), x[0].sum(-1))

    exact = differentiated(both(plain_sets), tensors, torch.float64)
    low = differentiated(both(plain_sets), tensors, dtype)
    actual = differentiated(both(linear_sets), tensors, dtype)
    first = sets[0][:block_q].long()
    assert (actual[0][:, :, first[first >= 0]] == 0).all()
    for result, *others in zip(actual, low, exact, strict=True):
        assert_no_worse(result, *others)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["none", "all"])
def test_linear_branch_of_all_and_nothing(share, device):
    tensors, sets = linear_inputs(torch.float32, device, 64, 16, 16, 32)
    given = sets[0], torch.full_like(sets[1], bool(share)), 16, 32
    out = linear_sets(*tensors, *given, 0.0)
    torch.testing.assert_close(out, plain_sets(*tensors, *given, 0.0).nan_to_num(0.0))


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["softmax", "elu", "relu"])
def test_features_are_made_where_they_are_used(feature, device):
    """As torch makes them, with a head dim that is no power of two and rows of padding."""
    (q, k, v), (slots, sets) = linear_inputs(torch.float32, device, 96, 24, 16, 32)
    q, k = q * 30 - 1, k * 30 - 1
    made = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": F.relu}
    fq, fk = made[feature](q), made[feature](k)
    want = linear_sets(fq, fk, v, slots, sets, 16, 32, 1e-5)
    out = linear_sets(q, k, v, slots, sets, 16, 32, 1e-5, feature)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_linear_branch_is_one_operator_in_a_graph(device):
    tensors, sets = linear_inputs(torch.float32, device, 64, 16, 16, 32)

    def block(*x):
        return 2 * linear_sets(*x, *sets, 16, 32, 1e-5), x[0].sum(-1)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(
        differentiated(compiled, tensors, None), differentiated(block, tensors, None), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_tuning_keeps_what_later_calls_take(device):
    plan = Plan(torch.arange(32), torch.ones(1, 1, 1, 1, dtype=torch.bool), 32, 32).to(device)
    q, k, v = inputs(plan, torch.float32, batch=1, heads=1)
    found = autotune.tune(q, k, v, plan, scale=0.3)
    assert [name.split("/")[1] for name in found] == ["forward", "dq", "dkdv"]
    assert json.loads(tuned.path().read_text()) == {k: list(v) for k, v in found.items()}
    assert list(tuned.path().parent.iterdir()) == [tuned.path()]
    name = next(iter(found))
    tuned.write({name: [16, 64, 4, 1]})
    assert configs.choose("forward", q, 32, 32, ruled=False) == (16, 64, 4, 1)
    assert configs.choose("forward", q, 32, 32, ruled=True) == configs.INTERPRETED
    assert len(tuned.read()) == 3
    assert_matches_reference(plan, [q, k, v])


@pytest.mark.slow
def test_every_launch_is_on_the_device_of_its_tensor(device, monkeypatch):
    """Forward and backward of both operators; nothing is launched in another way."""
    inside, launched = [], []

    class Recorded:
        def __init__(self, x):
            self.x = x

        def __enter__(self):
            inside.append(self.x.device)

        def __exit__(self, *raised):
            inside.pop()

    class Seen:
        def __init__(self, kernel):
            self.kernel, self.__name__ = kernel, kernel.__name__

        def __getitem__(self, programs):
            launched.append((self.kernel.__name__, inside[-1]))
            return self.kernel[programs]

    own = launch.launch
    monkeypatch.setattr(launch, "device_of", Recorded)
    for module in (block_sparse, sparse_backward, linear, launch):
        monkeypatch.setattr(module, "launch", lambda kernel, *x, **y: own(Seen(kernel), *x, **y))
    plan = random_plan(device, block_q=32, block_k=32)
    tensors = inputs(plan, torch.float32)
    differentiated(lambda *x: forward_lse(*x, plan, scale=0.3), tensors, None)
    given, sets = linear_inputs(torch.float32, device, 64, 16, 16, 32)
    differentiated(lambda *x: (linear_sets(*x, *sets, 16, 32, 1e-5),) * 2, given, None)
    assert {name for name, _ in launched} == {
        *("forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"),
        *("states_kernel", "sums_kernel", "apply_kernel", "apply_transposed_kernel"),
    }
    assert {place for _, place in launched} == {tensors[0].device}


def test_kernels_are_launched_in_one_place():
    """A kernel in square brackets, called, stands in launch.py alone."""
    for path in Path(package.__file__).parent.glob("*.py"):
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        ]
        assert bool(calls) == (path.name == "launch.py"), path.name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    plan = random_plan(torch.device("cuda:1"), block_q=32, block_k=32)
    assert torch.cuda.current_device() == 0
    assert_matches_reference(plan, inputs(plan, torch.bfloat16))


class TestReasons:
    plan = Plan(torch.arange(64), torch.ones(1, 1, 4, 4, dtype=torch.bool), 16, 16)

    def reasons(self, dim=16, dtype=torch.float32):
        given = [torch.zeros(1, 1, 64, dim, dtype=dtype)] * 3
        return package.kernel.unsupported(facts_of(*given, self.plan))

    def test_interpreted_it_runs_on_the_cpu(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert self.reasons() == []

    def test_all_are_listed(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert self.reasons(257, torch.float64) == [
            "needs a GPU; on the CPU only under TRITON_INTERPRET=1",
            "takes bfloat16, float16 and float32, got torch.float64",
            "takes head dims up to 256, got 257",
        ]

    def test_more_heads_than_a_grid_has_programs(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        facts = Facts(((2, 40_000, 64, 16),) * 3, (torch.float32,) * 3, (torch.device("cpu"),) * 3)
        said = ["takes up to 65,535 heads of all samples, got 2 x 40,000"]
        assert package.kernel.unsupported(facts) == said

    def test_what_stands_beside_attention_takes_no_more_either(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        few, many = (torch.zeros(1).expand(2, heads, 4, 16) for heads in (7, 40_000))
        assert dispatch.triton_serves("triton", few)
        assert not dispatch.triton_serves("triton", many)

    def test_heads_of_many_numbers_are_left_to_torch(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(rest, "spread", lambda *given, scale: given[1].shape[3])
        slots = slots_of(torch.arange(16), 16, 16)
        for dim, ours in ((256, True), (257, False)):
            means, k = torch.ones(1, 1, 1, dim), torch.ones(1, 1, 16, dim)
            made = block_spread(means, k, slots, scale=0.1, kernel="triton")
            assert made == dim if ours else made.shape == (1, 1, 1, 1)

    def test_without_triton(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        assert self.reasons() == ["triton is not installed"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [16, 24])
def test_deviations_of_blocks_are_as_in_torch(dim, dtype, monkeypatch):
    """Also of a block that padding fills in part, of one of padding alone, and of equal tokens."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    places = torch.full((64,), -1)
    places[:40] = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    slots = slots_of(places, 16, 16)
    x = torch.randn(2, 3, 40, dim, generator=torch.Generator().manual_seed(1))
    x[0, 0, places[:16]] = 0.3
    x = (x + 2).to(dtype)
    made = block_deviations(x, slots, 16, "triton")
    due = block_deviations(x.double(), slots, 16, "gather")
    assert made.dtype == torch.float32
    assert made.shape == (2, 3, 4)
    torch.testing.assert_close(made[:, :, :3], due[:, :, :3].float(), rtol=0, atol=2e-4)
    floor = 1e-3 * x[0, 0, places[0]].double().norm()
    assert made[0, 0, 0].exp().item() == pytest.approx(floor.item(), rel=1e-4)
    assert made.isfinite().all()


def test_short_blocks_have_configurations_of_their_own():
    def chosen(block, *more):
        return configs.from_table("sm_90", "forward", 128, torch.bfloat16, block, *more)

    assert chosen(128) == configs.TABLE["sm_90"][128][0]
    assert chosen(64) == chosen(57) == configs.SHORT["sm_90", 128][0]
    gained = configs.from_table("sm_80", "forward", 128, torch.bfloat16, 64, True)
    assert gained == configs.WITH_GAIN["sm_80", 128, "forward", True]
    assert configs.cut("dkdv", chosen(128), 32).tile_n == 32


@pytest.mark.slow
def test_the_package_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from gen_accel.kernels import triton\n"
        "assert 'gen_accel.kernels.triton.block_sparse' not in sys.modules\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_it_is_the_first_that_a_process_runs():
    code = (
        "import torch\n"
        "from gen_accel import Radial, VideoShape, attention\n"
        "q = torch.randn(1, 1, 12, 16)\n"
        "given = {'video': VideoShape(3, 2, 2), 'method': Radial(block=16), 'kernel': 'triton'}\n"
        "attention(q, q, q, **given)\n"
    )
    done = run_python("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
