"""The heaviest blocks of q and k, and Reuse as a function, without a model."""

import json
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from support.golden import residual, sparsed
from support.methods import CASES
from support.paths import ROOT

from gen_accel import (
    BlockMixture,
    Dense,
    Neighborhood,
    Piecewise,
    Radial,
    Reuse,
    SparseLinear,
    VideoShape,
    attention,
    kernels,
)
from gen_accel.attention_processors.methods.registry import (
    method_from,
    method_of_file,
    saved_options,
)
from gen_accel.kernels import choosing
from gen_accel.kernels.choosing import block_mass
from gen_accel.method import Method
from gen_accel.plan import Rest, Route

GOLDEN = ROOT / "tests" / "golden"
VIDEO = VideoShape(3, 5, 7, text=4)  # no side divides a tile
INNER = SparseLinear(critical=0.2, block_q=16, block_k=8)
pytestmark = pytest.mark.usefixtures("one_thread")

CHOOSING = [m for m in CASES if m.is_dynamic and not isinstance(m, Reuse)]


def qkv(seed=0, video=VIDEO, batch=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn((3, batch, 3, video.tokens, 16), generator=g, dtype=dtype).unbind()


def by_hand(q, k, plan, scale):
    """From all weights at once, block by block."""
    weights = (q.double() @ k.double().mT * scale).softmax(-1)
    found = torch.zeros(*q.shape[:2], *plan.keep.shape[2:], dtype=torch.float64)
    for i, rows in enumerate(plan.slots.view(-1, plan.block_q)):
        for j, columns in enumerate(plan.slots.view(-1, plan.block_k)):
            rows, columns = rows[rows >= 0], columns[columns >= 0]
            if len(rows) and len(columns):
                found[:, :, i, j] = weights[:, :, rows][..., columns].sum(-1).mean(-1)
    return found


@pytest.mark.parametrize("numbers", [1 << 24, 1 << 12, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_mass_of_blocks_by_hand(numbers, dtype, monkeypatch):
    monkeypatch.setattr(choosing, "NUMBERS", numbers)
    q, k, _ = qkv(dtype=dtype)
    plan = INNER.plan_for(q, k, video=VIDEO)
    found = block_mass(q, k, plan, scale=0.7)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = by_hand(q, k, plan, 0.7)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("inner", CHOOSING, ids=str)
def test_as_many_blocks_as_the_method_chooses_and_the_heaviest(inner):
    q, k, _ = qkv()
    own, plan = inner.plan_for(q, k, video=VIDEO), Reuse(inner).plan_for(q, k, video=VIDEO)
    text = plan.slots >= VIDEO.video_tokens
    occupied = plan.real.view(-1, plan.block_k).any(-1)
    assert plan.keep[..., text.view(-1, plan.block_k).any(-1)].all()
    assert plan.keep[:, :, text.view(-1, plan.block_q).any(-1)][..., occupied].all()
    assert not plan.keep[..., ~occupied].any()
    counts = plan.keep.sum(-1)
    if not isinstance(own.partial, Route):
        assert torch.equal(counts, own.keep.sum(-1))
    assert plan.dynamic  # of this call; what a memory learns lasts
    assert not isinstance(plan.partial, Route)
    held = by_hand(q, k, plan, 0.25)
    rows = ~text.view(-1, plan.block_q).any(-1)
    least = held.masked_fill(~plan.keep, 2).amin(-1)
    most = held.masked_fill(plan.keep, -1).amax(-1)
    ranked = plan.keep & ~text.view(-1, plan.block_k).any(-1)
    least = held.masked_fill(~ranked, 2).amin(-1)
    assert (least + 1e-6 >= most)[:, :, rows].all()


def test_it_keeps_more_mass_than_any_choice_of_as_many():
    q, k, v = qkv(seed=1)
    plan = Reuse(INNER).plan_for(q, k, video=VIDEO)
    held = by_hand(q, k, plan, 0.25)
    own = INNER.plan_for(q, k, video=VIDEO)
    assert (held * plan.keep).sum() > (held * own.keep).sum()
    out = attention(q, k, v, video=VIDEO, method=Reuse(INNER), kernel="reference")
    dense = attention(q, k, v, video=VIDEO, method=Dense(), kernel="reference")
    sparse = attention(q, k, v, video=VIDEO, method=INNER, kernel="reference")
    assert (out - dense).norm() < (sparse - dense).norm()


@dataclass(frozen=True)
class Pooled(SparseLinear):
    """One that asks for its rest."""

    def plan_for(self, q, k, *, video, scale=None, kernel="auto"):
        plan = super().plan_for(q, k, video=video, scale=scale, kernel=kernel)
        plan.rest = Rest("query")
        return plan


def test_the_rest_of_the_method_is_kept():
    q, k, v = qkv()
    method = Reuse(Pooled(critical=0.2, block_q=16, block_k=8))
    assert method.plan_for(q, k, video=VIDEO).rest == Rest("query")
    options = {"video": VIDEO, "kernel": "reference"}
    dense = attention(q, k, v, method=Dense(), **options)
    pooled, dropped = (attention(q, k, v, method=m, **options) for m in (method, Reuse(INNER)))
    assert (pooled - dense).norm() < (dropped - dense).norm()


def test_the_scale_of_the_call_decides():
    q, k, v = qkv()
    plans = []
    for scale in (0.02, 2.0):
        attention(q, k, v, video=VIDEO, method=Spy(plans), scale=scale)
    assert not torch.equal(*(plan.keep for plan in plans))


@pytest.mark.parametrize("scale", [0.05, 2.0])
def test_the_method_chooses_as_many_as_at_the_scale_of_the_call(scale):
    inner = Piecewise(budget="mass", mass=0.6, block_q=16, block_k=8)
    q, k, _ = qkv()
    own, other = (inner.plan_for(q, k, video=VIDEO, scale=by) for by in (scale, None))
    assert not torch.equal(own.keep.sum(-1), other.keep.sum(-1))
    plan = Reuse(inner).plan_for(q, k, video=VIDEO, scale=scale)
    assert torch.equal(plan.keep.sum(-1), own.keep.sum(-1))


@dataclass(frozen=True)
class Noting(SparseLinear):
    """One that notes in its class how it is asked to choose."""

    asked: ClassVar = []

    def plan_for(self, q, k, *, video, scale=None, kernel="auto"):
        self.asked.append((scale, kernel))
        return super().plan_for(q, k, video=video, scale=scale, kernel=kernel)


@pytest.mark.parametrize("learns", [False, True], ids=["at once", "from a dense step"])
def test_the_method_chooses_by_the_scale_and_the_kernel_of_the_call(learns):
    q, k, v = qkv()
    method, run = Reuse(Noting(block_q=16, block_k=8)), partial(kernels.run, scale=0.7)
    Noting.asked.clear()
    given = {"video": VIDEO, "kernel": kernels.Runner(run, "gather", 0.7)}
    if learns:
        method.step_state().learn(q, k, v, v, first=None, **given)
    else:
        method(q, k, v, **given)
    assert Noting.asked == [(0.7, "gather")]


class Spy(Method):
    """Reuse, whose plans are noted."""

    def __init__(self, plans):
        self._noted = plans

    def __call__(self, q, k, v, *, video, kernel):
        def noting(q, k, v, plan):
            self._noted.append(plan)
            return kernel(q, k, v, plan)

        noting = type(kernel)(noting, kernel.name, kernel.scale)
        return Reuse(INNER)(q, k, v, video=video, kernel=noting)


def test_gradients_are_those_of_the_plan():
    q, k, v = (x.requires_grad_() for x in qkv(dtype=torch.float64))
    out = attention(q, k, v, video=VIDEO, method=Reuse(INNER, residual=False), kernel="reference")
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    plan = Reuse(INNER).plan_for(q, k, video=VIDEO)
    weights = (q @ k.mT * 0.25).masked_fill(~pairs(plan), -torch.inf).softmax(-1)
    wanted = torch.autograd.grad((weights @ v).square().sum(), (q, k, v))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other)


def pairs(plan):
    """(B, H, N, N) bool, which tokens see which."""
    rows, columns = plan.places // plan.block_q, plan.places // plan.block_k
    return plan.keep[:, :, rows][..., columns]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": Dense()}, r"^method must be sparse and without a memory, got Dense\(\)$"),
        ({"method": Reuse()}, "^method must be sparse and without a memory, got Reuse"),
        ({"method": Radial}, "^method must be an instance such as"),
        (
            {"method": Piecewise(score="norm")},
            "^method must choose by q and k alone, got score='n",
        ),
        ({"every": -1}, "^every must be at least 0, got -1$"),
        ({"every": None}, "^every of Reuse must be int, got None"),
        ({"residual": "gpu"}, "^residual of Reuse must be .*cpu, got 'gpu'"),
        ({"residual": 1}, "^residual of Reuse must be .*cpu, got 1"),
        ({"guidance": "both"}, r"^guidance must be one of \('own', 'shared'\), got 'both'$"),
        ({"layers": (1, -1)}, r"^layers must be at least 0, got \(1, -1\)$"),
        ({"layers": 3}, "^layers of Reuse must be .*, got 3"),
        ({"method": Radial(), "residual": False}, "^the plan of Radial.* there is nothing to reu"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Reuse(**options)


def test_what_it_wraps_it_is():
    window = Neighborhood((2, 3, 3))
    reuse = Reuse(window)
    video = VideoShape(4, 6, 6)
    assert reuse.least_grid == (2, 3, 3)
    assert reuse.density(video) == window.density(video)
    assert torch.equal(reuse.plan(video).keep, window.plan(video).keep)
    assert not reuse.is_dynamic
    assert Reuse(Radial()).thins_by_time
    assert Reuse(BlockMixture(scope="overall")).needs_all_heads
    mixture = BlockMixture()
    assert Reuse(mixture).for_layer(0) != Reuse(mixture)
    assert Reuse(window).tiled((1, 2, 4)) == Reuse(window)
    assert Reuse(INNER).tiled((1, 2, 4)) == Reuse(INNER.tiled((1, 2, 4)))
    assert Reuse(INNER).tile_tokens == INNER.tile_tokens
    assert Reuse(mixture).for_layer(4) == Reuse(mixture.for_layer(4))
    assert Reuse().for_layer(0) == Reuse()
    some = Reuse(INNER, layers=(1,))
    assert some.for_layer(1) == Reuse(INNER)
    assert some.for_layer(0) == Reuse(INNER, residual=False)
    assert Reuse(window, layers=(1,)).for_layer(0) == window
    small = Reuse(Neighborhood((4, 3, 3))).within(VideoShape(3, 6, 6), video)
    assert small == Reuse(Neighborhood((-1, 3, 3)))


def test_how_much_it_keeps():
    shape = (2, 3, 100, 16)
    sizes = {True: (19200, 0), "cpu": (0, 19200), False: (0, 0)}
    for kind, wanted in sizes.items():
        memory = Reuse(INNER, residual=kind).step_state()
        assert (memory.size(shape, 2), memory.host_size(shape, 2)) == wanted
        assert ("residual='cpu'" in memory.for_less) == (kind is True)


SETTINGS = ["method=radial", "method.decay_factor=0.5", "every=5", "residual=cpu", "layers=1,2"]


def test_in_words_and_in_files():
    made = method_from("reuse", SETTINGS)
    assert made == Reuse(Radial(decay_factor=0.5), every=5, residual="cpu", layers=(1, 2))
    assert method_from("reuse", ["method.critical=0.3"]) == Reuse(Piecewise(critical=0.3))
    for method in (made, Reuse(), Reuse(BlockMixture(chunk_2d=(3, 4)))):
        assert method_of_file("reuse", saved_options(method)) == method


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method=raidal"], "^method must be one of .* did you mean 'radial'"),
        (["method.critica=1"], "^piecewise has no field 'critica'"),
        (["every.step=1"], r"^every of reuse holds no method, got 'every.step=1'$"),
        (["method=radial", "method=radial"], "^method is set twice$"),
    ],
)
def test_words_that_say_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        method_from("reuse", settings)


def test_a_file_that_holds_no_method_is_refused():
    with pytest.raises(
        ValueError, match=r"^method of reuse must hold a name and options, got 'ra"
    ):
        method_of_file("reuse", {"method": "radial"})


@pytest.mark.parametrize(
    ("name", "array", "change"),
    [("sparsed", "keep1", 16), ("residual", "o0", 1e-4), ("residual", "b_q2", 1e-1)],
)
def test_a_golden_that_answers_another_question_fails(name, array, change):
    check = {"sparsed": sparsed, "residual": residual}[name].check
    case = json.loads((GOLDEN / f"{name}.json").read_text())[int(array[-1])]
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    assert all(deviation.ok for deviation in check(case, arrays))
    flat = arrays[array].reshape(-1)
    flat[7] = flat[7] ^ change if name == "sparsed" else flat[7] + change
    assert not all(deviation.ok for deviation in check(case, arrays))
