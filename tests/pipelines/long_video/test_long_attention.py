"""Techniques for longer video that change attention: gains on scores, what an attachment lays over
its method, and UltraViCo, rotating anchors and window noise on top."""

import copy

import pytest
import torch
from support import wan
from support.checks import assert_no_worse
from support.methods import SPARSE, TESTED
from support.problems import assert_gradients_no_worse, random_plan
from support.products import in_turns
from support.triton_plans import assert_matches_reference, routed_plan
from support.triton_plans import inputs as triton_inputs
from torch import Tensor

from gen_accel import demo, kernels
from gen_accel.attention_processors import (
    Dense,
    Neighborhood,
    Radial,
    SparseLinear,
)
from gen_accel.attention_processors.attached.attachment import extend_attention
from gen_accel.attention_processors.attached.layer import AttentionExtension
from gen_accel.attention_processors.methods.dense import Full
from gen_accel.functional import attention
from gen_accel.kernels import facts_of, flex, gather, reference, routed, xformers
from gen_accel.kernels.lists import prepare
from gen_accel.kernels.self_check import SelfCheckFailed, check_rows
from gen_accel.kernels.triton import lists
from gen_accel.pipelines import Schedule
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.long_video import extend
from gen_accel.pipelines.long_video.rotating_anchors import RotatingAnchors
from gen_accel.pipelines.long_video.technique import key_blocks, query_blocks
from gen_accel.pipelines.long_video.ultravico import UltraViCo
from gen_accel.pipelines.long_video.window_noise import WindowNoise
from gen_accel.plan import Plan
from gen_accel.video import VideoShape

METHODS = {name: TESTED[name].longer for name in SPARSE}
LONG, TRAINED = 21, 9  # pixel frames of the tiny models: 6 and 3 latent frames


def dampened(plan: Plan, heads: int = 1) -> Plan:
    g = torch.Generator().manual_seed(3)
    gain = torch.rand((1, heads, *plan.keep.shape[2:]), generator=g) * 0.9 + 0.1
    return plan.changed(gain=gain.to(plan.slots.device))


PLANS = {
    "one pattern": lambda: dampened(random_plan("cpu")),
    "heads, small key blocks": lambda: dampened(random_plan("cpu", 1, 2, 16, 8), 2),
    "windows": lambda: dampened(random_plan("cpu", 1, 2, 16, 16, windows=True)),
    "route": lambda: dampened(routed_plan("cpu", 2, 2), 2),
}


def by(kernel, plan, scale=0.3):
    return lambda q, k, v: kernel.kernel.forward(q, k, v, plan, scale=scale)


