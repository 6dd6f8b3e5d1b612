"""The kernel of FlashAttention-4. Without its GPUs, the tensors that it would get are read by a
stand-in of the same documented semantics."""

import ast
import inspect
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import fa4 as stand_in
from support import wan
from support.checks import assert_no_worse
from support.launches import Launches
from support.methods import CASES
from support.problems import PLANS, assert_gradients_no_worse, random_plan
from support.products import in_turns
from support.videos import VIDEOS

from gen_accel import kernels
from gen_accel.attention_processors import (
    BlockMixture,
    Dense,
    Neighborhood,
    Radial,
    SparseLinear,
)
from gen_accel.functional import attention
from gen_accel.kernels import Facts, fa4, facts_of, flash4, reference, triton
from gen_accel.pipelines.attach import attach
from gen_accel.plan import Plan, Route, Windows, raster_slots
from gen_accel.runs import runs_of
from gen_accel.video import VideoShape

pytestmark = pytest.mark.usefixtures("poison")

LARGE = [
    pytest.param(Radial(block=64), VideoShape(4, 8, 8), id="radial, blocks of 64"),
    pytest.param(Radial("paper", block=128), VideoShape(5, 9, 10, 7), id="paper, text, 128"),
    pytest.param(Dense(), VideoShape(3, 7, 5, 13), id="dense, text"),
    pytest.param(
        Neighborhood((2, 4, 4), stride=(1, 2, 2)), VideoShape(4, 8, 8, 13), id="strided, text"
    ),
    pytest.param(
        Neighborhood((2, 3, 3), dilation=(1, 2, 1)), VideoShape(4, 8, 9, 5), id="dilated, text"
    ),
    pytest.param(
        SparseLinear(critical=0.3, block_q=128, block_k=64), VideoShape(5, 9, 10), id="linear"
    ),
    pytest.param(BlockMixture(chunks=(2, 4, 8)), VideoShape(5, 9, 10, 13), id="token routing"),
]


MERGED = [{}, {"windows": True}, {"route": True, "batch": 2, "heads": 2}]
OWN = (16, 16)  # the blocks of `random_plan`


@pytest.fixture
def calls(monkeypatch):
    """What the stand-in was given, call by call."""
    given = []
    monkeypatch.setattr(fa4, "_library", lambda: stand_in.library(given))
    monkeypatch.setattr(fa4.kernel, "unsupported", lambda facts: [])
    return given


def by(function, plan):
    return lambda q, k, v: function(q, k, v, plan, scale=0.3)


def assert_matches_reference(plan, inputs, known=None):
    """Output, logsumexp, and the gradients of both; the reference runs `known`, where given."""
    known = plan if known is None else known
    exact = by(reference.kernel.forward, known)(*(x.double() for x in inputs))
    low = by(reference.kernel.forward, known)(*inputs)
    assert_no_worse(by(fa4.kernel.forward, plan)(*inputs), low, exact)
    lse = by(fa4.kernel.forward_lse, plan)(*inputs)[1]
    wanted = reference.logsumexp(*inputs[:2], known, scale=0.3)
    wide = reference.logsumexp(*(x.double() for x in inputs[:2]), known, scale=0.3)
    dark = wide == -torch.inf
    assert torch.equal(lse == -torch.inf, dark)
    assert_no_worse(*(x.masked_fill(dark, 0.0) for x in (lse, wanted, wide)))
    assert_gradients_no_worse(
        lambda *x: _sum_of_both(*by(fa4.kernel.forward_lse, plan)(*x), dark),
        lambda *x: _sum_of_both(
            by(reference.kernel.forward, known)(*x),
            reference.logsumexp(*x[:2], known, scale=0.3),
            dark,
        ),
        inputs,
    )


def _sum_of_both(out, lse, dark):
    return out + lse.masked_fill(dark, 0.0)[..., None].to(out.dtype)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("options", PLANS)
