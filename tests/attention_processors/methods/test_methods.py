"""What each method keeps, held to slow loops over pairs of tokens and to published figures."""

import json
import math
import random
import shutil
import time
from functools import cache
from itertools import product

import check_golden
import numpy as np
import pytest
import torch
from support.paths import TESTS

from gen_accel.attention_processors import METHODS, Dense, Neighborhood, Radial, method_class
from gen_accel.attention_processors.methods import neighborhood
from gen_accel.functional import attention
from gen_accel.kernels import reference
from gen_accel.memory import PLAN_CACHE
from gen_accel.plan import unpack
from gen_accel.video import VideoShape

GOLDEN = TESTS / "golden"
RULES = ["balanced", "paper", "code-2025-06", "code-2025-11"]

# Nothing here divides by 8, 16, 32, 64 or 128 along with the rest.
ODD_VIDEOS = [
    VideoShape(1, 1, 1),
    VideoShape(1, 13, 9),
    VideoShape(7, 1, 1),
    VideoShape(2, 17, 3, text=5),
    VideoShape(5, 9, 10),
    VideoShape(9, 11, 4, text=13),
    VideoShape(13, 5, 7),
    VideoShape(26, 3, 5),  # query tiles of one frame
    VideoShape(49, 4, 3, text=1),  # query tiles of two frames, the last with one
]


def token_pairs(plan):
    """(N, N) bool, which tokens see which: those of one plan for all samples and heads."""
    pairs = reference.pairs(plan)
    rows = unpack(pairs, plan)
    return unpack(rows.transpose(-1, -2), plan).transpose(-1, -2)[0, 0]


verdict = cache(check_golden.check_file)