class TestGain:
    def test_positive_scores_are_multiplied_and_no_other(self, qkv):
        gain = torch.tensor([[1.0, 0.5], [0.25, 1.0]])
        keep = torch.ones(1, 1, 2, 2, dtype=torch.bool)
        plan = Plan(torch.arange(32), keep, 16, 16, gain=gain[None, None])
        q, k, v = qkv(32, torch.float64)
        scores = q @ k.mT
        each = gain.double().repeat_interleave(16, 0).repeat_interleave(16, 1)
        wanted = torch.minimum(scores, scores * each)
        assert (wanted < scores).any()
        assert (scores < 0).any()
        expected = wanted.softmax(-1) @ v
        torch.testing.assert_close(reference.kernel.forward(q, k, v, plan, scale=1.0), expected)

    @pytest.mark.turns(5)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", PLANS)
    def test_gather_matches_reference(self, name, dtype, qkv):
        plan = PLANS[name]()
        q, k, v = qkv(plan.tokens, dtype)
        exact = by(reference, plan)(q.double(), k.double(), v.double())
        low = by(reference, plan)(q, k, v)
        assert_no_worse(by(gather, plan)(q, k, v), low, exact)

    @pytest.mark.turns(5)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", PLANS)
    def test_gradients_match_reference(self, name, dtype, qkv):
        plan = PLANS[name]()
        inputs = [x.bfloat16().float() for x in qkv(plan.tokens)]
        assert_gradients_no_worse(by(gather, plan), by(reference, plan), inputs, dtype)

    def test_gradients_are_those_of_differences(self, qkv):
        plan = PLANS["windows"]()
        inputs = qkv(plan.tokens, torch.float64, batch=1, dim=4, grad=True)
        assert torch.autograd.gradcheck(by(gather, plan), inputs, fast_mode=True)

    def test_operator_passes_the_checks_of_torch(self, qkv):
        prepared = prepare(PLANS["one pattern"]())
        slots = torch.randn(3, 1, 2, 128, 8).unbind()
        arguments = *(x.requires_grad_() for x in slots), *prepared[1:], 0.3, True, False
        checks = "test_schema", "test_faketensor", "test_autograd_registration"
        operator = torch.ops.gen_accel.gather_attention.default
        torch.library.opcheck(operator, arguments, test_utils=checks)

    @pytest.mark.turns(3)
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "dtype"), in_turns(PLANS, [torch.float32, torch.bfloat16]), ids=str
    )
    def test_triton_matches_reference(self, name, dtype):
        plan = PLANS[name]()
        assert_matches_reference(plan, triton_inputs(plan, dtype), lse_weight=0.1)

    def test_a_gain_of_ones_changes_nothing(self, qkv):
        plan = random_plan("cpu", 1, 2, windows=True)
        ones = plan.changed(gain=torch.ones(1, 1, *plan.keep.shape[2:]))
        inputs = qkv(plan.tokens)
        for kernel in (reference, gather):
            assert torch.equal(by(kernel, ones)(*inputs), by(kernel, plan)(*inputs))

    def test_kernels_without_gains_refuse_them(self, qkv):
        plan = PLANS["route"]()
        q, k, v = qkv(plan.tokens)
        for kernel in (flex, routed, xformers):
            reasons = kernel.kernel.unsupported(facts_of(q, k, v, plan))
            assert any("takes no gain" in reason for reason in reasons)
        chosen = []
        kernels.run(q, k, v, plan, scale=0.3, report=chosen.append)
        assert chosen[0].kernel == "gather"
        with pytest.raises(ValueError, match="routed: it takes no gain"):
            kernels.run(q, k, v, plan, scale=0.3, kernel="routed")

    def test_self_check_knows_gains(self, qkv):
        plan = PLANS["heads, small key blocks"]()
        q, k, v = qkv(plan.tokens)
        facts = {"scale": 0.3, "name": "gather"}
        check_rows(q, k, v, plan, by(gather, plan)(q, k, v), **facts)
        without = Plan(plan.slots, plan.keep, plan.block_q, plan.block_k)
        with pytest.raises(SelfCheckFailed):
            check_rows(q, k, v, plan, by(gather, without)(q, k, v), **facts)

    def test_shapes_and_heads_are_checked(self, qkv):
        plan = random_plan("cpu")
        with pytest.raises(ValueError, match="gain must be"):
            plan.changed(gain=torch.ones(1, 1, 3, 3))
        three = plan.changed(gain=torch.ones(1, 3, *plan.keep.shape[2:]))
        q, k, v = qkv(plan.tokens)
        with pytest.raises(ValueError, match="2 heads, the plan is for 3"):
            kernels.run(q, k, v, three, scale=1.0)

    def test_gains_come_on_top_of_each_other(self):
        plan = PLANS["one pattern"]()
        gain = torch.full_like(plan.gain, 0.5)
        assert torch.equal(plan.changed(gain=gain).gain, plan.gain * 0.5)
        assert plan.changed(keep=plan.keep).gain is plan.gain
        assert plan.to("meta").gain.device.type == "meta"


@pytest.mark.parametrize(("windows", "route"), [(True, False), (False, True), (False, False)])
def test_density_of_a_plan_with_fewer_blocks(windows, route):
    plan = random_plan("cpu", 2, 2, 16, 8, windows, route)
    plan = plan.changed(keep=plan.keep & (torch.rand(plan.keep.shape) < 0.5))
    seen = reference.pairs(plan) & plan.real[:, None]
    seen = seen.sum((-2, -1)).double().mean() / plan.tokens**2
    torch.testing.assert_close(plan.density, seen.item())


def test_changed_keeps_what_is_known():
    plan = SparseLinear(critical=0.3, block_q=16, block_k=16).plan(VideoShape(4, 6, 6))
    other = plan.changed(keep=plan.keep)
    assert other.dynamic
    assert other.places is plan.places
    assert other.real is plan.real