def test_random_plans_match_the_reference(options, dynamic, qkv):
    plan = random_plan("cpu", **options)
    plan.dynamic = dynamic
    assert_matches_reference(plan, qkv(93))


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(
    "method", [Radial(block=16), Neighborhood((2, 3, 5))], ids=["radial", "windows"]
)
def test_plans_of_runs_match_the_reference(method, qkv, monkeypatch):
    """Whose mask is never made."""
    video = VideoShape(5, 7, 6, text=5)
    dense = method.plan(video)
    keep = dense.keep[0, 0]
    plan = replace(dense, keep=runs_of(keep.split(3), len(keep[0])))
    assert_matches_reference(plan, qkv(video.tokens), dense)
    assert "keep" not in vars(plan)


@pytest.mark.parametrize("blocks", [(64, 16), (16, 32), (48, 32)], ids=str)
@pytest.mark.parametrize("options", MERGED, ids=str)
def test_merged_blocks_match_the_reference(options, blocks, qkv, calls, monkeypatch):
    """Blocks of 48 do not divide the slots."""
    monkeypatch.setattr(flash4, "blocks", lambda facts: blocks)
    plan = random_plan("cpu", **options)
    plan.dynamic = "batch" in options
    assert_matches_reference(plan, qkv(93))
    assert all(call["block_sparse_tensors"].block_size == blocks for call in calls)
    # Merged blocks are whole where all of theirs are.
    whole = random_plan("cpu")
    whole.slots = torch.arange(128)
    whole.keep[:] = True
    found = fa4.prepare(Plan(whole.slots, whole.keep, 16, 16), (32, 64))
    assert found.mask is None
    assert found.rows.full_block_cnt.tolist() == [[[2] * 4]]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("method", "video", "dtype"), in_turns(CASES, VIDEOS, [torch.float32, torch.bfloat16]), ids=str
)
def test_methods_match_the_reference(method, video, dtype, qkv, calls):
    def by_name(name):
        case = {"video": video, "method": method, "kernel": name}
        return lambda q, k, v: attention(q, k, v, **case)

    inputs = [x.bfloat16().float() for x in qkv(video.tokens)]
    exact = by_name("reference")(*(x.double() for x in inputs))
    q, k, v = (x.to(dtype) for x in inputs)
    assert_no_worse(by_name("fa4")(q, k, v), by_name("reference")(q, k, v), exact)
    assert_gradients_no_worse(by_name("fa4"), by_name("reference"), inputs)
    assert calls


@pytest.mark.slow
@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(("method", "video"), LARGE)
def test_large_blocks_match_the_reference(method, video, qkv):
    def by_name(name):
        return lambda q, k, v: attention(q, k, v, video=video, method=method, kernel=name)

    inputs = [x.bfloat16().float() for x in qkv(video.tokens)]
    exact = by_name("reference")(*(x.double() for x in inputs))
    assert_no_worse(by_name("fa4")(*inputs), by_name("reference")(*inputs), exact)
    assert_gradients_no_worse(by_name("fa4"), by_name("reference"), inputs)


@pytest.mark.slow
def test_a_compiled_model_trains_by_it(calls):
    """Forward and backward, in a graph as outside of one."""
    model, grads = wan.transformer().cpu(), []
    with attach(model, Radial(block=16), kernel="fa4") as handle:
        for run in (model, torch.compile(model, fullgraph=True, backend="eager")):
            model.zero_grad()
            wan.forward(run).square().sum().backward()
            grads.append([x.grad.clone() for x in model.parameters() if x.grad is not None])
            assert calls
            calls.clear()
        assert "fa4" in str(handle.summary())
    assert grads[0]
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(eager, compiled)


