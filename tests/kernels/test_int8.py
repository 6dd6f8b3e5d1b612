"""The kernel with products of 8 bits: what test_kernels.py does not ask of every kernel."""

import ctypes
import subprocess

import pytest
import torch
from support import wan
from support.checks import assert_no_worse, budget, largest_error
from support.problems import all_picked, random_plan
from support.products import in_turns, slow_after
from torch.utils import cpp_extension

from gen_accel import Piecewise, Radial, VideoShape, attach, kernels
from gen_accel.functional import attention
from gen_accel.kernels import Facts, KernelFailed, allowance, native, reference, rounding
from gen_accel.kernels.base import cpp_compiler
from gen_accel.kernels.native import build
from gen_accel.kernels.native.arguments import NativeCall
from gen_accel.kernels.native.int8 import deviation, kernel
from gen_accel.kernels.self_check import SelfCheckFailed, check_rows
from gen_accel.plan import Plan

pytestmark = pytest.mark.usefixtures("poison", "int8_kernel")

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def assert_allowed(q, k, v, plan, scale=0.3, out=None):
    exact = reference.kernel.forward(q.double(), k.double(), v.double(), plan, scale=scale)
    low = reference.kernel.forward(q, k, v, plan, scale=scale)
    more = allowance("int8", q, k, v, plan, scale=scale)
    out = kernel.forward(q, k, v, plan, scale=scale) if out is None else out
    assert_no_worse(out, low, exact, more=more)


SIZES = [  # queries and keys in a block, the head dim, and slots
    (300, 90, 33, 900),
    (44, 1100, 72, 2200),
    (7, 5, 3, 210),
    (30, 64, 128, 960),
    (64, 16, 64, 512),
    (90, 75, 160, 450),
]