@pytest.mark.parametrize("video", [VideoShape(3, 12, 12), VideoShape(4, 5, 7, 9)], ids=str)
def test_full_is_dense_attention_in_blocks_of_one_frame(video, qkv):
    plan = Full().plan(video)
    q, k, v = qkv(video.tokens)
    exact = attention(q.double(), k.double(), v.double(), video=video, method=Dense())
    low = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    scale = q.shape[-1] ** -0.5
    assert_no_worse(gather.kernel.forward(q, k, v, plan, scale=scale), low, exact)
    blocks = query_blocks(plan, video)
    alone = blocks.text | (blocks.first == blocks.last)
    assert alone.all()
    assert plan.density == 1.0
    assert not (blocks.text & (blocks.last >= 0)).any()


@pytest.fixture(scope="module")
def model():
    return wan.transformer()


@pytest.fixture
def clean(model):
    """The model, found as it was left."""
    before, stock = wan.processors(model), wan.forward(model, 6, 10, 12)
    hooks = len(model._forward_pre_hooks)
    yield model
    assert all(a is b for a, b in zip(wan.processors(model), before, strict=True))
    assert torch.equal(wan.forward(model, 6, 10, 12), stock)
    assert len(model._forward_pre_hooks) == hooks


SIZES = 6, 10, 12  # latents, 6 x 5 x 6 tokens


class TestPaused:
    @pytest.mark.parametrize("method", METHODS.values(), ids=str)
    def test_runs_the_stock_attention_bit_for_bit(self, clean, method):
        stock = wan.forward(clean, *SIZES)
        with attach(clean, method) as handle:
            sparse = wan.forward(clean, *SIZES)
            records = dict(handle.records)
            with handle.paused():
                wan.forward(clean, *SIZES, time=500.0)
                assert torch.equal(wan.forward(clean, *SIZES), stock)
                with handle.paused():
                    pass
                assert torch.equal(wan.forward(clean, *SIZES), stock)
            assert handle.records == records
            assert handle.clock.step == 0
            assert torch.equal(wan.forward(clean, *SIZES), sparse)
            assert not torch.equal(sparse, stock)

    def test_has_the_gradients_of_the_stock_model(self, clean):
        stock = wan.gradients(clean, *SIZES)
        with attach(clean, Radial(block=16)) as handle, handle.paused():
            paused = wan.gradients(clean, *SIZES)
        assert all(torch.equal(paused[name], grad) for name, grad in stock.items())

    def test_ends_with_an_error(self, clean):
        with attach(clean, Radial(block=16)) as handle:
            sparse = wan.forward(clean, *SIZES)
            with pytest.raises(KeyError), handle.paused():
                raise KeyError
            assert torch.equal(wan.forward(clean, *SIZES), sparse)

    def test_pauses_a_technique_too(self, clean):
        stock = wan.forward(clean, *SIZES)
        with (
            extend(clean, "ultravico", num_frames=LONG, trained_frames=TRAINED),
            attach(clean, Radial(block=16)) as handle,
            handle.paused(),
        ):
            assert torch.equal(wan.forward(clean, *SIZES), stock)


def noting(seen, **options) -> AttentionExtension:
    def adjust(plan, video, step, steps):
        seen.append((type(plan.partial).__name__, video, step, steps))
        return plan

    return AttentionExtension("noting", 3, adjust=adjust, **options)


