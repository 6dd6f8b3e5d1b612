"""The Triton kernel with products of 8 bits: interpreted on the CPU, and by its machine code."""

import compile_matrix
import pytest
import sass
import torch
from support.checks import assert_no_worse, largest_error
from support.interpreter import run_python
from support.paths import ROOT
from support.problems import random_plan
from support.products import NIGHTLY
from support.triton_plans import PLANS, inputs

from gen_accel import VideoShape, kernels
from gen_accel.attention_processors import Piecewise
from gen_accel.functional import attention
from gen_accel.kernels import Facts, allowance, reference
from gen_accel.kernels.self_check import check_rows
from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.int8 import deviation, kernel
from gen_accel.plan import Plan, Rest

pytestmark = pytest.mark.usefixtures("poison", "untuned")

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def assert_allowed(q, k, v, plan, scale=0.3, slack=0.05):
    """Within the allowance; return the largest error."""
    exact = reference.kernel.forward(q.double(), k.double(), v.double(), plan, scale=scale)
    low = reference.kernel.forward(q, k, v, plan, scale=scale)
    more = allowance("triton_int8", q, k, v, plan, scale=scale)
    out, lse = kernel.forward_lse(q, k, v, plan, scale=scale)
    assert_no_worse(out, low, exact, more=more)
    wanted = reference.logsumexp(q.double(), k.double(), plan, scale=scale)
    assert torch.equal(lse.isinf(), wanted.isinf())
    assert (lse - wanted)[lse.isfinite()].abs().max() < slack
    return largest_error(out, exact)


SIZES = [  # tiles that divide blocks and head dims, and that do not
    ("windows, small key blocks", FP16, 16),
    ("blocks of 24 and 36", FP32, 80),
    ("windows, blocks of two tiles", BF16, 64),
]
MORE = [(name, dtype, dim) for name in PLANS for dtype in (FP32, BF16, FP16) for dim in (1, 128)]


@pytest.mark.parametrize(("name", "dtype", "dim"), SIZES + (MORE if NIGHTLY else []), ids=str)
def test_any_plan_is_within_the_allowance(name, dtype, dim):
    plan = PLANS[name](CPU)
    assert_allowed(*inputs(plan, dtype, dim), plan, scale=dim**-0.5)


def test_a_gain_dampens_whole_scores():
    """With the scores of the common key, which here are most of them."""
    plan = random_plan(CPU)
    plan = plan.changed(gain=torch.linspace(0.1, 1, plan.keep.numel()).view(plan.keep.shape))
    q, k, v = inputs(plan, FP32)
    assert_allowed(q, k + 1, v, plan)


@pytest.mark.parametrize("kind", ["means", "outliers", "zeros", "vast"])
def test_whatever_the_numbers_are(kind):
    plan = random_plan(CPU, block_q=32, block_k=32)
    q, k, v = (x.clone() for x in inputs(plan, FP32))
    if kind == "means":
        k, v = k + 15, v - 4
    elif kind == "outliers":
        k[..., 3] *= 8
        q[..., 5] *= 6
        v[..., 2] *= 50
        for x in (k, v):
            x[:, :, ::19] *= 6
    elif kind == "zeros":
        k, v = k * 0, v * 1e-36
    else:
        v = v * 1e6  # beyond fp16
    assert_allowed(q, k, v, plan, slack=2 if kind == "outliers" else 0.05)


def test_keys_far_from_zero_need_their_common_key_taken_off():
    """Rounded as they are, they leave the allowance, so that it says something."""
    plan = Plan(torch.arange(128), torch.ones(1, 1, 4, 4, dtype=torch.bool), 32, 32)
    q, k, v = (x[0, 0].double() for x in inputs(plan, FP32, 64, 1, 1))
    k = k + 60
    exact = (q @ k.T / 8).softmax(-1) @ v

    def rounded(x):
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round() * step

    error = largest_error((rounded(q) @ rounded(k).T / 8).softmax(-1) @ v, exact)
    given = [x.float()[None, None] for x in (q, k, v)]
    allowed = allowance("triton_int8", *given, plan, scale=0.125)
    assert assert_allowed(*given, plan, scale=0.125) < allowed < error / 2


@pytest.mark.nightly
@pytest.mark.parametrize("coarse", ["", "sums"])
def test_the_deviation_that_is_derived_is_the_one_that_is_found(coarse):
    """Of what is rounded to 8 bits; and where scores are exact, of sums in fp16."""
    plan = Plan(torch.arange(256), torch.ones(1, 1, 8, 8, dtype=torch.bool), 32, 32)
    q, k, v = inputs(plan, FP32, 64, 1, 1)
    if coarse:
        q, v = q * 0, v + 2
    exact = reference.kernel.forward(q.double(), k.double(), v.double(), plan, scale=0.125)
    error = (kernel.forward(q, k, v, plan, scale=0.125).double() - exact)[0, 0]
    one = [x[0, 0] for x in (q, k, v)]
    weights = (one[0] @ one[1].T * 0.125).softmax(-1)
    derived = deviation(*one, weights, plan=plan, scale=0.125)
    ratio = (error.square().mean() / derived.square().mean()).sqrt()
    assert (0.05 if coarse else 0.7) < ratio < 1.2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, as the interpreter rounds NaN