@pytest.mark.parametrize(
    ("size", "dtype"), slow_after(0, in_turns(SIZES, [FP32, BF16, FP16])), ids=str
)
def test_any_size_is_within_the_allowance(size, dtype, qkv):
    """Blocks that divide nothing, longer than a piece of queries or a tile of keys."""
    block_q, block_k, dim, slots = size
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(1, 2, slots // block_q, slots // block_k, generator=g) < 0.4
    keep[..., 0] = True
    order = torch.full((slots,), -1)
    held = torch.randperm(slots, generator=g)[: slots - 11]
    order[held] = torch.randperm(slots - 11, generator=g)
    plan = Plan(order, keep, block_q, block_k)
    q, k, v = qkv(slots - 11, dtype, batch=1, dim=dim)
    out = kernel.forward(q, k, v, plan, scale=0.3)
    assert torch.isfinite(out).all()
    facts = {"scale": 0.3, "name": "int8", "kernel": kernel}
    check_rows(q, k, v, plan, out, **facts)


def spread_out(kind, q, k, v):
    """The same with keys far from zero, or with channels and tokens that stand out."""
    if kind == "means":
        return q, k + 15, v - 4
    if kind == "outliers":
        k, q, v = k.clone(), q.clone(), v.clone()
        k[..., 3] *= 8
        q[..., 5] *= 6
        v[..., 2] *= 50
        for x in (k, v):
            x[:, :, ::19] *= 6
    return q, k, v


@pytest.mark.parametrize("kind", ["random", "means", "outliers"])
@pytest.mark.parametrize("rule", ["blocks", "windows", "route", "gain"])
def test_whatever_the_numbers_are(rule, kind, qkv):
    plan = random_plan(CPU, batch=2, heads=2, windows=rule == "windows", route=rule == "route")
    if rule == "route":
        plan = all_picked(plan)
    if rule == "gain":
        plan = plan.changed(gain=torch.linspace(0.1, 1, plan.keep.numel()).view(plan.keep.shape))
    assert_allowed(*spread_out(kind, *qkv(plan.tokens)), plan)


def rounded(x, steps, dim, nothing=0.0):
    """To whole steps from 0 to the largest along `dim`."""
    step = x.abs().amax(dim, keepdim=True) / steps
    return torch.where(step > 0, (x / step).round() * step, nothing)


def emulated(q, k, v, block, scale, *, smooth):
    """Dense attention with the roundings of the kernel, in fp64, of one head (N, D)."""
    q, k, v = (x.double() for x in (q, k, v))
    keys, values = (x.unflatten(0, (-1, block)) for x in (k, v))
    mean = keys.mean(1, keepdim=True) if smooth else torch.zeros_like(keys[:, :1])
    about = values.mean(1, keepdim=True)
    scores = torch.einsum("rd,ksd->rks", rounded(q, 127, -1), rounded(keys - mean, 127, -1))
    scores = (scores + torch.einsum("rd,ksd->rks", q, mean)) * scale
    weights = (scores - scores.amax((1, 2), keepdim=True)).exp()
    out = torch.einsum("rks,ksd->rd", rounded(weights, 255, 2), rounded(values - about, 127, 1))
    out = out + torch.einsum("rks,ksd->rd", weights, about.expand_as(values))
    return out / weights.sum((1, 2))[:, None]


@pytest.mark.parametrize("mean", [0, 5, 30])
def test_keys_far_from_zero_need_their_mean_taken_off(mean, qkv):
    """Without it the same roundings leave the allowance, so that it says something."""
    plan = Plan(torch.arange(256), torch.ones(1, 1, 4, 4, dtype=torch.bool), 64, 64)
    q, k, v = qkv(256, batch=1, heads=1, dim=64)
    k = k + mean
    exact = reference.kernel.forward(q.double(), k.double(), v.double(), plan, scale=0.125)
    low = reference.kernel.forward(q, k, v, plan, scale=0.125)
    allowed = budget(low, exact) + allowance("int8", q, k, v, plan, scale=0.125)
    errors = {
        smooth: largest_error(
            emulated(q[0, 0], k[0, 0], v[0, 0], 64, 0.125, smooth=smooth), exact[0, 0]
        )
        for smooth in (True, False)
    }
    assert largest_error(kernel.forward(q, k, v, plan, scale=0.125), exact) <= allowed
    assert errors[True] <= allowed
    if mean == 30:
        assert errors[False] > allowed
        assert errors[False] > 4 * errors[True]


def test_its_roundings_are_those_that_are_written_down(qkv):
    """But for numbers that lie between two steps: few, and each is off by one step."""
    plan = Plan(torch.arange(256), torch.ones(1, 1, 4, 4, dtype=torch.bool), 64, 64)
    q, k, v = qkv(256, batch=1, heads=1, dim=64)
    out = kernel.forward(q, k, v, plan, scale=0.125)[0, 0]
    exact = reference.kernel.forward(q.double(), k.double(), v.double(), plan, scale=0.125)[0, 0]
    mine = emulated(q[0, 0], k[0, 0], v[0, 0], 64, 0.125, smooth=True)
    assert (out - mine).norm() < 0.1 * (out - exact).norm()


@pytest.mark.slow
def test_the_allowance_is_six_deviations_of_what_comes_out(qkv):
    """The deviation that is derived is the one that is found."""
    plan = random_plan(CPU, heads=2)
    q, k, v = qkv(plan.tokens, batch=8, dim=64)
    exact = reference.kernel.forward(q.double(), k.double(), v.double(), plan, scale=0.125)
    error = kernel.forward(q, k, v, plan, scale=0.125).double() - exact
    allowed = allowance("int8", q, k, v, plan, scale=0.125)
    assert 0.15 * allowed < error.abs().max() < 0.7 * allowed
    one = q[0, 0].double(), k[0, 0].double()[plan.slots.clamp_min(0)]
    values = v[0, 0].double()[plan.slots.clamp_min(0)]
    weights = (one[0] @ one[1].T * 0.125).masked_fill(
        ~reference.pairs(plan)[0, 0][plan.places], -torch.inf
    )
    weights = weights.softmax(-1).nan_to_num(0)
    derived = deviation(*one, values, weights, plan=plan, scale=0.125)
    found = error[0, 0]
    ratio = found.square().mean().sqrt() / derived.square().mean().sqrt()
    assert 0.7 < ratio < 1.2


def test_a_span_of_values_bounds_the_allowance(qkv):
    plan = random_plan(CPU)
    q, k, v = qkv(plan.tokens)
    allowed = allowance("int8", q * 50, k * 50, v, plan, scale=1.0)
    assert allowed <= (v.amax((0, 2)) - v.amin((0, 2))).max()


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("flaw", [torch.nan, torch.inf], ids=str)
def test_what_is_no_number_comes_out_where_it_is_seen(flaw, which, qkv):
    keep = torch.eye(4, dtype=torch.bool)[None, None]
    plan = Plan(torch.arange(160), keep, 40, 40)
    inputs = qkv(160, batch=1, heads=1)
    clean = kernel.forward(*inputs, plan, scale=0.3)
    inputs[which][0, 0, 50, 2] = flaw
    out = kernel.forward(*inputs, plan, scale=0.3)
    seen = torch.zeros(160, 16, dtype=torch.bool)
    rows = slice(50, 51) if which == 0 else slice(40, 80)
    seen[rows, 2 if which == 2 else slice(None)] = True
    assert out[0, 0].isnan().equal(seen)
    assert torch.equal(out[0, 0][~seen], clean[0, 0][~seen])


def test_zeros_and_numbers_too_small_for_a_step(qkv):
    plan = random_plan(CPU)
    q, k, v = qkv(plan.tokens)
    k, v = k * 0, v * 1e-36
    assert_allowed(q, k, v, plan)
    assert_allowed(q * 0, k, v * 0, plan)


class TestRefusals:
    def facts(self, **options):
        given = {"dtypes": (FP32,) * 3, "devices": (CPU,) * 3} | options
        return Facts(((1, 2, 64, 16),) * 3, **given)

    def test_it_takes_what_it_takes(self):
        for dtype in (FP32, BF16, FP16):
            assert kernel.unsupported(self.facts(dtypes=(dtype,) * 3)) == []

    def test_auto_never_takes_it(self, built, qkv):
        assert "int8" not in kernels.preference(self.facts())
        told = []
        plan = random_plan(CPU)
        kernels.run(*qkv(plan.tokens), plan, scale=0.3, report=told.append)
        assert "int8" not in str(told[0])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"grad": True}, "it is for generating, rounding has no gradient; train with kernel"),
            ({"dtypes": (torch.float64,) * 3}, "it takes float32, bfloat16, float16, got"),
            ({"devices": (torch.device("meta"),) * 3}, "it is for the CPU, got meta"),
            ({"pattern": "route", "gain": True}, "no gain on scores where each query picks"),
        ],
        ids=["training", "fp64", "a GPU", "a gain with a route"],
    )
    def test_reasons(self, options, words):
        (reason,) = kernel.unsupported(self.facts(**options))
        assert words in reason

    @pytest.mark.slow
    def test_a_processor_without_products_of_bytes(self, monkeypatch, qkv, run):
        monkeypatch.setattr(build, "lacks_bytes", lambda: "AVX512_VNNI and AVX_VNNI")
        plan = random_plan(CPU)
        words = "int8: the processor lacks AVX512_VNNI and AVX_VNNI; kernel 'native' does without"
        with pytest.raises(ValueError, match=words):
            kernels.run(*qkv(plan.tokens), plan, scale=0.3, kernel="int8")
        video = VideoShape(4, 8, 8)
        with torch.no_grad(), pytest.raises(ValueError, match=words):
            attention(*qkv(video.tokens), video=video, method=Piecewise(0.2), kernel="int8")
        words = "the processor lacks AVX512_VNNI and AVX_VNNI"
        assert f"{words}; kernel" in " ".join(run("list").stdout.split())
        assert f"{words} (int8" in " ".join(run("doctor").stdout.split())

    def test_a_library_that_is_not_built(self, monkeypatch):
        none = build._Found(None, build.NOT_BUILT)
        monkeypatch.setattr(build, "_found", lambda: none)
        assert kernel.unsupported(self.facts()) == [build.NOT_BUILT]

    def test_tensors_that_are_not_alike(self, qkv):
        plan = random_plan(CPU)
        q, k, v = qkv(plan.tokens)
        with pytest.raises(ValueError, match="kernel 'int8': q, k and v must be alike"):
            kernel.forward(q, k[..., 1:], v, plan, scale=0.3)

    def test_a_failure_names_it(self, monkeypatch, qkv):
        plan = random_plan(CPU)
        native.prepare(plan)  # by the library too

        class Failing:
            def __getitem__(self, name):
                return lambda *args: 1

            gen_accel_error = staticmethod(lambda: b"std::bad_alloc")

        monkeypatch.setattr(native.build, "library", Failing)
        with pytest.raises(KernelFailed, match="kernel 'int8' failed: std::bad_alloc"):
            kernel.forward(*qkv(plan.tokens), plan, scale=0.3)