class TestSeam:
    def test_every_plan_goes_through_it(self, clean):
        for method in METHODS.values():
            seen = []
            with attach(clean, method, schedule=Schedule(dense_layers=1)):
                remove = extend_attention(clean, noting(seen))
                wan.forward(clean, *SIZES)
                remove()
                wan.forward(clean, *SIZES)
            assert len(seen) == wan.LAYERS
            assert {video for _, video, *_ in seen} == {VideoShape(6, 5, 6)}

    def test_what_is_dense_runs_as_full_attention(self, clean):
        stock = wan.forward(clean, *SIZES)
        with attach(clean, Dense()) as handle:
            remove = extend_attention(clean, noting([]))
            full = wan.forward(clean, *SIZES)
            record = next(iter(handle.records.values()))
            assert record.why_dense == "method is dense"
            assert record.choice.kernel == "gather"
            remove()
        torch.testing.assert_close(full, stock, rtol=1e-4, atol=1e-5)
        assert not torch.equal(full, stock)

    @pytest.mark.parametrize("method", [Radial(block=16), Dense()], ids=str)
    def test_does_nothing_on_a_grid_that_is_not_longer(self, clean, method):
        seen = []
        with attach(clean, method):
            plain = wan.forward(clean, 3, 10, 12)
            remove = extend_attention(clean, noting(seen))
            assert torch.equal(wan.forward(clean, 3, 10, 12), plain)
            remove()
        assert not seen

    def test_outlives_what_is_attached(self, clean):
        seen = []
        remove = extend_attention(clean, noting(seen))
        full = wan.forward(clean, *SIZES)
        with attach(clean, Radial(block=16)):
            sparse = wan.forward(clean, *SIZES)
            with attach(clean, Neighborhood((2, 3, 3))):
                wan.forward(clean, *SIZES)
        assert len(seen) == 3 * wan.LAYERS
        assert torch.equal(wan.forward(clean, *SIZES), full)
        handle = attach(clean, Radial(block=16))
        assert torch.equal(wan.forward(clean, *SIZES), sparse)
        remove()
        remove()
        assert torch.equal(wan.forward(clean, *SIZES), sparse)
        assert len(seen) == 5 * wan.LAYERS
        handle.detach()

    def test_counts_steps_where_it_needs_them(self, clean):
        seen = []
        remove = extend_attention(clean, noting(seen, needs_step=True))
        for time in (900.0, 900.0, 500.0):
            wan.forward(clean, *SIZES, time=time)
        remove()
        assert [step for *_, step, _ in seen[:: wan.LAYERS]] == [0, 0, 1]

    def test_refuses_a_second_one_of_the_same_name(self, clean):
        remove = extend_attention(clean, noting([]))
        with pytest.raises(ValueError, match="noting is on already"):
            extend_attention(clean, noting([]))
        remove()

    def test_is_copied_with_the_model(self, clean):
        with extend(clean, "ultravico", num_frames=LONG, trained_frames=TRAINED, alpha=0.5):
            extended = wan.forward(clean, *SIZES)
            twin = copy.deepcopy(clean)
        assert torch.equal(wan.forward(twin, *SIZES), extended)

    def test_half_a_pipeline_may_be_attached(self):
        pipe = wan.two_stage()
        before = wan.processors(pipe)
        handle = attach(pipe.transformer, Radial(block=16))
        remove = extend_attention(pipe, noting([]))
        owners = {id(p.owner) for p in wan.processors(pipe) if hasattr(p, "owner")}
        assert len(owners) == 2
        remove()
        handle.detach()
        assert all(a is b for a, b in zip(wan.processors(pipe), before, strict=True))

    @pytest.mark.turns(5)
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "method", [Radial(block=16), METHODS["sparse_linear"], Dense()], ids=str
    )
    def test_is_part_of_a_graph(self, clean, method):
        twin = copy.deepcopy(clean)
        with (
            attach(twin, method),
            extend(twin, UltraViCo(alpha=0.5), num_frames=LONG, trained_frames=TRAINED),
        ):
            eager = wan.forward(twin, *SIZES)
            compiled = torch.compile(twin, backend="eager", fullgraph=True, dynamic=False)
            torch.testing.assert_close(wan.forward(compiled, *SIZES), eager, rtol=1e-5, atol=1e-5)
        assert not torch.equal(wan.forward(twin, *SIZES), eager)

    @pytest.mark.slow
    def test_steps_are_refused_in_a_graph(self, clean):
        twin = copy.deepcopy(clean)
        with extend(twin, "rotating_anchors", num_frames=LONG, trained_frames=TRAINED):
            twin.compile_repeated_blocks(backend="eager")
            with pytest.raises(ValueError, match="rotating_anchors differs from step to step"):
                wan.forward(twin, *SIZES)
        with pytest.raises(ValueError, match="compiled already"):
            extend(twin, "rotating_anchors", num_frames=LONG, trained_frames=TRAINED)