def test_what_is_no_number_comes_out_where_it_is_seen():
    plan = Plan(torch.arange(160), torch.eye(4, dtype=torch.bool)[None, None], 40, 40)
    given = inputs(plan, FP32)
    clean = kernel.forward(*given, plan, scale=0.3)
    for which in range(3):
        changed = [x.clone() for x in given]
        changed[which][0, 0, 50, 2] = torch.nan
        out = kernel.forward(*changed, plan, scale=0.3)
        seen = torch.zeros(160, 16, dtype=torch.bool)
        rows = slice(50, 51) if which == 0 else slice(40, 80)
        seen[rows, 2 if which == 2 else slice(None)] = True
        assert out[0, 0].isnan().equal(seen)
        if which == 0:
            assert torch.equal(out[0, 0][~seen], clean[0, 0][~seen])


@pytest.mark.nightly
def test_piecewise_with_its_rest_runs_by_its_name():
    """All that is beside the kept keys by our Triton kernels too, and the answer checks itself."""
    video, method = (
        VideoShape(2, 6, 8, text=3),
        Piecewise(0.3, block_q=16, block_k=16, score="loss"),
    )
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, video.tokens, 32, generator=g).bfloat16() for _ in range(3))
    plan = method.plan_for(q, k, video=video, kernel="triton_int8")
    assert isinstance(plan.rest, Rest)
    out = kernels.run(q, k, v, plan, scale=32**-0.5, kernel="triton_int8")
    check_rows(q, k, v, plan, out, scale=32**-0.5, name="triton_int8", kernel=kernel)
    kept = kernels.run(q, k, v, plan.kept, scale=32**-0.5, kernel="triton_int8")
    assert not torch.equal(out, kept)
    by_name, plain = (
        attention(q, k, v, video=video, method=method, kernel=name)
        for name in ("triton_int8", "reference")
    )
    torch.testing.assert_close(by_name, plain, atol=2e-2, rtol=0)


class TestRefusals:
    def reasons(self, **options):
        facts = Facts(((1, 2, 64, 16),) * 3, (FP32,) * 3, (CPU,) * 3, **options)
        return kernel.unsupported(facts)

    @pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120", "interpreted"])
    def test_it_takes_what_it_takes(self, arch, monkeypatch):
        monkeypatch.setattr(configs, "architecture", lambda device: arch)
        assert self.reasons() == []

    @pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
    def test_other_cards_are_named(self, arch, monkeypatch):
        monkeypatch.setattr(configs, "architecture", lambda device: arch)
        (reason,) = self.reasons()
        assert reason.startswith("is for sm_120, sm_86, sm_89, whose products with sums in fp32 ")
        assert reason.endswith(f"got {arch}; kernel 'triton' does without")

    def test_training_and_a_cpu(self, monkeypatch, qkv):
        (reason,) = self.reasons(grad=True)
        assert "rounding has no gradient; train with kernel 'triton'" in reason
        monkeypatch.delenv("TRITON_INTERPRET")
        assert "needs a GPU" in self.reasons()[0]

    def test_auto_never_takes_it(self):
        for device in ("cpu", "cuda"):
            facts = Facts(((1, 2, 64, 16),) * 3, (BF16,) * 3, (torch.device(device),) * 3)
            assert "triton_int8" not in kernels.preference(facts)


def test_clocks_of_products_are_counted():
    """Of a tile of 16 x 32 and a head dim of 32: half of them in 8 bits, half with fp16 sums."""
    scores = ["IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4"] * 4
    values = ["HMMA.16816.F16 R4, R8, R12, R4"] * 8
    assert sass.clocks(scores) == 4 * 16
    assert sass.clocks(values) == 8 * 16
    assert sass.clocks(["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 16) == 16 * 32
    assert sass.multiply_adds(scores + values, 1) == 2 * 16 * 32 * 32
    [case] = [
        case
        for case in compile_matrix.cases("sm_89", 128, BF16, 64)
        if case.name == "int8 forward none"
    ]
    used = compile_matrix.Usage(200, 0, 49 << 10, 1.0, 9.0, 8, 8, 2, clocks=0.375)
    assert compile_matrix.fits(case, used, "sm_89")
    assert not compile_matrix.fits(case, used._replace(clocks=0.63), "sm_89")
    assert not any("int8" in case.name for case in compile_matrix.cases("sm_90", 64, BF16, 64))


@pytest.mark.nightly
@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120"])
def test_its_products_take_less_than_half_of_the_clocks_of_bf16(arch, tmp_path):
    """And nothing spills, at head dims 64 and 128 and blocks of 64 and 128."""
    matrix = str(ROOT / "tools" / "compile_matrix.py")
    options = ["--arch", arch, "--kernel", "int8"]
    done = run_python(matrix, *options, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if " int8 forward " in line]
    assert len(lines) == 2 * 2 * 8
    assert {float(line[-1]) for line in lines} == {0.38}
