"""Plans as GPUs get them, made on the CPU: blocks that suit kernels, and what they keep."""

from itertools import product

import pytest
import torch

from gen_accel.attention_processors import Neighborhood, Radial
from gen_accel.attention_processors.methods import neighborhood, radial
from gen_accel.attention_processors.methods.blocks import full_tiles, tokens_of_tile
from gen_accel.kernels import reference
from gen_accel.pipelines.long_video.rotating_anchors import RotatingAnchors
from gen_accel.pipelines.long_video.ultravico import UltraViCo
from gen_accel.plan import Windows, unpack
from gen_accel.video import VideoShape

# Sizes of frames in tokens of Wan, HunyuanVideo, CogVideoX and LTX, and what divides by nothing.
FRAMES = [(30, 52), (45, 80), (34, 60), (48, 80), (44, 80), (22, 40), (41, 67)]


def token_pairs(plan):
    """(N, N) bool, which tokens see which."""
    rows = unpack(reference.pairs(plan), plan)
    return unpack(rows.mT, plan).mT[0, 0]


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_radial_computes_little_more_than_it_keeps(frame):
    plan = radial.gpu_plan(Radial(), VideoShape(21, *frame))
    assert (plan.block_q, plan.block_k) == (128, 64)
    assert plan.computed_density <= 1.08 * plan.density
    masked = plan.keep & ~plan.whole
    assert masked.sum() <= 0.06 * plan.keep.sum(), "blocks in the slower loop"


@pytest.mark.slow
@pytest.mark.parametrize("frame", FRAMES[:4], ids=str)
def test_radial_computes_little_more_than_it_keeps_of_long_clips(frame):
    plan = radial.gpu_plan(Radial(), VideoShape(81, *frame))
    assert (plan.block_q, plan.block_k) == (128, 64)
    assert plan.computed_density <= 1.08 * plan.density
    on_cpu = Radial().plan(VideoShape(81, *frame))
    assert plan.density == pytest.approx(on_cpu.density, rel=0.07)
    assert plan.computed_density <= 1.01 * on_cpu.computed_density


SMALL = [
    VideoShape(1, 1, 1),
    VideoShape(1, 13, 19),
    VideoShape(7, 1, 1),
    VideoShape(2, 27, 3, text=5),
    VideoShape(5, 9, 20),
    VideoShape(9, 11, 14, text=13),
    VideoShape(26, 3, 5),
]
METHODS = [
    Radial(),
    Radial(decay_factor=0.01, block=16),
    Radial(decay_factor=0.2, sink=False, anchor_every=3, tile_side=4),
    Radial(decay_factor=0.3, tile_frames=1),
    Radial(decay_factor=0.3, tile_frames=5, block=1000, tile_side=99),
]


@pytest.mark.parametrize(("method", "video"), [*product(METHODS, SMALL)], ids=str)
def test_radial_lays_out_each_token_once_and_keeps_what_it_must(method, video):
    plan = radial.gpu_plan(method, video)
    held = plan.slots[plan.slots >= 0]
    assert torch.equal(held.sort().values, torch.arange(video.tokens))
    for block in (plan.block_q, plan.block_k):
        assert block & (block - 1) == 0 or block % 64 == 0
    pairs, n = token_pairs(plan), video.video_tokens
    frame = torch.arange(n) // (video.height * video.width)
    must = (frame[:, None] - frame).abs() < 2
    must[:, torch.isin(frame, torch.tensor(method.whole_frames(video.frames)))] = True
    assert pairs[:n, :n][must].all()
    assert pairs[n:].all()
    assert pairs[:, n:].all()