class TestBlocks:
    def test_frames_of_blocks(self):
        video = VideoShape(4, 3, 4, text=5)
        plan = Radial("paper", block=8).plan(video)
        for blocks, block in ((query_blocks(plan, video), 8), (key_blocks(plan, video), 8)):
            for i, held in enumerate(plan.slots.view(-1, block).tolist()):
                frames = [token // 12 for token in held if 0 <= token < 48]
                assert blocks.text[i] == any(token >= 48 for token in held)
                if frames:
                    assert (blocks.first[i], blocks.last[i]) == (min(frames), max(frames))
                else:
                    assert (blocks.first[i], blocks.last[i]) == (4, -1)


class TestUltraViCo:
    def test_gain_by_distance(self):
        distance = torch.arange(10)
        plain = UltraViCo(alpha=0.9).gain(distance, 5)
        assert plain.tolist() == pytest.approx([1.0] * 3 + [0.9] * 7)
        periodic = UltraViCo(beta=0.6, period=6.0, period_width=1.0).gain(distance, 5)
        assert periodic.tolist() == pytest.approx([1.0] * 3 + [0.9] * 2 + [0.6] * 3 + [0.9] * 2)
        wide = UltraViCo(period=2.0, period_width=0.0).gain(distance, 5)
        assert wide.tolist() == pytest.approx([1.0] * 3 + [0.9, 0.6] * 3 + [0.9])

    @pytest.mark.parametrize("method", [Full(), Radial(block=32)], ids=str)
    def test_is_exact_where_blocks_hold_one_frame(self, method, qkv):
        video, trained = VideoShape(7, 4, 4), 3
        plan = UltraViCo(alpha=0.5).adjusted(method.plan(video), video, trained)
        q, k, v = qkv(video.tokens, torch.float64)
        scores = q @ k.mT * 0.3
        frame = torch.arange(video.tokens) // 16
        far = (frame[:, None] - frame).abs() > 1
        seen = attended(method.plan(video))
        seen &= ~((frame[:, None] == 0) & (frame >= trained))
        wanted = torch.where(far & (scores > 0), scores * 0.5, scores)
        wanted = wanted.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        torch.testing.assert_close(gather.kernel.forward(q, k, v, plan, scale=0.3), wanted)

    def test_blocks_at_the_edge_count_as_inside(self):
        video = VideoShape(8, 2, 2)
        plan = Radial("paper", block=8, decay_factor=100.0).plan(video)  # two frames in a block
        technique = UltraViCo(alpha=0.5, shorten_first=False)
        gain = technique.adjusted(plan, video, 3).gain[0, 0]
        block = torch.arange(4)
        nearest = ((block[:, None] - block).abs() * 2 - 1).clamp_min(0)
        assert torch.equal(gain, torch.where(nearest > 1, 0.5, 1.0))

    def test_text_keeps_its_scores(self):
        video = VideoShape(6, 4, 4, text=20)
        gain = UltraViCo().adjusted(Full().plan(video), video, 3).gain[0, 0]
        assert (gain[6:] == 1).all()
        assert (gain[:, 6:] == 1).all()
        assert (gain[0, 3:6] < 1).all()

    def test_costs_no_more_than_the_method(self):
        video = VideoShape(12, 8, 8)
        plan = Radial().plan(video)
        assert UltraViCo().adjusted(plan, video, 4).density <= plan.density
        whole = UltraViCo(shorten_first=False).adjusted(plan, video, 4)
        assert torch.equal(whole.keep, plan.keep)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"alpha": 0.0}, r"alpha must be in \(0, 1\], got 0"),
            ({"beta": 1.5}, "beta must be in"),
            ({"period": 0.0}, "period must be positive"),
            ({"period_width": -1.0}, "period_width must not be negative"),
        ],
    )
    def test_options_are_checked(self, options, message):
        with pytest.raises(ValueError, match=message):
            UltraViCo(**options)


def attended(plan: Plan) -> Tensor:
    """(N, N) bool, the pairs of tokens that a plan of one pattern keeps."""
    pairs = reference.pairs(plan)[0, 0]
    return pairs[plan.places][:, plan.places]