class TestByName:
    def test_in_attention(self, qkv):
        video, method = VideoShape(3, 4, 5, text=3), Radial(block=16)
        q, k, v = qkv(video.tokens)
        out = attention(q, k, v, video=video, method=method, kernel="int8")
        plan = method.plan(video, CPU)
        assert_allowed(q, k, v, plan, scale=0.25, out=out)
        assert not torch.equal(
            out, attention(q, k, v, video=video, method=method, kernel="native")
        )

    @pytest.mark.slow
    def test_on_a_model_that_checks_itself(self, monkeypatch):
        model = wan.transformer()
        with torch.no_grad():
            with attach(model, Radial(block=16), kernel="int8", self_check=True) as handle:
                found = wan.forward(model)
                assert handle.summary().to_dict()["kernels"] == ["int8"]
            with attach(model, Radial(block=16), kernel="reference"):
                exact = wan.forward(model)
            assert 0 < (found - exact).norm() < 0.02 * exact.norm()
            # The check allows what the kernel says, and no more.
            monkeypatch.setattr(rounding, "DEVIATIONS", 0.1)
            with (
                attach(model, Radial(block=16), kernel="int8", self_check=True),
                pytest.raises(SelfCheckFailed, match="'int8' errs by"),
            ):
                wan.forward(model)

    def test_training_a_model_is_refused_in_words(self):
        model = wan.transformer()
        with (
            attach(model, Radial(block=16), kernel="int8"),
            pytest.raises(ValueError, match="int8: it is for generating"),
        ):
            wan.forward(model)

    @pytest.mark.slow
    def test_on_the_command_line(self, run):
        shown = run("list").stdout
        assert "int8: Attention with products of 8 bits" in shown
        about = shown.split("  int8: ")[1].split("\n\n")[0]
        assert "cpu, generating yes" in about
        assert "cpu, training   no: it is for generating" in about
        assert "int8 kernel" in run("doctor").stdout