@pytest.mark.parametrize("video", SMALL, ids=str)
def test_a_key_tile_of_radial_lies_in_one_frame(video):
    plan = radial.gpu_plan(Radial(), video)
    held = plan.slots.view(-1, plan.block_k)
    inside = (held >= 0) & (held < video.video_tokens)
    frame = held // (video.height * video.width)
    low = frame.masked_fill(~inside, video.frames).amin(-1)
    assert (frame.masked_fill(~inside, -1).amax(-1) <= low).all()


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_full_tiles_are_full_and_compact(frame):
    video = VideoShape(3, *frame, text=70)
    made = full_tiles(video, tokens_of_tile(video, 64), 2)
    assert (made.block_q, made.block_k) == (128, 64)
    T, blocks = sum(made.counts), made.slots.view(-1, 64)
    held = (blocks >= 0).sum(-1)
    assert (held[: 3 * T][made.tile < T - 1] == 64).all()
    assert (held[: 3 * T] > 0).all()
    assert len(blocks) == -(-3 * T // 2) * 2 + 2, "tiles and text in query blocks"
    whole = blocks[: 3 * T][made.tile < T - 1]
    row, column = whole // frame[1] % frame[0], whole % frame[1]
    assert (row.amax(-1) - row.amin(-1)).max() <= 10
    assert (column.amax(-1) - column.amin(-1)).max() <= 11
    step = made.frame.diff().abs() + made.tile.diff()
    assert (step == 1).all(), "in neighbouring frames or side by side"


def test_an_image_has_query_blocks_of_two_tiles_side_by_side():
    plan = radial.gpu_plan(Radial(), VideoShape(1, 30, 52))
    assert (plan.block_q, plan.block_k) == (128, 64)


def test_options_of_radial_decide_the_blocks():
    video = VideoShape(81, 20, 20)

    def blocks(**options):
        plan = radial.gpu_plan(Radial(**options), video)
        return plan.block_q, plan.block_k

    assert blocks() == (128, 64)
    assert blocks(tile_frames=1) == (64, 64)
    assert blocks(block=64) == (64, 64)
    assert blocks(block=256) == (128, 64), "three frames, cut to two"
    assert blocks(block=300, tile_frames=4) == (256, 64)
    assert blocks(tile_side=16) == (256, 256)
    assert blocks(tile_side=99) == (448, 448), "a tile is a frame"


@pytest.mark.parametrize("counts", [[3, 3, 3, 3], [2, 3, 3], [7], [1] * 5, [1, 2] * 6], ids=str)
def test_windows_of_radial_hold_their_share_in_uneven_bands(counts):
    T = sum(counts)
    for distance in (2, 3):
        assert radial._near_tiles(counts, 1.0, distance).all()
    for share, distance in product((0.7, 0.5, 0.25), (2, 3)):
        seen = radial._near_tiles(counts, share, distance)
        assert seen.diagonal().all()
        assert (seen.sum(-1) - share * T).abs().max() <= 1 + 0.2 * T
    assert torch.equal(radial._near_tiles(counts, 0.1 / T, 10), torch.eye(T, dtype=torch.bool))
    assert not radial._near_tiles(counts, 0.1 / T, 11).any()


@pytest.mark.parametrize("rule", ["balanced", "paper"])
def test_the_device_decides_the_layout_of_radial(rule):
    video, method = VideoShape(5, 9, 10, text=3), Radial(rule)
    plan = method.plan(video, "meta")
    wanted = radial.gpu_plan(method, video) if rule == "balanced" else method.plan(video)
    assert plan.slots.device.type == plan.keep.device.type == "meta"
    assert (plan.block_q, plan.block_k) == (wanted.block_q, wanted.block_k)
    assert plan.keep.shape == wanted.keep.shape


@pytest.mark.parametrize(
    ("grid", "window", "most"),
    [
        ((21, 30, 52), (-1, 8, 8), 1.6),
        pytest.param((21, 30, 52), (-1, 15, 26), 1.25, marks=pytest.mark.slow),
        pytest.param((21, 45, 80), (-1, 8, 8), 1.65, marks=pytest.mark.slow),
        pytest.param((30, 48, 80), (-1, 8, 8), 1.55, marks=pytest.mark.slow),
        pytest.param((30, 48, 80), (18, 24, 24), 1.7, marks=pytest.mark.slow),
        ((65, 12, 12), (-1, 8, 8), 1.6),
    ],
    ids=str,
)
def test_neighborhood_computes_little_more_than_it_keeps(grid, window, most):
    method = Neighborhood(window)
    plan = neighborhood.plan_for_device(method, VideoShape(*grid), gpu=True)
    assert (plan.block_q, plan.block_k) == (128, 64)
    assert plan.computed_density <= most * plan.density


@pytest.mark.slow
def test_strides_of_a_tile_need_no_mask():
    """Generalized neighborhood attention's own case for HunyuanVideo."""
    method = Neighborhood((18, 24, 24), stride=(16, 8, 8))
    plan = neighborhood.plan_for_device(method, VideoShape(30, 48, 80), gpu=True)
    assert (plan.block_q, plan.block_k) == (128, 64)
    assert torch.equal(plan.whole, plan.keep)
    assert plan.computed_density == plan.density


@pytest.mark.parametrize("method", [Radial(), Neighborhood((-1, 3, 3))], ids=str)
def test_a_method_called_on_a_gpu_makes_its_plan_there(method):
    """What a call of attention does, with tensors of a device that is none."""
    video, plans = VideoShape(5, 9, 10, text=3), []
    q = torch.empty(1, 2, video.tokens, 16, device="meta")
    method(q, q, q, video=video, kernel=lambda q, k, v, plan: plans.append(plan))
    [plan] = plans
    assert plan is method.plan(video, q.device)
    assert plan.slots.device == q.device
    assert (plan.block_q, plan.block_k) == (128, 64)


@pytest.mark.parametrize("method", [Radial(), Neighborhood((-1, 3, 3))], ids=str)
def test_techniques_for_longer_videos_keep_the_blocks_of_a_gpu(method):
    """A gain by frames and a window of frames, on the plan that the call makes."""
    video = VideoShape(12, 9, 10, text=3)
    if isinstance(method, Radial):
        plan = radial.gpu_plan(method, video)
    else:
        plan = neighborhood.plan_for_device(method, video, gpu=True)
    dampened = UltraViCo().adjusted(plan, video, 4)
    windowed = RotatingAnchors().adjusted(plan, video, 4, 1)
    for changed in (dampened, windowed):
        assert (changed.block_q, changed.block_k) == (128, 64)
        assert torch.equal(changed.slots, plan.slots)
    assert dampened.gain is not None
    assert dampened.gain.shape == plan.keep.shape
    if isinstance(method, Radial):  # a tile of the other holds all frames
        assert 0 < dampened.gain.min() < dampened.gain.max() == 1
        assert windowed.keep.sum() < plan.keep.sum()


def test_the_device_decides_the_layout_of_neighborhood():
    video, method = VideoShape(5, 9, 10, text=3), Neighborhood((-1, 3, 3))
    plan = method.plan(video, "meta")
    wanted = neighborhood.plan_for_device(method, video, gpu=True)
    assert isinstance(plan.partial, Windows)
    assert plan.slots.device.type == plan.partial.first.device.type == "meta"
    assert (plan.block_q, plan.block_k) == (wanted.block_q, wanted.block_k)
    assert plan.keep.shape == wanted.keep.shape