class TestRotatingAnchors:
    def test_a_rest_is_refused(self):
        """It would bring back what is hidden."""
        video = VideoShape(9, 4, 4)
        plan = Radial(rest="means").plan(video)
        with pytest.raises(ValueError, match=r"^rotating_anchors hides frames, which a rest"):
            RotatingAnchors().adjusted(plan, video, 3, 0)

    def test_every_frame_is_an_anchor_once_in_an_interval(self):
        technique = RotatingAnchors(window=1, first=2, interval=4)
        turns = torch.stack([technique.anchors(11, 5, step) for step in range(4)])
        assert turns[:, :2].all()
        assert (turns[:, 2:].sum(0) == 1).all()
        assert torch.equal(technique.anchors(11, 5, 4), turns[0])

    def test_frames_in_sight_are_about_the_trained_ones(self):
        assert RotatingAnchors().sizes(frames=81, trained=21) == (3, 7)
        assert RotatingAnchors(window=10).sizes(frames=81, trained=21) == (10, 81)
        assert RotatingAnchors(interval=5).sizes(frames=81, trained=21) == (3, 5)

    @pytest.mark.parametrize("step", [0, 1, 5])
    def test_window_and_anchors(self, step):
        video, side, interval = VideoShape(9, 3, 3), 1, 4
        technique = RotatingAnchors(window=side, first=1, interval=interval)
        plan = technique.adjusted(Full().plan(video), video, 4, step)
        seen = attended(plan)[::9, ::9]
        for f in range(9):
            start = min(max(f - side, 0), 6)
            wanted = {0, *range(start, start + 3), *range(step % interval, 9, interval)}
            assert set(seen[f].nonzero()[:, 0].tolist()) == wanted

    def test_text_sees_and_is_seen(self):
        video = VideoShape(9, 3, 3, text=4)
        seen = attended(RotatingAnchors().adjusted(Full().plan(video), video, 4, 0))
        assert seen[-4:].all()
        assert seen[:, -4:].all()

    @pytest.mark.parametrize(
        "method", [m for m in METHODS.values() if not isinstance(m, Radial)], ids=str
    )
    def test_nobody_is_left_with_nothing(self, method, qkv):
        video = VideoShape(8, 6, 6)
        technique = RotatingAnchors(window=0, first=0, interval=8)
        q, k, v = qkv(video.tokens)
        plans = []

        def kernel(q, k, v, plan):
            plans.append(technique.adjusted(plan, video, 4, 3))
            return kernels.run(q, k, v, plans[0], scale=0.3)

        out = method(q, k, v, video=video, kernel=kernel)
        seen = reference.pairs(plans[0])[..., plans[0].places, :].any(-1)
        assert seen.all()
        assert torch.isfinite(out).all()
        exact = reference.kernel.forward(*(x.double() for x in (q, k, v)), plans[0], scale=0.3)
        low = reference.kernel.forward(q, k, v, plans[0], scale=0.3)
        assert_no_worse(out, low, exact)

    def test_plans_are_remembered_for_a_step(self, clean):
        made = []
        with extend(clean, "rotating_anchors", num_frames=LONG, trained_frames=TRAINED):
            owner = clean.blocks[0].attn1.processor.owner
            adjust = owner.extensions[0].adjust
            video = VideoShape(*wan.GRID)
            plan = Full().plan(video)
            made = [adjust(plan, video, step, None) for step in (0, 0, 1, 0)]
        assert made[0] is made[1]
        assert made[0] is not made[2]
        assert torch.equal(made[0].keep, made[3].keep)

    @pytest.mark.parametrize("option", ["window", "first", "interval"])
    def test_options_are_checked(self, option):
        with pytest.raises(ValueError, match=f"{option} must"):
            RotatingAnchors(**{option: -1})