def masks():
    far = random_plan("cpu", windows=True)
    rule = far.partial
    moved = Windows(rule.first * 400, rule.last * 400, rule.place * 400, rule.free, rule.seen)
    one = random_plan("cpu", route=True)
    route = Route(one.partial.picks[..., :1], torch.zeros(8, dtype=torch.int64), 16)
    six = Windows(
        *(x.repeat(3, 1) for x in (rule.first, rule.last, rule.place)), rule.free, rule.seen
    )

    def plan(other, partial):
        return Plan(other.slots, other.keep, 16, 16, partial)

    return {
        "padding": random_plan("cpu"),
        "route": random_plan("cpu", heads=2, route=True),
        "route to one group": plan(one, route),
        "short windows": random_plan("cpu", windows=True),
        "windows along six axes": plan(far, six),
        "long windows": plan(far, moved),
    }


@pytest.mark.parametrize("name", masks())
def test_a_mask_says_what_the_plan_says(name):
    """On every pair of slots, in blocks that are kept or not."""
    plan = masks()[name]
    mask, aux = fa4._mask_of(plan)
    assert mask.rule == {
        "route to one group": "route",
        "windows along six axes": "short windows",
    }.get(name, name)
    aux = [x.expand(2, 2, -1, -1) if x.ndim == 4 else x for x in aux]
    s = torch.arange(128)
    b, h = torch.arange(2)[:, None, None, None], torch.arange(2)[:, None, None]
    found = stand_in.twin(mask)(b, h, s[:, None], s, aux)
    wanted = plan.real.expand(128, 128)
    if plan.partial is not None:
        wanted = wanted & plan.partial.allows(s[:, None], s)
    assert torch.equal(found.expand(2, 2, 128, 128), wanted.expand(2, 2, 128, 128))
    assert wanted.float().mean() < 0.9