@pytest.mark.nightly
def test_256_bits_at_once_and_no_products_of_bytes(tmp_path, qkv):
    """Run it as processors without AVX-512 do, and those without products of bytes."""
    tool = cpp_compiler()
    source = next(file for file in build.SOURCES if file.stem == "int8")
    links = [*(f"-L{folder}" for folder in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]

    def compiled(name, *flags):
        made = tmp_path / f"{name}.so"
        command = [tool, *build.FLAGS, "-O0", *flags, *includes, "-shared", str(source)]
        subprocess.run([*command, "-o", str(made), *links], check=True, capture_output=True)
        library = ctypes.CDLL(str(made))
        library.gen_accel_int8_lacks.restype = ctypes.c_char_p
        return library

    without = compiled("without", "-march=x86-64-v3")
    assert without.gen_accel_int8_lacks() == b"AVX512_VNNI and AVX_VNNI"
    plan = random_plan(CPU, heads=2, block_k=32, windows=True)
    q, k, v = qkv(plan.tokens, dim=72)
    for library in (without, compiled("narrow", "-DGEN_ACCEL_NARROW")):
        out = torch.empty_like(q)
        call = NativeCall("attention", "int8", scale=0.3, wide=False)
        call.rows(q=q, k=k, v=v)
        call.lists(*native.prepare(plan))
        call.writes(o=out)
        assert library.gen_accel_int8(ctypes.byref(call.args), 0) == 0
        assert_allowed(q, k, v, plan, out=out)