class TestWindowNoise:
    @pytest.mark.parametrize(
        ("frames", "trained", "stride"), [(12, 5, 2), (9, 4, 4), (7, 6, 1), (21, 9, None)]
    )
    def test_weights_are_a_partition_of_unity(self, frames, trained, stride):
        technique = WindowNoise(stride)
        weights = technique.weights(frames, trained)
        torch.testing.assert_close(weights.sum(0), torch.ones(frames), rtol=0, atol=2e-7)
        for row, start in zip(weights, technique.starts(frames, trained), strict=True):
            inside = row[start : start + trained]
            assert (inside > 0).all()
            assert row.count_nonzero() == trained
        assert technique.starts(frames, trained)[-1] + trained == frames

    def test_weights_are_triangles(self):
        first = WindowNoise(3).weights(9, 6)
        share = torch.tensor([1.0, 1.0, 1.0, 3 / 4, 2 / 4, 1 / 4])
        torch.testing.assert_close(first[0, :6], share)
        torch.testing.assert_close(first[1, 3:], share.flip(0))

    def test_noise_is_repeated_in_shuffled_runs(self):
        order = WindowNoise(3).order(17, 6, torch.Generator().manual_seed(1))
        assert order[:6].tolist() == [*range(6)]
        for start in (6, 9, 12):
            run, earlier = order[start : start + 3], order[start - 6 : start - 3]
            assert sorted(run.tolist()) == sorted(earlier.tolist())
        assert set(order[15:].tolist()) < set(order[9:12].tolist())
        again = WindowNoise(3).order(17, 6, torch.Generator().manual_seed(1))
        other = WindowNoise(3).order(17, 6, torch.Generator().manual_seed(2))
        assert torch.equal(order, again)
        assert not torch.equal(order, other)

    @pytest.mark.parametrize("text", [0, 7])
    def test_attention_is_the_mean_over_windows(self, text, qkv):
        video, trained = VideoShape(7, 2, 3, text), 4
        technique = WindowNoise(2)
        q, k, v = qkv(video.tokens, torch.float64)

        def attend(q, k, v, window):
            assert window == VideoShape(trained, 2, 3, text)
            assert q.shape[2] == window.tokens
            return (q @ k.mT).softmax(-1) @ v

        out = technique.fused(trained, attend, q, k, v, video)
        frame = torch.cat([torch.arange(42) // 6, torch.full((text,), -1)])
        wanted = torch.zeros_like(q)
        starts = technique.starts(7, trained)
        assert starts == [0, 2, 3]
        for start, share in zip(starts, technique.weights(7, trained).double(), strict=True):
            inside = (frame == -1) | ((frame >= start) & (frame < start + trained))
            scores = (q @ k.mT).masked_fill(~inside, -torch.inf)
            weight = torch.where(frame >= 0, share[frame], 1 / len(starts)) * inside
            wanted += scores.softmax(-1) @ v * weight[:, None]
        torch.testing.assert_close(out, wanted)

    def test_a_mean_of_ones_is_one(self, qkv):
        video = VideoShape(7, 2, 3)
        q, k, _ = qkv(video.tokens)

        def attend(q, k, v, window):
            return torch.ones_like(q)

        out = WindowNoise().fused(4, attend, q, k, q, video)
        torch.testing.assert_close(out, torch.ones_like(q), rtol=0, atol=3e-7)

    def test_noise_of_a_pipeline(self):
        pipe = wan.pipeline()
        shape = 1, 16, wan.HEIGHT, wan.WIDTH, LONG, torch.float32, torch.device("cpu")

        def draw(**options):
            generator = torch.Generator().manual_seed(7)
            return pipe.prepare_latents(*shape, generator=generator, **options)

        plain = draw()
        given = torch.randn_like(plain)
        with extend(pipe, WindowNoise(2), num_frames=LONG, trained_frames=TRAINED):
            noise = draw()
            assert torch.equal(draw(latents=given), given)
            short = pipe.prepare_latents(
                *shape[:4], TRAINED, *shape[5:], generator=torch.Generator().manual_seed(7)
            )
            assert short.shape[2] == 3
        assert torch.equal(noise[:, :, :3], plain[:, :, :3])
        for frame in range(3, 6):
            assert any(torch.equal(noise[:, :, frame], plain[:, :, one]) for one in range(3))
        assert "prepare_latents" not in vars(pipe)
        assert torch.equal(draw(), plain)

    @pytest.mark.slow
    def test_image_to_video_keeps_its_condition(self):
        pipe = wan.PIPELINES["image"]()
        with extend(pipe, "window_noise", num_frames=LONG, trained_frames=TRAINED):
            assert torch.isfinite(wan.generate(pipe, 1, num_frames=LONG)).all()
        wan.generate(pipe, 1)

    def test_refuses_what_it_cannot_do(self, model):
        with pytest.raises(ValueError, match="extend that instead"):
            extend(model, "window_noise", num_frames=LONG, trained_frames=TRAINED)
        pipe = wan.PIPELINES["video"]()
        with pytest.raises(ValueError, match="begins with noise alone"):
            extend(pipe, "window_noise", num_frames=LONG, trained_frames=TRAINED)
        assert "prepare_latents" not in vars(pipe)
        with pytest.raises(ValueError, match="stride must be at most the trained length 3"):
            extend(wan.pipeline(), WindowNoise(4), num_frames=LONG, trained_frames=TRAINED)
        with pytest.raises(ValueError, match="stride must be at least 1"):
            WindowNoise(0)


TECHNIQUES = ["ultravico", "rotating_anchors", "window_noise"]


class TestOnPipelines:
    @pytest.fixture(scope="class")
    def pipe(self):
        return wan.pipeline()

    @pytest.mark.slow
    @pytest.mark.parametrize("technique", TECHNIQUES)
    def test_goes_with_every_method_and_leaves_no_trace(self, pipe, technique):
        before = wan.processors(pipe)
        plain = wan.generate(pipe, num_frames=LONG)
        short = wan.generate(pipe, num_frames=TRAINED)
        with extend(pipe, technique, num_frames=LONG, trained_frames=TRAINED) as longer:
            assert technique in longer.describe()
            dense = wan.generate(pipe, num_frames=LONG)
            assert not torch.equal(dense, plain)
            assert torch.equal(wan.generate(pipe, num_frames=TRAINED), short)
            for method in METHODS.values():
                schedule = Schedule(dense_layers=1, dense_steps=1)
                with attach(pipe, method, schedule=schedule) as handle:
                    found = wan.generate(pipe, num_frames=LONG)
                    assert torch.isfinite(found).all()
                    kinds = {row.choice.kernel for row in handle.records.values()}
                    assert kinds <= {"gather", "routed"}
                    assert 0 < handle.summary().density <= 1
            assert torch.equal(wan.generate(pipe, num_frames=LONG), dense)
        assert all(a is b for a, b in zip(wan.processors(pipe), before, strict=True))
        assert torch.equal(wan.generate(pipe, num_frames=LONG), plain)

    @pytest.mark.parametrize("technique", TECHNIQUES)
    def test_before_and_after_attaching_is_the_same(self, pipe, technique):
        how = {"num_frames": LONG, "trained_frames": TRAINED}
        with extend(pipe, technique, **how), attach(pipe, METHODS["radial"]):
            first = wan.generate(pipe, num_frames=LONG)
        with attach(pipe, METHODS["radial"]), extend(pipe, technique, **how):
            assert torch.equal(wan.generate(pipe, num_frames=LONG), first)

    def test_anchors_cost_less_than_the_method(self, pipe):
        def share(*techniques):
            with attach(pipe, Radial(block=32)) as handle:
                if techniques:
                    with extend(pipe, techniques, num_frames=LONG, trained_frames=TRAINED):
                        wan.generate(pipe, num_frames=LONG)
                        return handle.summary().flops_share
                wan.generate(pipe, num_frames=LONG)
                return handle.summary().flops_share

        alone = share()
        assert share("rotating_anchors") < alone
        assert share("rotating_anchors", "ultravico") < alone
        assert share("ultravico") <= alone

    def test_techniques_that_exclude_each_other(self, pipe):
        for other in ("ultravico", "rotating_anchors"):
            for pair in ((other, "window_noise"), ("window_noise", other)):
                with pytest.raises(ValueError, match="does not go with"):
                    extend(pipe, pair, num_frames=LONG, trained_frames=TRAINED)

    def test_trains_through_a_gain(self, clean):
        stock = wan.gradients(clean, *SIZES)
        with extend(clean, "ultravico", num_frames=LONG, trained_frames=TRAINED, alpha=0.3):
            grads = wan.gradients(clean, *SIZES)
        assert all(torch.isfinite(grad).all() for grad in grads.values())
        assert any(not torch.equal(grads[name], grad) for name, grad in stock.items())


@pytest.mark.turns(5)
@pytest.mark.slow
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_demo_model_generates_longer(technique):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    given = {
        "prompt": "a red square moves right",
        "height": 96,
        "width": 96,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "max_sequence_length": 16,
        "output_type": "latent",
    }

    def generator():
        return torch.Generator().manual_seed(0)

    with extend(pipe, technique, num_frames=49) as longer, attach(pipe, Radial()):
        latents = longer(**given, generator=generator()).frames
    assert latents.shape[2] == 13
    assert torch.isfinite(latents).all()
    with attach(pipe, Radial()):
        plain = pipe(**given, num_frames=49, generator=generator()).frames
    assert not torch.equal(latents, plain)


def test_lists_carry_the_gain():
    plan = PLANS["one pattern"]()
    assert torch.equal(lists.prepare(plan).gain, plan.gain)
    assert lists.prepare(random_plan("cpu")).gain is None