@pytest.mark.parametrize("farthest", [fa4.FARTHEST, fa4.LONG - 1])
def test_windows_hold_to_the_ends_of_a_field(farthest):
    """Places from 0 to the largest that is allowed, and windows past both."""
    place = torch.tensor([[0, 1, farthest - 2, farthest - 1]], dtype=torch.int32)
    ends = torch.tensor([-9, 0, 1, farthest - 1, farthest, farthest + 9], dtype=torch.int32)
    first, last = (x.flatten() for x in torch.meshgrid(ends, ends, indexing="ij"))
    S = len(first)
    place = place.repeat(1, S // 4)
    none, real = torch.zeros(S, dtype=torch.bool), torch.ones(S, dtype=torch.bool)
    rule = Windows(first[None], last[None], place, none, none)
    axes = 3 if farthest == fa4.FARTHEST else 1
    aux = fa4._words(rule, real, axes=axes, farthest=farthest)
    s = torch.arange(S)
    name = "short windows" if axes == 3 else "long windows"
    found = stand_in.twin(fa4.Mask(name))(0, 0, s[:, None], s, aux)
    assert torch.equal(found, rule.allows(s[:, None], s))


def test_places_that_do_not_fit_take_a_word_an_axis():
    video = VideoShape(600, 1, 1)
    plan = Neighborhood((2, 1, 1)).plan(video)
    assert fa4._mask_of(plan)[0].rule == "long windows"
    near = Neighborhood((2, 1, 1)).plan(VideoShape(511, 1, 1))
    assert fa4._mask_of(near)[0].rule == "short windows"


class TestLists:
    def test_of_a_static_plan_are_made_once_and_as_short_as_they_can_be(self):
        plan = random_plan("cpu", batch=2, heads=2)
        with torch.inference_mode():
            lists = fa4.prepare(plan, OWN)
        assert fa4.prepare(plan, OWN) is lists
        kept = plan.keep.sum(-1)
        width = lists.rows.mask_block_idx.shape[3], lists.rows.full_block_idx.shape[3]
        assert max(width) <= kept.max() < plan.keep.shape[3]
        whole = plan.whole
        assert torch.equal(lists.rows.full_block_cnt, whole.sum(-1).int())
        assert torch.equal(lists.columns.full_block_cnt, whole.sum(-2).int())
        assert torch.equal(lists.columns.mask_block_cnt, (plan.keep & ~whole).sum(-2).int())
        assert not any(x.is_inference() for x in (*lists.rows, *lists.columns, *lists.aux))

    def test_nothing_masked_takes_no_mask(self):
        slots = torch.arange(64).flip(0)
        keep = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
        for dynamic in (False, True):
            lists = fa4.prepare(Plan(slots, keep, 16, 16, dynamic=dynamic), OWN)
            assert (lists.mask, lists.aux) == (None, [])
            assert lists.rows.mask_block_cnt.shape == (1, 1, 4)
            assert not lists.rows.mask_block_cnt.any()

    def test_without_a_gradient_a_dynamic_plan_has_no_columns(self):
        plan = random_plan("cpu")
        plan.dynamic = True
        with torch.no_grad():
            assert fa4.prepare(plan, OWN).columns is None
        assert fa4.prepare(plan, OWN).columns is not None

    def test_nothing_is_moved_where_slots_are_tokens(self, qkv, calls):
        plan = Plan(torch.arange(64), torch.ones(1, 1, 4, 4, dtype=torch.bool), 16, 16)
        assert plan.is_raster
        q, k, v = qkv(64)
        with torch.no_grad(), Launches() as counted:
            fa4.kernel.forward(q, k, v, plan, scale=0.3)
        assert not {"aten::index_select", "aten::copy_"} & set(counted.done)
        assert len(calls) == 1


@pytest.mark.parametrize("options", [{}, {"route": True}, {"windows": True}], ids=str)
def test_lists_of_a_dynamic_plan_wait_for_nothing(options):
    plan = random_plan("cpu", batch=2, heads=2, **options)
    plan.dynamic = True
    plan.tokens, plan.places, plan.is_raster  # noqa: B018  what the layout knows
    with Launches() as counted:
        fa4.prepare(plan, OWN)
        fa4.prepare(plan, (48, 32))
    assert counted.done
    assert counted.waits == []


class TestRefusals:
    def test_the_cpu(self, qkv):
        plan = random_plan("cpu")
        with pytest.raises(ValueError, match=r"fa4: .*capability 9\.x and 10\.x, got cpu"):
            kernels.run(*qkv(93), plan, scale=0.3, kernel="fa4")
        assert fa4.kernel.place(facts_of(*qkv(93), plan)).order > 50

    def test_an_older_release_is_told_by_what_it_lacks(self, monkeypatch):
        def older(q, k, v, mask_mod=None, aux_tensors=None):
            raise AssertionError

        monkeypatch.setattr(fa4, "_library", lambda: SimpleNamespace(attend=older))
        (reason,) = fa4._library_reasons.__wrapped__()
        assert "no block_sparse_tensors, block_sparse_tensors_bwd: pip install" in reason

    def test_what_does_not_import_is_told(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
        fa4._library.cache_clear()
        (reason,) = fa4._library_reasons.__wrapped__()
        assert reason.startswith("flash-attn-4 cannot be imported: ")

    def test_one_that_fails_is_left_and_remembered(self, monkeypatch, qkv):
        def fails(*args, **options):
            raise RuntimeError("ptxas said no\nand more")

        found = stand_in.library()._replace(attend=fails)
        monkeypatch.setattr(fa4, "_library", lambda: found)
        monkeypatch.setattr(fa4, "_failed", {})
        plan, inputs = random_plan("cpu"), qkv(93)
        with pytest.raises(kernels.KernelFailed, match=r"RuntimeError: ptxas said no$"):
            fa4.kernel.forward(*inputs, plan, scale=0.3)
        assert fa4._failed[fa4._key(facts_of(*inputs, plan))].endswith("ptxas said no")


class TestTheMaskOfCuTe:
    def test_is_called_as_flash_attention_4_calls_it(self):
        """Six arguments by position, all one-element vectors but the last two."""
        source = ast.parse(textwrap.dedent(inspect.getsource(fa4._mask_mod.__wrapped__)))
        (inner,) = [x for x in ast.walk(source) if isinstance(x, ast.FunctionDef)][1:]
        names = [arg.arg for arg in inner.args.args]
        assert names == ["batch", "head", "query", "key", "seqlen_info", "aux_tensors"]

    @pytest.mark.parametrize("name", fa4.RULES)
    def test_holds_nothing_but_operators_and_subscripts(self, name):
        """So that it means the same for scalars of CuTe as for tensors."""
        allowed = (ast.BinOp, ast.Subscript, ast.Name, ast.Constant, ast.UnaryOp, ast.Load)
        allowed += (ast.Sub, ast.BitAnd, ast.RShift, ast.USub, ast.Tuple)
        body = ast.parse(inspect.getsource(fa4.RULES[name].bits)).body[0]
        (returned,) = [x for x in ast.walk(body) if isinstance(x, ast.Return)]
        for node in ast.walk(returned.value):
            if isinstance(node, ast.Call):
                assert node.func.id == "_in_windows"
                break
        else:
            assert all(isinstance(node, allowed) for node in ast.walk(returned.value))

    @pytest.mark.slow
    def test_compiles_with_the_kernels_of_flash_attention_4(self):
        """Forward and backward by its own compiler, which needs no GPU."""
        pytest.importorskip("flash_attn.cute", reason="needs flash-attn-4", exc_type=ImportError)
        names = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a"}
        env = os.environ | names | {"FLASH_ATTENTION_NUM_SMS": "132"}
        code = "from support.fa4 import compile_all; compile_all(128, 128, 128)"
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == len(fa4.RULES) + 3


@pytest.mark.gpu
@pytest.mark.parametrize("grad", [False, True], ids=["generating", "training"])
@pytest.mark.parametrize("name", masks())
def test_the_real_one_matches_the_reference(name, grad):
    plan, g = real_plan(name, "cuda"), torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 2, plan.tokens, 128, generator=g).to("cuda") for _ in range(3)]
    low = [x.bfloat16() for x in inputs]
    if reasons := fa4.kernel.unsupported(facts_of(*low, plan, grad=grad)):
        pytest.skip("; ".join(reasons))
    ours, its = by(fa4.kernel.forward, plan), by(reference.kernel.forward, plan)
    if grad:
        assert_gradients_no_worse(ours, its, inputs, torch.bfloat16)
    else:
        assert_no_worse(ours(*low), its(*low), its(*(x.double() for x in low)))


