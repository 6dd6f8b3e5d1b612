import re

import pytest
import torch
import torch.nn.functional as F
from support.checks import assert_no_worse
from support.methods import CASES, TESTED
from support.problems import (
    PLANS,
    all_picked,
    allowed,
    assert_gradients_no_worse,
    blind,
    differentiates,
    random_plan,
)
from support.products import in_turns, pairs
from support.videos import VIDEOS

from gen_accel import kernels
from gen_accel.attention_processors import (
    Dense,
    Neighborhood,
    Radial,
)
from gen_accel.functional import attention
from gen_accel.kernels import (
    KERNELS,
    allowance,
    facts_of,
    flex,
    gather,
    kernel_of,
    native,
    reference,
    routed,
)
from gen_accel.kernels.lists import prepare
from gen_accel.memory import PLAN_CACHE
from gen_accel.plan import Plan, Route, pack, raster_slots, tile_slots, unpack
from gen_accel.video import VideoShape

pytestmark = pytest.mark.usefixtures("poison")


# FlexAttention is compiled for every plan, at seconds each, and routed takes few plans: both have
# tests of their own below. Triton needs its interpreter, fa4, natten and xformers a GPU: they have
# files of their own. Any other kernel is held to the reference here.
ELSEWHERE = ("fa4", "flex", "natten", "routed", "triton", "triton_int8", "xformers")
AT_ONCE = [name for name in KERNELS if name not in ELSEWHERE]
HELD = [name for name in AT_ONCE if name != "reference"]
TRAINED = [name for name in HELD if differentiates(name)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FLEX_CASES = [
    pytest.param(
        Neighborhood((2, 3, 2), stride=(1, 1, 2), dilation=(1, 2, 1)),
        VideoShape(3, 7, 5, text=13),
        torch.float32,
        id="windows, ragged, with text",
        marks=pytest.mark.nightly,
    ),
    pytest.param(
        Radial(block=128),
        VideoShape(50, 5, 6),  # two frames of queries in a tile, one of keys
        torch.float32,
        id="different blocks, ragged",
        marks=pytest.mark.nightly,
    ),
    pytest.param(
        Radial("code-2025-11", block=32),
        VideoShape(5, 9, 10, text=7),
        torch.bfloat16,
        id="raster, with text, bf16",
        marks=pytest.mark.nightly,
    ),
    pytest.param(
        Neighborhood((-1, 4, 5), is_causal=(True, False, False)),
        VideoShape(5, 9, 10),
        torch.bfloat16,
        id="causal windows, ragged, bf16",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(
    ("method", "kernel", "video", "dtype", "dim"),
    pairs(CASES, HELD, VIDEOS, DTYPES, (16, 64)),
    ids=str,
)
def test_forward_matches_reference(kernel, method, video, dtype, dim, qkv):
    q, k, v = qkv(video.tokens, dtype, dim=dim)
    case = {"video": video, "method": method}
    exact = attention(q.double(), k.double(), v.double(), kernel="reference", **case)
    low = attention(q, k, v, kernel="reference", **case)
    more = allowed(kernel, method, video, q, k, v)
    assert_no_worse(attention(q, k, v, kernel=kernel, **case), low, exact, more=more)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dtype"), in_turns(CASES, DTYPES), ids=str)
def test_the_reference_gives_numbers(method, dtype, qkv, video):
    """All else is held to it, and it to slow loops in test_properties.py and for each method."""
    q, k, v = qkv(video.tokens, dtype, grad=True)
    out = attention(q, k, v, video=video, method=method, kernel="reference")
    assert (out.dtype, out.shape) == (dtype, q.shape)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(x).all() for x in (out, *grads))


@pytest.mark.parametrize(
    ("method", "kernel", "video", "dtype"), pairs(CASES, TRAINED, VIDEOS, DTYPES[:2]), ids=str
)
def test_gradient_matches_reference(kernel, method, video, dtype, qkv):
    def by(name):
        return lambda q, k, v: attention(q, k, v, video=video, method=method, kernel=name)

    # Of values that both precisions hold, so that both pick the same blocks.
    inputs = [x.bfloat16().float() for x in qkv(video.tokens)]
    assert_gradients_no_worse(by(kernel), by("reference"), inputs, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "method",
    [case for case in TESTED["block_mixture"].cases if case.routing == "token"],
    ids=str,
)
def test_routed_matches_reference(method, dtype, qkv, video):
    q, k, v = qkv(video.tokens, dtype)
    case = {"video": video, "method": method}

    def by(name):
        return lambda q, k, v: attention(q, k, v, kernel=name, **case)

    exact, low = by("reference")(q.double(), k.double(), v.double()), by("reference")(q, k, v)
    assert_no_worse(by("routed")(q, k, v), low, exact)
    assert_gradients_no_worse(by("routed"), by("reference"), qkv(video.tokens))


@pytest.mark.usefixtures("native_kernel")
def test_routed_refuses_what_its_queries_did_not_pick_alone(qkv, device):
    inputs = qkv(93)
    plan = random_plan(device, route=True)  # which keeps less than its queries picked
    for kernel in (routed, native):
        assert "leaves out" in kernel.kernel.unsupported(facts_of(*inputs, plan))[0]
    assert (
        "each query picks" in routed.kernel.unsupported(facts_of(*inputs, random_plan(device)))[0]
    )
    whole = all_picked(plan)
    assert routed.kernel.unsupported(facts_of(*inputs, whole)) == []
    exact = reference.kernel.forward(*(x.double() for x in inputs), whole, scale=0.3)
    low = reference.kernel.forward(*inputs, whole, scale=0.3)
    assert_no_worse(routed.kernel.forward(*inputs, whole, scale=0.3), low, exact)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("method", "video", "dtype"), FLEX_CASES)
def test_compiled_flex_matches_reference(method, video, dtype, qkv):
    q, k, v = qkv(video.tokens, dtype)
    case = {"video": video, "method": method}
    exact = attention(q.double(), k.double(), v.double(), kernel="reference", **case)
    low = attention(q, k, v, kernel="reference", **case)
    with torch.no_grad():
        assert_no_worse(attention(q, k, v, kernel="flex", **case), low, exact)


@pytest.mark.slow
@pytest.mark.parametrize("method", [Radial(), Neighborhood((-1, 5, 6))], ids=str)
def test_long_clip_matches_reference(method, qkv):
    video = VideoShape(33, 12, 12)
    q, k, v = qkv(video.tokens, batch=1, heads=1)
    case = {"video": video, "method": method}
    exact = attention(q.double(), k.double(), v.double(), kernel="reference", **case)
    low = attention(q, k, v, kernel="reference", **case)
    assert_no_worse(attention(q, k, v, kernel="gather", **case), low, exact)


def plan_for(kernel, device, **options):
    """A random plan that the kernel takes."""
    plan = random_plan(device, **options)
    if kernel in ("native", "int8") and isinstance(plan.partial, Route):
        return all_picked(plan)
    return plan


@pytest.mark.parametrize("options", PLANS)
@pytest.mark.parametrize("kernel", HELD)
def test_any_plan_matches_reference(kernel, options, qkv, device):
    plan = plan_for(kernel, device, **options)
    q, k, v = qkv(plan.tokens)
    exact = reference.kernel.forward(q.double(), k.double(), v.double(), plan, scale=0.3)
    low = reference.kernel.forward(q, k, v, plan, scale=0.3)
    more = allowance(kernel, q, k, v, plan, scale=0.3)
    out = kernels.run(q, k, v, plan, scale=0.3, kernel=kernel)
    assert_no_worse(out, low, exact, more=more)


@pytest.mark.parametrize("options", PLANS)
@pytest.mark.parametrize("kernel", TRAINED)
def test_gradient_of_any_plan_matches_reference(kernel, options, qkv, device):
    plan = plan_for(kernel, device, **options)

    def by(name):
        return lambda q, k, v: kernels.run(q, k, v, plan, scale=0.3, kernel=name)

    assert_gradients_no_worse(by(kernel), by("reference"), qkv(plan.tokens))


@pytest.mark.parametrize("options", PLANS)
@pytest.mark.parametrize("kernel", AT_ONCE)
def test_a_query_that_sees_nothing_is_zero_and_so_is_its_gradient(kernel, options, qkv, device):
    plan = plan_for(kernel, device, **options)
    dark = blind(plan)
    assert dark.any(-1).all()
    assert (~dark).any(-1).all()
    q, k, v = qkv(plan.tokens, grad=differentiates(kernel))
    out = kernels.run(q, k, v, plan, scale=0.3, kernel=kernel)
    assert torch.isfinite(out).all()
    assert (out[dark] == 0).all()
    if not differentiates(kernel):
        return
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (grads[0][dark] == 0).all()
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("kernel", AT_ONCE)
def test_a_plan_that_keeps_nothing_gives_zeros(kernel, qkv, device):
    keep = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    plan = Plan(torch.arange(64), keep, 16, 16).to(device)
    q, k, v = qkv(64, grad=differentiates(kernel))
    out = kernels.run(q, k, v, plan, scale=0.3, kernel=kernel)
    assert (out == 0).all()
    if not differentiates(kernel):
        return
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_with_tiles_and_without(dtype, windows, tiles, monkeypatch, qkv, device):
    monkeypatch.setattr(gather, "has_tiles", lambda device: tiles and device.type == "cpu")
    monkeypatch.setattr(gather, "LARGE", 1)
    plan = random_plan(device, batch=2, heads=2, block_k=32, windows=windows)
    q, k, v = (x.to(dtype) for x in qkv(plan.tokens))
    assert gather._fuses(q, plan.block_q) == (tiles and device.type == "cpu")
    exact = reference.kernel.forward(q.double(), k.double(), v.double(), plan, scale=0.3)
    low = reference.kernel.forward(q, k, v, plan, scale=0.3)
    assert_no_worse(gather.kernel.forward(q, k, v, plan, scale=0.3), low, exact)


def test_memory_for_groups_is_kept_up_to_a_size(monkeypatch, qkv, device):
    plan = random_plan(device, batch=2, heads=2, block_k=32, windows=True)
    q, k, v = qkv(plan.tokens)
    first = gather.kernel.forward(q, k, v, plan, scale=0.3)
    with torch.inference_mode():
        assert torch.equal(gather.kernel.forward(q, k, v, plan, scale=0.3), first)
    q.requires_grad_()
    again = gather.kernel.forward(q, k, v, plan, scale=0.3)
    assert torch.equal(torch.autograd.grad(again.sum(), q)[0], gradient(q, k, v, plan))
    if device.type == "cpu":
        assert gather._kept.memory
        monkeypatch.setattr(gather, "KEPT", 0)
        assert torch.equal(gather.kernel.forward(q, k, v, plan, scale=0.3), first)
        assert not gather._kept.memory


def gradient(q, k, v, plan):
    out = gather.kernel.forward(q, k, v, plan, scale=0.3)
    return torch.autograd.grad(out.sum(), q)[0]


@pytest.mark.parametrize("group", [1, 3000, 1 << 30], ids="{} bytes in a group".format)
def test_the_size_of_a_group_does_not_change_the_answer(group, monkeypatch, qkv, device):
    plan = random_plan(device, batch=2, heads=2, block_k=32, windows=True)
    q, k, v = qkv(plan.tokens)
    exact = reference.kernel.forward(q.double(), k.double(), v.double(), plan, scale=0.3)
    low = reference.kernel.forward(q, k, v, plan, scale=0.3)
    monkeypatch.setattr(gather, "GROUP", group)
    assert_no_worse(gather.kernel.forward(q, k, v, plan, scale=0.3), low, exact)


@pytest.mark.parametrize("kernel", AT_ONCE)
def test_views_of_a_projection_are_taken_as_they_are(kernel, qkv, video):
    """Models hand over (B, N, H, D) with two axes swapped, three views of one tensor."""
    method = Radial(block=16)
    plain = qkv(video.tokens)
    fused = torch.stack([x.transpose(1, 2) for x in plain], dim=3)
    views = [x.transpose(1, 2) for x in fused.unbind(3)]
    assert not any(x.is_contiguous() for x in views)

    def by(name):
        return lambda q, k, v: attention(q, k, v, video=video, method=method, kernel=name)

    torch.testing.assert_close(by(kernel)(*views), by(kernel)(*plain), rtol=0, atol=0)
    if differentiates(kernel):
        assert_gradients_no_worse(by(kernel), by("reference"), views)


@pytest.mark.parametrize("kernel", AT_ONCE)
def test_dropped_keys_do_not_change_a_bit(kernel, qkv, device):
    plan = Plan(torch.arange(64), torch.eye(4, dtype=torch.bool)[None, None], 16, 16).to(device)
    q, k, v = qkv(64)
    before = kernels.run(q, k, v, plan, scale=0.3, kernel=kernel)
    k, v = k.clone(), v.clone()
    k[:, :, 16:], v[:, :, 16:] = 7.0, 7.0
    after = kernels.run(q, k, v, plan, scale=0.3, kernel=kernel)
    assert torch.equal(after[:, :, :16], before[:, :, :16])
    assert not torch.equal(after, before)


@pytest.mark.parametrize("kernel", AT_ONCE)
def test_keys_outside_a_window_do_not_change_a_bit(kernel, qkv, video):
    method = Neighborhood((1, 3, 3))
    q, k, v = qkv(video.tokens)
    before = attention(q, k, v, video=video, method=method, kernel=kernel)
    k, v = k.clone(), v.clone()
    second = slice(video.height * video.width, 2 * video.height * video.width)
    k[:, :, second], v[:, :, second] = 7.0, 7.0
    after = attention(q, k, v, video=video, method=method, kernel=kernel)
    same = (after == before).all(-1)
    assert same[:, :, : second.start].all()
    assert same[:, :, second.stop : video.video_tokens].all()
    assert not same[:, :, second].any()
    assert not same[:, :, video.video_tokens :].any()  # text sees every frame


@pytest.mark.parametrize(("method", "kernel", "video"), pairs(CASES, AT_ONCE, VIDEOS), ids=str)
def test_other_samples_do_not_change_the_answer(kernel, method, video, qkv):
    q, k, v = qkv(video.tokens)
    case = {"video": video, "method": method, "kernel": kernel}
    together = attention(q, k, v, **case)
    other = [torch.cat([x[:1], torch.full_like(x[1:], 3.0)]) for x in (q, k, v)]
    beside_others = attention(*other, **case)
    if not method.is_dynamic:
        assert torch.equal(beside_others[0], together[0])
    # Alone, or beside a sample that picks other blocks, products may be summed in another order.
    exact = attention(q.double(), k.double(), v.double(), **case | {"kernel": "reference"})
    alone = attention(q[:1], k[:1], v[:1], **case)
    assert_no_worse(alone, together[:1], exact[:1])
    assert_no_worse(beside_others[:1], together[:1], exact[:1])


@pytest.mark.parametrize(
    "method",
    [
        Dense(),
        Neighborhood((-1, -1, -1)),
        Radial(decay_factor=1e4, block=32),
        Radial("paper", decay_factor=1e4, block=32),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", AT_ONCE)
def test_a_full_window_is_dense_attention(kernel, method, qkv, video):
    q, k, v = qkv(video.tokens)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    out = attention(q, k, v, video=video, method=method, kernel=kernel)
    more = allowed(kernel, method, video, q, k, v)
    assert_no_worse(out, F.scaled_dot_product_attention(q, k, v), exact, more=more)


@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
@pytest.mark.parametrize("kernel", AT_ONCE)
def test_every_finite_scale_is_taken(kernel, scale, qkv, video):
    q, k, v = qkv(video.tokens)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)
    low = F.scaled_dot_product_attention(q, k, v, scale=scale)
    case = {"video": video, "method": Dense(), "kernel": kernel, "scale": scale}
    more = allowed(kernel, Dense(), video, q, k, v, scale)
    assert_no_worse(attention(q, k, v, **case), low, exact, more=more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kernel", "video"), pairs(CASES, [*TRAINED, "reference"], VIDEOS), ids=str
)
def test_a_plan_built_while_sampling_serves_training(kernel, method, video, qkv):
    PLAN_CACHE.forget()
    case = {"video": video, "method": method, "kernel": kernel}
    with torch.inference_mode():
        attention(*qkv(video.tokens), **case)
    plan = method.plan(video, qkv(1)[0].device)
    assert not plan.slots.is_inference()
    assert not plan.keep.is_inference()
    inputs = qkv(video.tokens, grad=True)
    grads = torch.autograd.grad(attention(*inputs, **case).sum(), inputs)
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("kernel", ["auto", "gather", "native", "int8"])
def test_forward_mode_is_for_the_reference(kernel, qkv):
    """Whose tangents are right; torch takes those of the others for zero."""
    video, method = VideoShape(3, 4, 5, text=3), Radial(block=16)
    q, k, v = (x.double() for x in qkv(video.tokens))
    way = torch.randn_like(q)

    def answer(q):
        return attention(q, k, v, video=video, method=method, kernel=kernel)

    if kernel != "auto":
        with pytest.raises(ValueError, match=f"{kernel}: .*no forward-mode derivative"):
            torch.func.jvp(answer, (q,), (way,))
        return
    _, found = torch.func.jvp(answer, (q,), (way,))
    close = (answer(q + 1e-4 * way) - answer(q - 1e-4 * way)) / 2e-4
    torch.testing.assert_close(found, close, rtol=1e-5, atol=1e-6)
    assert found.abs().max() > 1e-2


def test_logsumexp_is_that_of_the_scores(qkv, video):
    q, k, _ = qkv(video.tokens, torch.float64)
    got = reference.logsumexp(q, k, Dense().plan(video, q.device), scale=0.25)
    torch.testing.assert_close(got, (0.25 * q @ k.mT).logsumexp(-1))


@pytest.mark.parametrize("asked", [(False, False), (True, False), (True, True)], ids=str)
def test_the_operator_obeys_the_rules_of_torch(asked, qkv, device):
    """`asked`: for the log-sum-exp, and for a wide output."""
    plan = random_plan(device, block_q=8, block_k=32, windows=True)
    q, k, v = (pack(x, plan).detach() for x in qkv(plan.tokens))
    _, *lists = prepare(plan)
    which = "test_schema", "test_faketensor", "test_autograd_registration"
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(gather._attention, (*inputs, *lists, 0.25, *asked), test_utils=which)
    lse = torch.ones(q.shape[:3]) if any(asked) else None
    inputs = [torch.ones_like(q), lse, *(x.detach() for x in inputs)]
    torch.library.opcheck(gather._backward, (*inputs, *lists, 0.25), test_utils=which[:2])


@pytest.mark.parametrize("kernel", AT_ONCE)
@pytest.mark.parametrize("windows", [False, True], ids=["blocks alone", "windows"])
def test_a_compiled_function_runs_it_as_it_is(windows, kernel, qkv, device):
    """Between two graphs, forward and backward."""
    plan = random_plan(device, heads=2, windows=windows)
    told = []

    def plain(q, k, v):
        return reference.kernel.forward(q * 2, k, v, plan, scale=0.3).cos()

    @torch.compile(backend="aot_eager")
    def inside(q, k, v):
        report = told.append
        out = kernels.run(q * 2, k, v, plan, scale=0.3, kernel=kernel, report=report)
        return out.cos()

    if differentiates(kernel):
        assert_gradients_no_worse(inside, plain, qkv(plan.tokens))
    else:
        q, k, v = qkv(plan.tokens)
        out = kernels.run(q * 2, k, v, plan, scale=0.3, kernel=kernel)
        assert torch.equal(inside(q, k, v), out.cos())
    assert {choice.kernel for choice in told} == {kernel}


class TestChoice:
    """Which kernel runs, and what is said about it."""

    plan = Plan(torch.arange(64), torch.ones(1, 1, 4, 4, dtype=torch.bool), 16, 16)

    @pytest.fixture(autouse=True)
    def cpu(self, monkeypatch):
        """These are about reasons, most of which only the CPU has."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    @pytest.fixture
    def broken(self, monkeypatch):
        """A FlexAttention that fails to compile, and that "auto" likes best; counts the tries."""
        tries = []

        def fresh(options, *, lse):
            def run(*args):
                tries.append(options)
                raise RuntimeError("cur_qSplitSize7 was not declared\nand much more")

            return run

        order = ("flex", "gather", "reference")
        monkeypatch.setattr(flex, "_fresh", fresh)
        monkeypatch.setattr(flex, "cpp_compiler", lambda: "g++")
        monkeypatch.setattr(kernels, "preference", lambda facts: dict.fromkeys(order, "slow"))
        return tries

    @pytest.fixture
    def fresh_plan(self):
        return Plan(self.plan.slots, self.plan.keep, 16, 16)

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_preference_names_kernels_that_exist(self, kernel, qkv):
        facts = facts_of(*qkv(64), self.plan)
        placed = kernel_of(kernel).place(facts) is not None
        assert (kernel in kernels.preference(facts)) == placed

    @pytest.mark.parametrize("kernel", ["gather", "reference"])
    def test_the_compiler_free_ones_refuse_nothing(self, kernel, qkv):
        facts = facts_of(*qkv(64, torch.float64, grad=True), self.plan)
        assert kernels.unsupported(kernel, facts) == []

    @pytest.mark.parametrize("which", range(3), ids="qkv".__getitem__)
    def test_flex_says_that_it_has_no_backward(self, which, qkv):
        inputs = qkv(64)
        inputs[which].requires_grad_()
        assert any(
            "no backward" in why for why in flex.kernel.unsupported(facts_of(*inputs, self.plan))
        )
        with pytest.raises(ValueError, match=r"flex: FlexAttention has no backward on the CPU"):
            kernels.run(*inputs, self.plan, scale=0.3, kernel="flex")

    def test_flex_lists_all_its_reasons(self, qkv):
        inputs = qkv(64, torch.float64, grad=True)
        assert len(flex.kernel.unsupported(facts_of(*inputs, self.plan))) == 2
        with pytest.raises(ValueError, match=r"no backward on the CPU; .* no float64"):
            kernels.run(*inputs, self.plan, scale=0.3, kernel="flex")

    def test_an_unknown_name_is_answered_with_the_nearest(self, qkv):
        case = {"video": VideoShape(1, 8, 8), "method": Dense()}
        with pytest.raises(ValueError, match=r"'auto' or one of .*did you mean 'gather'"):
            attention(*qkv(64), kernel="gater", **case)
        with pytest.raises(ValueError, match=r"one of .*got 'zzz'$"):
            attention(*qkv(64), kernel="zzz", **case)

    def test_auto_reports_what_it_took(self, qkv):
        told = []
        kernels.run(*qkv(64), self.plan, scale=0.3, report=told.append)
        assert [(choice.kernel, choice.refused) for choice in told] == [("gather", {})]
        assert list(told[0].behind) == [
            "routed",
            "flex",
            "triton",
            "fa4",
            "xformers",
            "natten",
            "native",
            "reference",
        ]
        assert re.fullmatch(r"gather \(not routed: .*; reference: .*\)", str(told[0]))

    @pytest.mark.parametrize(
        ("sizes", "match"),
        [
            ({"batch": 3}, "q has 3 samples, the plan is for 2"),
            ({"heads": 4}, "q has 4 heads, the plan is for 2"),
            ({"tokens": 92}, "q has 92 tokens, the plan is for 93"),
        ],
    )
    def test_a_plan_for_something_else_is_refused(self, sizes, match, qkv, device):
        plan = random_plan(device, batch=2, heads=2)
        with pytest.raises(ValueError, match=match):
            kernels.run(*qkv(**{"tokens": 93} | sizes), plan, scale=0.3)

    def test_picks_for_other_heads_are_refused(self, qkv, device):
        plan = random_plan(device, heads=1, route=True)
        picks = plan.partial.picks.expand(1, 3, -1, -1)
        other = Plan(plan.slots, plan.keep, 16, 16, Route(picks, plan.partial.group, 16))
        with pytest.raises(ValueError, match="q has 2 heads, the plan is for 3"):
            kernels.run(*qkv(93), other, scale=0.3)

    def test_a_named_kernel_passes_over_none(self, qkv):
        told = []
        kernels.run(*qkv(64), self.plan, scale=0.3, kernel="gather", report=told.append)
        assert str(told[0]) == "gather"

    def test_auto_goes_on_when_a_compilation_fails(self, broken, fresh_plan, qkv):
        told = []
        inputs = qkv(64)
        for _ in range(2):
            out = kernels.run(*inputs, fresh_plan, scale=0.3, report=told.append)
            assert torch.equal(out, gather.kernel.forward(*inputs, fresh_plan, scale=0.3))
        assert len(broken) == 1  # the second call knows
        reason = "compilation failed: RuntimeError: cur_qSplitSize7 was not declared"
        assert flex.kernel.unsupported(facts_of(*inputs, fresh_plan)) == [reason]
        assert [choice.kernel for choice in told] == ["gather", "gather"]
        assert [choice.refused for choice in told] == [{"flex": [reason]}] * 2
        assert str(told[0]) == f"gather (not flex: {reason}; reference: slow)"

    def test_another_shape_is_tried_again(self, broken, fresh_plan, qkv):
        for batch in (1, 2):
            kernels.run(*qkv(64, batch=batch), fresh_plan, scale=0.3)
        assert len(broken) == 2

    def test_a_named_kernel_never_falls_back(self, broken, fresh_plan, qkv):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"flex: compilation failed.*cur_qSplitSize7"):
                kernels.run(*qkv(64), fresh_plan, scale=0.3, kernel="flex")
        assert len(broken) == 1

    @pytest.mark.slow
    @pytest.mark.usefixtures("compiler")
    def test_flex_is_compiled_once_for_a_plan_and_shape(self, fresh_plan, qkv):
        before = len(flex.compile_seconds)
        inputs = qkv(64, grad=True)
        with torch.no_grad():
            outs = [kernels.run(*inputs, fresh_plan, scale=0.3, kernel="flex") for _ in range(2)]
        assert torch.equal(*outs)
        assert len(flex.compile_seconds) == before + 1


def test_pack_and_unpack_are_inverse(qkv, device):
    plan = random_plan(device)
    x = qkv(plan.tokens)[0]
    packed = pack(x, plan)
    assert torch.equal(unpack(packed, plan), x)
    assert torch.equal(packed[:, :, ~plan.real], x[:, :, :1].expand(-1, -1, 35, -1))


@pytest.mark.parametrize("tile", [(1, 2, 2), (2, 4, 8), (3, 2, 5)], ids=str)
def test_tiles_hold_every_token_once_and_text_apart(tile, video):
    slots = tile_slots(video, tile)
    held = slots[slots >= 0]
    assert torch.equal(held.sort().values, torch.arange(video.tokens))
    block = tile[0] * tile[1] * tile[2]
    assert len(slots) % block == 0
    is_text = (slots >= video.video_tokens).view(-1, block)
    assert ((slots.view(-1, block) >= 0) == is_text)[is_text.any(-1)].all()


def test_a_raster_plan_only_pads():
    slots = raster_slots(VideoShape(3, 7, 5, text=13), 32)
    assert torch.equal(slots, torch.cat([torch.arange(118), torch.full((10,), -1)]))


@pytest.mark.parametrize("shape", [(1, 1, 4, 3), (1, 1, 3, 4), (1, 1, 4)], ids=str)
def test_a_plan_whose_blocks_do_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"keep must be .*S=64, block_q=16"):
        Plan(torch.arange(64), torch.ones(shape, dtype=torch.bool), 16, 16)