class TestGolden:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", [path.stem for path in sorted(GOLDEN.glob("*.json"))])
    def test_our_answers_are_those_of_the_public_code(self, name):
        found = verdict(GOLDEN / name)
        assert found.ok, found.line

    @pytest.mark.slow
    def test_the_script_prints_a_line_for_each_file(self, capsys, monkeypatch):
        """By the verdicts of the tests above."""
        monkeypatch.setattr(check_golden, "check_file", verdict)
        assert check_golden.main([str(GOLDEN)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines] == [
            *("draft", "natten", "piecewise", "radial_masks", "residual"),
            *("sla", "sol", "sparge", "sparsed", "turbo_sla", "vmoba", "vsa"),
        ]

    @pytest.mark.slow
    def test_a_format_is_known_by_its_keys_under_any_name(self, tmp_path):
        copy_golden("radial_masks", tmp_path / "other")
        verdict = check_golden.check_file(tmp_path / "other")
        assert verdict.ok
        assert "radial" in verdict.line

    def test_one_wrong_bit_fails_and_names_the_case(self, tmp_path):
        arrays = copy_golden("radial_masks", tmp_path / "masks")
        arrays["m4"][3] ^= 16
        np.savez(tmp_path / "masks.npz", **arrays)
        verdict = check_golden.check_file(tmp_path / "masks")
        assert not verdict.ok
        assert "FAIL; case m4: wrong blocks 1 " in verdict.line

    @pytest.mark.parametrize(
        ("name", "case", "array", "error"),
        [
            ("natten", 8, "o8", 1e-4),
            ("natten", 8, "lse8", 1e-4),
            ("natten", 8, "o8", math.nan),
            ("sla", 27, "o27", 1e-4),
            ("sla", 27, "dk27", 1e-4),
            ("vmoba", 18, "o18", 1e-4),
        ],
    )
    def test_a_golden_that_answers_another_question_fails(
        self, name, case, array, error, tmp_path
    ):
        other = {"natten": 2, "sla": 0, "vmoba": 9}[name]
        arrays = copy_golden(name, tmp_path / "wrong", ids=(other, case))
        arrays[array].flat[7] += error
        np.savez(tmp_path / "wrong.npz", **arrays)
        verdict = check_golden.check_file(tmp_path / "wrong")
        assert not verdict.ok
        assert f"FAIL; case {case}: " in verdict.line
        assert "error of the golden" in verdict.line
        assert f"case {other}" not in verdict.line

    @pytest.mark.parametrize(
        ("name", "option", "value"),
        [
            ("sla", "topk", 0.3),
            ("sla", "feature_map", "relu"),
            ("vmoba", "chunk", [8, 8]),
            ("vmoba", "select_mode", "topk"),
            ("vmoba", "value", 0.9),
        ],
    )
    def test_other_options_than_those_of_the_golden_fail(self, name, option, value, tmp_path):
        copy_golden(name, tmp_path / "wrong", ids=(0,))
        cases = json.loads((tmp_path / "wrong.json").read_text())
        cases[0][option] = value
        (tmp_path / "wrong.json").write_text(json.dumps(cases))
        verdict = check_golden.check_file(tmp_path / "wrong")
        assert not verdict.ok
        assert "FAIL; case 0: " in verdict.line

    def test_a_case_that_makes_no_sense_fails_and_the_others_are_checked(self, tmp_path):
        copy_golden("natten", tmp_path / "wrong", ids=(2, 8))
        cases = json.loads((tmp_path / "wrong.json").read_text())
        cases[0]["window"] = [400, 5]
        (tmp_path / "wrong.json").write_text(json.dumps(cases))
        verdict = check_golden.check_file(tmp_path / "wrong")
        assert not verdict.ok
        assert "at worst error of" in verdict.line
        assert "FAIL; case 2: ValueError: window 400 is larger" in verdict.line

    @pytest.mark.parametrize(
        ("name", "text", "why"),
        [
            ("radial_masks.json", "[]", "list of cases"),
            ("radial_masks.json", "{", "JSONDecodeError"),
            ("radial_masks.json", '[{"id": 0, "tau": 3}]', "no known format"),
            ("radial_masks.npz", "not a zip", "ValueError"),
        ],
    )
    def test_what_cannot_be_read_fails(self, name, text, why, tmp_path):
        copy_golden("radial_masks", tmp_path / "radial_masks")
        (tmp_path / name).write_text(text)
        verdict = check_golden.check_file(tmp_path / "radial_masks")
        assert not verdict.ok
        assert why in verdict.line

    def test_lost_arrays_and_lost_files_fail(self, tmp_path):
        arrays = copy_golden("radial_masks", tmp_path / "masks")
        del arrays["m4"]
        np.savez(tmp_path / "masks.npz", **arrays)
        assert "missing from the npz: m4" in check_golden.check_file(tmp_path / "masks").line
        (tmp_path / "masks.npz").unlink()
        assert not check_golden.check_directory(tmp_path)[0].ok

    def test_pickled_arrays_are_refused(self, tmp_path):
        arrays = copy_golden("radial_masks", tmp_path / "masks")
        arrays["m4"] = np.array([{}], dtype=object)
        np.savez(tmp_path / "masks.npz", **arrays)
        assert "allow_pickle=False" in check_golden.check_file(tmp_path / "masks").line

    def test_a_folder_without_goldens_fails(self, tmp_path, capsys):
        (tmp_path / "README.md").write_text("nothing")
        assert check_golden.main([str(tmp_path)]) == 1
        assert "no golden" in capsys.readouterr().err


def copy_golden(name, to, ids=None):
    """Copy a golden, or some of its cases, to `to`.json and `to`.npz. Returns its arrays."""
    cases = json.loads((GOLDEN / f"{name}.json").read_text())
    kept = [case for case in cases if ids is None or case["id"] in ids]
    to.with_name(f"{to.name}.json").write_text(json.dumps(kept))
    shutil.copy(GOLDEN / f"{name}.npz", to.with_name(f"{to.name}.npz"))
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


class TestAnyMethod:
    @pytest.mark.parametrize(
        "method",
        [
            Dense(),
            *(Radial(rule, block=24) for rule in RULES),
            Neighborhood((-1, 4, 5)),
            Neighborhood(
                (2, 3, 2), stride=(2, 1, 2), dilation=(1, 2, 2), is_causal=(True, False, False)
            ),
        ],
        ids=str,
    )
    def test_masks_and_density_are_those_of_the_token_pairs(self, method, video):
        plan = method.plan(video)
        pairs = token_pairs(plan)
        assert pairs.shape == (video.tokens, video.tokens)
        assert plan.tokens == video.tokens
        assert pairs.any(-1).all()  # nobody is blind
        share = pairs.double().mean().item()
        assert plan.density == pytest.approx(share, abs=1e-12)
        assert method.density(video) == pytest.approx(share, abs=1e-12)
        assert plan.computed_density >= share - 1e-12

        real = plan.real[:, None]
        pairs = reference.pairs(plan)[0, 0]
        seen = (pairs & real).unflatten(0, (-1, plan.block_q)).unflatten(2, (-1, plan.block_k))
        touched = seen.any(1).any(-1)
        assert (method.plan(video).keep[0, 0] | ~touched).all()
        if plan.partial is None:
            occupied = plan.real.view(-1, plan.block_q).any(-1)
            assert torch.equal(method.plan(video).keep[0, 0][occupied], touched[occupied])
        # What kernels run without a mask holds no pair that is not kept.
        right = pairs | ~real
        right = right.unflatten(0, (-1, plan.block_q)).unflatten(2, (-1, plan.block_k))
        assert (right.all(1).all(-1) | ~plan.whole[0, 0]).all()

    def test_every_method_can_be_found_by_name(self):
        for name, method in METHODS.items():
            assert method_class(name) is method
        with pytest.raises(ValueError, match=r"one of \('dense', .*did you mean 'radial'"):
            method_class("radail")


class TestBalanced:
    @pytest.mark.parametrize("video", ODD_VIDEOS, ids=str)
    @pytest.mark.parametrize(
        "method",
        [
            Radial(),
            Radial(decay_factor=0.01, block=16),
            Radial(decay_factor=0.3, sink=False, block=100),
            Radial(decay_factor=0.01, sink=False, anchor_every=3),
            Radial(decay_factor=0.3, anchor_every=4, tile_frames=3),
        ],
        ids=str,
    )
    def test_a_token_sees_its_frame_and_the_whole_ones_and_text(self, method, video):
        pairs = token_pairs(method.plan(video))
        frame = torch.arange(video.video_tokens) // (video.height * video.width)
        must = ((frame[:, None] - frame).abs() < 2) | seen_by_all(method, frame)
        assert pairs[: video.video_tokens, : video.video_tokens][must].all()
        assert pairs[video.video_tokens :].all()
        assert pairs[:, video.video_tokens :].all()

    @pytest.mark.turns(5)
    @pytest.mark.parametrize("video", [*ODD_VIDEOS, VideoShape(49, 5, 40, text=7)], ids=str)
    @pytest.mark.parametrize("every", [1, 2, 11])
    @pytest.mark.slow
    def test_anchors_add_their_frames_and_nothing_else(self, every, video):
        without = token_pairs(Radial(decay_factor=0.2).plan(video))
        n = video.video_tokens
        without[:n, :n] |= torch.arange(n) // (video.height * video.width) % every == 0
        with_anchors = Radial(decay_factor=0.2, anchor_every=every)
        assert torch.equal(token_pairs(with_anchors.plan(video)), without)

    @pytest.mark.parametrize("frames", [2, 3, 100])
    def test_a_query_tile_of_several_frames_sees_more(self, frames):
        video = VideoShape(13, 9, 10, text=5)  # of 25 tokens a tile and frame
        wide = Radial(decay_factor=0.3, tile_frames=frames)
        assert wide.plan(video).block_q == min(frames, 128 // 25) * 25
        assert wide.plan(video).block_k == 25
        narrow, wide = (
            token_pairs(method.plan(video)) for method in (Radial(decay_factor=0.3), wide)
        )
        assert wide.sum() > narrow.sum()

    @pytest.mark.parametrize(
        ("side", "tokens"), [(1, 1), (4, 3 * 4), (8, 5 * 5), (9, 9 * 5), (99, 90)]
    )
    def test_a_tile_is_as_large_as_its_side_allows(self, side, tokens):
        assert Radial(tile_side=side).plan(VideoShape(13, 9, 10)).block_k == tokens

    def test_tiles_of_a_whole_frame_keep_frames_at_doubling_distances(self):
        method = Radial(sink=False, tile_side=12)
        keep = method.plan(VideoShape(40, 12, 12)).keep[0, 0]
        distance = (torch.arange(40)[:, None] - torch.arange(40)).abs()
        assert torch.equal(keep, torch.isin(distance, torch.tensor([0, 1, 2, 4, 8, 16, 32])))

    @pytest.mark.parametrize("video", ODD_VIDEOS, ids=str)
    def test_a_tile_of_keys_lies_in_one_frame(self, video):
        plan = Radial().plan(video)
        held = plan.slots.view(-1, plan.block_k)
        frame = held // (video.height * video.width)
        inside = (held >= 0) & (held < video.video_tokens)
        low = frame.masked_fill(~inside, video.frames).amin(-1)
        high = frame.masked_fill(~inside, -1).amax(-1)
        assert (high - low <= 0).all()

    @pytest.mark.parametrize("video", [VideoShape(5, 9, 10), VideoShape(13, 5, 7)], ids=str)
    def test_the_block_size_does_not_change_a_short_clip(self, video):
        first, *others = (token_pairs(Radial(block=b).plan(video)) for b in (128, 64, 100, 131, 7))
        assert all(torch.equal(first, other) for other in others)

    def test_odd_frames_cost_what_even_ones_do(self):
        """Frames of 144, 143 and 145 tokens, which 128 fits as badly, and of 128."""
        shapes = [(12, 12), (11, 13), (5, 29), (8, 16)]
        densities = [Radial().density(VideoShape(33, *shape)) for shape in shapes]
        assert max(densities) - min(densities) < 0.06

    @pytest.mark.parametrize(("frames", "most"), [(33, 0.3), (65, 0.2)])
    def test_density_on_the_demo_videos(self, frames, most):
        assert Radial().density(VideoShape(frames, 12, 12)) <= most

    @pytest.mark.parametrize(
        "video",
        [VideoShape(33, 12, 12), VideoShape(20, 17, 30), VideoShape(49, 5, 40, text=7)],
        ids=str,
    )
    def test_density_falls_with_the_decay_factor(self, video):
        factors = [0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 64.0]
        densities = [Radial(decay_factor=factor).density(video) for factor in factors]
        assert densities == sorted(densities)
        assert densities[-1] == 1.0
        assert densities[0] < densities[5] < densities[-1]

    @pytest.mark.parametrize("decay_factor", [0.4, 1.0])
    def test_a_frame_is_kept_to_the_share_of_its_band(self, decay_factor):
        """Up to one tile, a share of decay_factor / 2^band, evenly for all tokens of a frame."""
        keep = (
            Radial(decay_factor=decay_factor, sink=False).plan(VideoShape(24, 32, 32)).keep[0, 0]
        )
        kept = keep.unflatten(0, (24, 16)).unflatten(2, (24, 16)).double().mean(-1)  # (24, 16, 24)
        for i, j in product(range(24), range(24)):
            band = max(abs(i - j), 1).bit_length() - 1
            share = min(1.0, decay_factor / 2**band) if band else 1.0
            if share >= 1 / 16:
                assert ((kept[i, :, j] - share).abs() <= 1 / 16 + 1e-6).all()


def seen_by_all(method, frame):
    """Whether a frame's keys are kept for all queries."""
    anchor = frame % method.anchor_every == 0 if method.anchor_every else frame < 0
    return anchor | (frame == 0) if method.sink else anchor


def blocks_of_the_code(method, video):
    """The public code's rule, pair of tokens by pair of tokens; blocks past the end are cut."""
    s, B = video.height * video.width, method.block
    total = -(-video.tokens // B)
    keep = torch.zeros(total, total, dtype=torch.bool)
    power = 2 ** s.bit_length()  # the next power of two above s
    place = torch.arange(s)
    for i, j in product(range(video.frames), range(video.frames)):
        d = abs(i - j)
        decay = power / 2 ** d.bit_length()
        if d == 0 or seen_by_all(method, j):
            width = s
        elif decay < 128 and d % int(128 / decay):
            continue
        elif d == 1:
            width = s // 2 if method.rule == "code-2025-06" else s
        else:
            width = max(decay * method.decay_factor, B)
        # The pair of frames at its place among the blocks, of which the last may be left out.
        side = -(-s // B)
        row, column = i * s % B, j * s % B
        canvas = torch.zeros((side + 1) * B, (side + 1) * B, dtype=torch.bool)
        canvas[row : row + s, column : column + s] = (place[:, None] - place).abs() <= width
        for a, b in product(range(side), range(side)):
            held = canvas[a * B : (a + 1) * B, b * B : (b + 1) * B].sum(0)  # of each column
            some, dense = (held > 0).sum().item(), (3 * held > B).sum().item()
            y, x = i * s // B + a, j * s // B + b
            if 5 * dense > 3 * some and y < total and x < total:
                keep[y, x] = True
    keep[video.video_tokens // B :], keep[:, video.video_tokens // B :] = True, True
    return keep


def blocks_of_the_paper(method, video):
    """Equation 4, pair of tokens by pair of tokens, then blocks that hold a kept pair."""
    s, B, n = video.height * video.width, method.block, video.video_tokens
    pairs = torch.zeros(n, n, dtype=torch.bool)
    for query, key in product(range(n), range(n)):
        (i, k), (j, l) = divmod(query, s), divmod(key, s)
        d = abs(i - j)
        band = math.floor(math.log2(max(d, 1)))
        width = s * method.decay_factor / 2**band
        if seen_by_all(method, j) or band == 0:
            pairs[query, key] = True
        elif width >= 1:
            pairs[query, key] = abs(k - l) + 1 <= width
        else:
            pairs[query, key] = k == l and d % math.ceil(1 / width) == 0
    total = -(-video.tokens // B)
    padded = torch.zeros(total * B, total * B, dtype=torch.bool)
    padded[:n, :n] = pairs
    keep = padded.unflatten(0, (total, B)).unflatten(2, (total, B)).any(1).any(-1)
    keep[n // B :], keep[:, n // B :] = True, True
    return keep


class TestPublishedRules:
    @pytest.mark.turns(5)
    # The public code stops with an error on most of these.
    @pytest.mark.parametrize(
        ("video", "block"),
        [
            (VideoShape(6, 8, 16), 64),
            (VideoShape(8, 10, 20, text=56), 64),
            (VideoShape(5, 1, 390), 64),
            (VideoShape(7, 13, 5), 32),
            (VideoShape(9, 5, 7), 16),
            (VideoShape(21, 3, 5, text=9), 24),
            (VideoShape(12, 1, 3, text=5), 16),  # several frames in a block
            (VideoShape(34, 9, 11), 64),
            (VideoShape(1, 4, 9), 16),
            (VideoShape(6, 3, 43), 24),  # blocks with just 0.6 of their columns
        ],
        ids=str,
    )
    @pytest.mark.parametrize(
        "options", [(0.2, True), (1.0, False), (1.7, True), (0.2, False, 4)], ids=str
    )
    @pytest.mark.parametrize("rule", ["code-2025-06", "code-2025-11"])
    def test_code_rules_equal_the_loops(self, rule, options, video, block):
        decay_factor, sink, *anchor_every = options
        method = Radial(rule, decay_factor, sink, block, *anchor_every)
        assert torch.equal(method.plan(video).keep[0, 0], blocks_of_the_code(method, video))

    @pytest.mark.turns(5)
    @pytest.mark.parametrize(
        ("video", "block"),
        [
            (VideoShape(5, 4, 8), 16),
            (VideoShape(9, 5, 7, text=11), 16),
            (VideoShape(12, 1, 3, text=5), 8),
            (VideoShape(40, 1, 5), 16),  # far frames are thinned
            (VideoShape(3, 7, 9), 128),
        ],
        ids=str,
    )
    @pytest.mark.parametrize(
        "options",
        [
            (1.0, True),
            pytest.param((0.25, False), marks=pytest.mark.slow),
            pytest.param((3.0, True), marks=pytest.mark.slow),
            (0.25, True, 3),
        ],
        ids=str,
    )
    def test_paper_rule_equals_the_loops(self, options, video, block):
        decay_factor, sink, *anchor_every = options
        method = Radial("paper", decay_factor, sink, block, *anchor_every)
        assert torch.equal(method.plan(video).keep[0, 0], blocks_of_the_paper(method, video))

    @pytest.mark.turns(5)
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("rule", "tokens", "frames", "decay_factor", "sink", "block", "sparsity"),
        [
            ("code-2025-11", 3600, 64, 1.0, True, 128, 0.8083),  # HunyuanVideo 253f 720p
            ("code-2025-11", 3600, 64, 1.0, False, 128, 0.8224),
            ("code-2025-11", 3600, 128, 1.0, True, 128, 0.8837),  # 509f
            ("code-2025-11", 3600, 128, 1.0, False, 128, 0.8912),
            ("code-2025-11", 3840, 30, 0.95, False, 128, 0.7254),  # 117f 768 x 1280
            ("code-2025-11", 3840, 30, 0.95, True, 128, 0.6992),
            ("code-2025-11", 3840, 18, 0.2, True, 128, 0.7129),  # Wan 69f 768 x 1280
            ("code-2025-06", 3840, 18, 0.2, True, 128, 0.7366),
            ("code-2025-11", 3600, 41, 1.0, True, 128, 0.7401),  # 161f 720p
            ("code-2025-06", 3600, 41, 1.0, True, 128, 0.7505),
            ("code-2025-11", 1590, 56, 1.0, True, 128, 0.7663),  # Mochi 331f 480 x 848
            ("code-2025-11", 1590, 112, 1.0, True, 128, 0.8572),  # 667f
            ("code-2025-11", 3840, 20, 0.8, True, 64, 0.6509),  # Wan 2.2 77f 768 x 1280
            ("code-2025-11", 1560, 21, 0.2, True, 128, 0.6613),  # Wan 81f 480 x 832
            ("code-2025-11", 1560, 21, 0.5, True, 128, 0.6372),
            ("code-2025-11", 1560, 21, 1.0, True, 128, 0.5551),
            ("code-2025-11", 1560, 41, 1.0, True, 128, 0.7039),  # 161f
            ("code-2025-11", 1560, 81, 1.0, True, 128, 0.8143),  # 321f
        ],
    )
    def test_sparsity_is_the_published_one(
        self, rule, tokens, frames, decay_factor, sink, block, sparsity
    ):
        """Counted over whole blocks of the video, as the public code counts."""
        method = Radial(rule, decay_factor, sink, block)
        whole = frames * tokens // block
        keep = method.plan(VideoShape(frames, 1, tokens)).keep[0, 0][:whole, :whole]
        assert 1 - keep.double().mean().item() == pytest.approx(sparsity, abs=6e-5)

    def test_sparsity_with_a_padded_block_is_the_published_one(self):
        keep = Radial("code-2025-06", 0.2).plan(VideoShape(21, 1, 2700)).keep[0, 0]
        assert 1 - keep.double().mean().item() == pytest.approx(0.735, abs=6e-4)


@pytest.mark.parametrize("rule", ["balanced", "code-2025-11"])
def test_a_mask_of_115_thousand_tokens_is_made_in_closed_form(rule):
    """The public code needs minutes for this, ours milliseconds (benchmarks/results/plan.json):
    the processor time of a busy machine lies far from both."""
    PLAN_CACHE.forget()
    start = time.thread_time()
    Radial(rule).plan(VideoShape(30, 48, 80))
    assert time.thread_time() - start < 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rule": "balance"}, r"rule must be one of .*'balanced'.*, got 'balance'"),
        ({"decay_factor": 0.0}, r"decay_factor must be positive, got 0\.0"),
        ({"decay_factor": -1.0}, r"decay_factor must be positive"),
        ({"decay_factor": math.nan}, r"decay_factor must be positive, got nan"),
        ({"decay_factor": math.inf}, r"decay_factor must be positive, got inf"),
        ({"block": 0}, r"block must be at least 1, got 0"),
        ({"anchor_every": 0}, r"anchor_every must be at least 1, got 0"),
        ({"tile_frames": 0}, r"tile_frames must be at least 1, got 0"),
        ({"rule": "paper", "tile_frames": 2}, r"tile_frames .*balanced rule, got rule='paper'"),
        ({"tile_side": 0}, r"tile_side must be at least 1, got 0"),
        ({"rule": "paper", "tile_side": 4}, r"tile_side .*balanced rule, got rule='paper'"),
    ],
)
def test_radial_refuses_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        Radial(**options)


def seen_along(i, length, window, stride, dilation, is_causal):
    """The indices of one axis that index `i` sees."""
    window = length if window == -1 else window
    group = list(range(i % dilation, length, dilation))
    p = i // dilation
    if is_causal:
        leader = min(p // stride * stride + stride - 1, len(group) - 1)
        return set(group[max(leader - window + 1, 0) : p + 1])
    leader = min(p // stride * stride + stride // 2, len(group) - 1)
    start = min(max(leader - window // 2, 0), len(group) - window)
    return set(group[start : start + window])


def pairs_of_windows(method, video):
    options = zip(method.window, method.stride, method.dilation, method.is_causal, strict=True)
    axes = [
        [seen_along(i, size, *along) for i in range(size)]
        for size, along in zip(video.grid, options, strict=True)
    ]
    places = list(product(*map(range, video.grid)))
    pairs = torch.ones(video.tokens, video.tokens, dtype=torch.bool)
    for (q, query), (k, key) in product(enumerate(places), enumerate(places)):
        pairs[q, k] = all(b in axis[a] for axis, a, b in zip(axes, query, key, strict=True))
    return pairs


def random_neighborhood(seed):
    """A video and options that fit it."""
    draw = random.Random(seed)
    video = VideoShape(*(draw.randint(1, most) for most in (6, 7, 8)), text=draw.choice([0, 0, 5]))
    axes = []
    for size in video.grid:
        window = draw.choice([-1, *range(1, size + 1)])
        stride = draw.randint(1, size if window == -1 else window)
        dilation = 1 if window == -1 else draw.randint(1, size // window)
        axes.append((window, stride, dilation, draw.random() < 0.3))
    return video, Neighborhood(*zip(*axes, strict=True))


class TestNeighborhood:
    def test_within_a_small_grid_large_windows_are_whole_axes(self):
        method = Neighborhood((3, 4, 4), (2, 3, 1), (1, 2, 1), (True, False, False))
        whole = VideoShape(9, 9, 9)
        assert method.within(VideoShape(3, 8, 4), whole) == method
        small = Neighborhood((-1, -1, 4), (1, 1, 1), (1, 1, 1), (True, False, False))
        assert method.within(VideoShape(2, 7, 4), whole) == small
        assert method.within(VideoShape(2, 7, 4), VideoShape(2, 7, 4)) == method

    @pytest.mark.parametrize("seed", range(20))
    def test_blocks_of_a_gpu_are_powers_of_two_and_change_nothing(self, seed):
        video, method = random_neighborhood(seed)
        plan = neighborhood.plan_for_device(method, video, gpu=True)
        assert plan.block_q & (plan.block_q - 1) == plan.block_k & (plan.block_k - 1) == 0
        assert torch.equal(token_pairs(plan), pairs_of_windows(method, video))

    @pytest.mark.parametrize("grid", [(65, 12, 12), (21, 30, 52), (31, 22, 40)], ids=str)
    def test_a_window_over_all_frames_computes_little_more_than_it_keeps(self, grid):
        plan = Neighborhood((-1, 6, 6)).plan(VideoShape(*grid))
        assert plan.density <= plan.computed_density < 1.4 * plan.density

    @pytest.mark.turns(5)
    @pytest.mark.parametrize("seed", range(60))
    def test_windows_equal_the_loops(self, seed):
        video, method = random_neighborhood(seed)
        want = pairs_of_windows(method, video)
        assert torch.equal(token_pairs(method.plan(video)), want)
        assert method.density(video) == pytest.approx(want.double().mean().item(), abs=1e-12)

    def test_the_random_options_cover_the_rule(self):
        methods = [random_neighborhood(seed)[1] for seed in range(60)]
        for name, rare in [("window", -1), ("stride", 2), ("dilation", 2), ("is_causal", True)]:
            assert sum(rare in getattr(method, name) for method in methods) > 5

    def test_a_window_is_shifted_at_the_border_and_never_cut(self):
        pairs = token_pairs(Neighborhood((2, 3, 4)).plan(VideoShape(4, 6, 7)))
        assert (pairs.sum(-1) == 2 * 3 * 4).all()

    def test_an_even_window_has_one_more_before_than_after(self):
        pairs = token_pairs(Neighborhood((1, 1, 4)).plan(VideoShape(1, 1, 9)))
        assert pairs[4].nonzero().flatten().tolist() == [2, 3, 4, 5]

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"window": (3, 3)}, r"window of Neighborhood must be int,int,int, got \(3, 3\)"),
            ({"stride": (1, 1, 1, 1)}, r"stride .* must be int,int,int, got \(1, 1, 1, 1\)"),
            ({"dilation": (1,)}, r"dilation .* must be int,int,int, got \(1,\)"),
            ({"is_causal": (True,)}, r"is_causal .* must be true/false,.*, got \(True,\)"),
            ({"window": (0, 3, 3)}, r"window along frames must be positive or -1, got 0"),
            ({"window": (3, -2, 3)}, r"window along rows must be positive or -1, got -2"),
            ({"stride": (1, 1, 9)}, r"stride along columns must be from 1 to the window 8, got 9"),
            ({"stride": (0, 1, 1)}, r"stride along frames must be"),
            ({"dilation": (2, 1, 1)}, r"dilation along frames .* 1 for a whole axis, got 2"),
            ({"dilation": (1, 0, 1)}, r"dilation along rows must be at least 1.*, got 0"),
        ],
    )
    def test_bad_options_are_refused(self, options, match):
        with pytest.raises(ValueError, match=match):
            Neighborhood(**options)

    @pytest.mark.parametrize(
        ("method", "match"),
        [
            (Neighborhood((5, 8, 8)), r"window 5 is larger than the 4 frames .* at most 4, or -1"),
            (Neighborhood((-1, 9, 8)), r"window 9 is larger than the 8 rows"),
            (
                Neighborhood((-1, 3, 3), dilation=(1, 1, 3)),
                r"window 3 x dilation 3 is larger than the 8 columns of the video; use at most 2",
            ),
        ],
        ids=str,
    )
    def test_a_window_larger_than_the_video_is_refused(self, method, match):
        with pytest.raises(ValueError, match=match):
            method.plan(VideoShape(4, 8, 8))


class TestBadInput:
    video = VideoShape(2, 3, 4)

    @pytest.mark.parametrize(
        ("shapes", "match"),
        [
            ([(1, 2, 24, 8)] * 2 + [(1, 2, 24, 16)], r"share one \(B, H, N, D\) shape"),
            ([(1, 2, 24, 8), (1, 1, 24, 8), (1, 1, 24, 8)], r"share one .*\(1, 1, 24, 8\)"),
            ([(2, 24, 8)] * 3, r"share one \(B, H, N, D\) shape, got \[\(2, 24, 8\)"),
            ([(0, 2, 24, 8)] * 3, r"must not be empty, got \(0, 2, 24, 8\)"),
            ([(1, 0, 24, 8)] * 3, r"must not be empty"),
            ([(1, 2, 24, 0)] * 3, r"must not be empty"),
            ([(1, 2, 25, 8)] * 3, r"q has 25 tokens, the video 2 x 3 x 4 has 24"),
            ([(1, 24, 2, 8)] * 3, r"q has 2 tokens"),
        ],
    )
    def test_shapes(self, shapes, match):
        with pytest.raises(ValueError, match=match):
            attention(*(torch.ones(shape) for shape in shapes), video=self.video, method=Radial())

    @pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
    def test_scale(self, scale):
        q = torch.ones(1, 2, 24, 8)
        with pytest.raises(ValueError, match=rf"finite in fp32, got {scale}"):
            attention(q, q, q, video=self.video, method=Radial(), scale=scale)

    @pytest.mark.parametrize("which", range(3), ids="qkv".__getitem__)
    def test_dtypes(self, which):
        inputs = [torch.ones(1, 2, 24, 8) for _ in range(3)]
        inputs[which] = inputs[which].half()
        with pytest.raises(ValueError, match=r"share one dtype and device, got .*float16 on cpu"):
            attention(*inputs, video=self.video, method=Radial())

    @pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -1, 1), (1, 1, 0), (1, 1, 1, -1)], ids=str)
    def test_videos(self, sizes):
        with pytest.raises(ValueError, match=r"at least 1 and text at least 0, got"):
            VideoShape(*sizes)