def real_plan(name, device):
    """In blocks of 256 and 128, which all cards take: each slot stands for sixteen."""
    small = masks()[name]
    S, rule = 16 * 128, small.partial

    def wide(x):
        return x.repeat_interleave(16, -1)

    if isinstance(rule, Route):
        picks = rule.picks.repeat_interleave(16, 2)
        rule = Route(picks, rule.group.repeat_interleave(2), 128)
    elif rule is not None:
        given = rule.first, rule.last, rule.place, rule.free, rule.seen
        rule = Windows(*map(wide, given))
    slots = raster_slots(VideoShape(1, 1, S - 100), S)
    return Plan(slots, small.keep.repeat_interleave(2, -1), 256, 128, rule).to(device)


def test_lists_of_a_single_call_come_after_our_own_kernel(monkeypatch):
    monkeypatch.setattr(flash4, "serves", lambda device: True)
    monkeypatch.setattr(flash4, "is_hopper", lambda device: True)
    shape, device = (1, 2, 4096, 128), torch.device("cuda")
    facts = Facts((shape,) * 3, (torch.bfloat16,) * 3, (device,) * 3, block_q=128, block_k=128)
    assert fa4.kernel.place(facts).order < triton.kernel.place(facts).order
    assert fa4.kernel.place(replace(facts, dynamic=True)).order > triton.kernel.place(facts).order
