"""Figures of one video over time, and of a video against a reference, on clips made for them."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gen_accel.cli import app
from gen_accel.measure import (
    lpips,
    measure_fidelity,
    measure_motion,
    psnr,
    quality,
    ssim,
    write_video,
)
from gen_accel.measure.motion import loop_score, measure_file, similarities


def noise(frames, height=48, width=64, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def still(frames=12):
    return noise(1).repeat(frames, 0)


def moving_square(frames=16, step=3, side=24, height=64, width=128):
    """(F, H, W, 3) uint8: a square of noise moves right by `step` pixels a frame, on grey."""
    video = np.full((frames, height, width, 3), 128, np.uint8)
    for i, frame in enumerate(video):
        left = 8 + i * step
        frame[16 : 16 + side, left : left + side] = noise(1, side, side)[0]
    assert left + side <= width
    return video


def motion(video, **options):
    return measure_motion([video], **options)


@pytest.mark.parametrize("period", [2, 9, 16])
@pytest.mark.slow
def test_a_looping_clip_scores_one_at_its_period(period):
    found = motion(np.tile(noise(period), (4, 1, 1, 1))[: 3 * period + 1])
    assert found.loop_score == pytest.approx(1, abs=1e-6)
    assert found.loop_lag == period


@pytest.mark.slow
def test_a_smooth_loop_is_found_at_its_period():
    there = moving_square(16)
    found = motion(np.concatenate([there, there[::-1]] * 2), lag=32)
    assert found.loop_lag == 32
    assert found.loop_score == pytest.approx(1, abs=1e-6)
    assert found.similarity == pytest.approx(found.loop_score)


@pytest.mark.slow
def test_a_clip_that_moves_on_does_not_loop():
    found = motion(moving_square(24, 2), lag=1)
    assert (found.loop_score, found.loop_lag) == (0, None)
    assert 0.5 < found.similarity < 1  # frames next to each other are alike all the same


@pytest.mark.slow
def test_noise_over_a_loop_lowers_its_score():
    loop = np.tile(noise(8, seed=1) // 2, (3, 1, 1, 1))
    coarse = noise(24, 6, 8, seed=2).repeat(8, 1).repeat(8, 2) // 8
    assert 0 < motion(loop + coarse).loop_score < motion(loop).loop_score


def test_a_still_clip():
    found = motion(still(), lag=4)
    assert (found.loop_score, found.loop_lag) == (0, None)
    assert math.isnan(found.similarity)
    assert (found.flow, found.dynamic_degree, found.dynamic) == (0, 0, False)
    assert found.flicker == 1
    assert found.color_drift == pytest.approx((0, 0, 0), abs=1e-6)
    assert found.contrast_drift == pytest.approx(0, abs=1e-6)
    assert (found.frames, found.fps) == (12, 8)


def test_similarities_are_the_mean_squared_distances():
    features = np.random.default_rng(0).random((11, 70))
    seen = similarities(features)
    away = np.square(features[:, None] - features).sum(-1)
    assert seen[0] == pytest.approx(1)
    for lag in range(1, 11):
        distance = np.diagonal(away, lag).mean()
        assert seen[lag] == pytest.approx(1 - distance / away.mean())


def test_the_loop_score_looks_beyond_the_first_unlikeness_only():
    assert loop_score(np.array([1, 0.9, 0.8, 0.7])) == (0, None)
    assert loop_score(np.array([1, 0.9, -0.1, 0.2, 0.6, 0.3, 0.99, 0.99])) == (0.6, 4)
    assert loop_score(np.array([1, 0.5, -0.1, -0.2, -0.3, -0.1])) == (0, None)
    assert loop_score(np.full(5, np.nan)) == (0, None)


def test_a_fading_clip_has_a_known_slope():
    video = np.empty((20, 16, 16, 3), np.uint8)
    for i, frame in enumerate(video):
        frame[:] = (40 + 2 * i, 100, 200 - 3 * i)
    found = motion(video)
    assert found.color_drift == pytest.approx((200 / 255, 0, -300 / 255), abs=1e-4)
    assert found.contrast_drift == pytest.approx(0, abs=1e-6)
    assert found.flicker == pytest.approx(1 - (2 + 3) / 3 / 255)
    assert found.dynamic_degree == 0


def test_growing_contrast_has_a_known_slope():
    video = np.empty((10, 16, 16, 3), np.uint8)
    for i, frame in enumerate(video):
        frame[:8], frame[8:] = 128 - 4 * i, 128 + 4 * i
    found = motion(video)
    assert found.contrast_drift == pytest.approx(400 / 255, abs=1e-4)
    assert found.color_drift == pytest.approx((0, 0, 0), abs=1e-4)


def test_flicker_is_the_mean_difference():
    video = np.full((9, 16, 16, 3), 100, np.uint8)
    video[1::2] = 110
    assert motion(video).flicker == pytest.approx(1 - 10 / 255)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3])
def test_flow_is_the_pixels_that_the_fastest_part_moves(step):
    """The threshold at 64 pixels is 1.5 from one sampled frame to the next."""
    found = motion(moving_square(step=step))
    assert found.flow == pytest.approx(step, rel=0.1)
    assert found.dynamic_degree == (step >= 2)
    assert found.dynamic == (step >= 2)


@pytest.mark.slow
def test_flow_is_looked_at_eight_times_a_second():
    video = moving_square(17)
    assert motion(video, fps=16).flow == pytest.approx(motion(video[::2], fps=8).flow)
    assert motion(video, fps=4).flow == motion(video, fps=8).flow
    slow = moving_square(step=2)
    assert (motion(slow, fps=8).dynamic_degree, motion(slow, fps=4).dynamic_degree) == (1, 0)


@pytest.mark.slow
def test_a_part_of_the_clip_that_moves_is_counted():
    video = moving_square(17)
    half = np.concatenate([video[:9], video[8:9].repeat(8, 0)])
    assert motion(half).dynamic_degree == 0.5
    assert motion(np.concatenate([video[:3], still_at(video[2], 14)])).dynamic_degree == 2 / 16
    assert not motion(np.concatenate([video[:3], still_at(video[2], 14)])).dynamic


def still_at(frame, count):
    return frame[None].repeat(count, 0)


@pytest.mark.slow
def test_large_frames_are_matched_at_a_smaller_size():
    video = moving_square().repeat(4, 1).repeat(4, 2)
    assert motion(video).flow == pytest.approx(4 * motion(moving_square()).flow, rel=0.35)
    assert motion(video).dynamic_degree == 1


def test_noise_and_fading_are_no_motion():
    video = moving_square(1).repeat(10, 0).astype(int)
    grain = np.random.default_rng(0).integers(-2, 3, video.shape)
    fading = -4 * np.arange(10)[:, None, None, None]
    for change in (grain, fading):
        assert motion(np.clip(video + change, 0, 255).astype(np.uint8)).flow == 0


def test_the_course_of_a_clip_is_what_its_figures_sum_up():
    ramp = np.linspace(20, 120, 8).round().astype(np.uint8)
    video = moving_square(8) // 4 + ramp[:, None, None, None]
    found = motion(video)
    curves = found.curves
    slopes = np.polyfit(np.arange(8), curves.colors, 1)[0]
    assert 100 * slopes == pytest.approx(found.color_drift)
    assert loop_score(curves.similarity) == (found.loop_score, found.loop_lag)
    assert curves.contrasts.shape == (8,)
    assert found.by_frame["similarity"][0] == pytest.approx(1)
    assert motion(still()).by_frame["similarity"] == [None] * 12


def test_chunks_do_not_change_the_figures():
    video = moving_square(17)
    chunks = np.split(video, [1, 2, 2, 9])
    assert measure_motion(iter(chunks), fps=16, lag=3) == motion(video, fps=16, lag=3)


def test_tiny_frames():
    found = motion(noise(4, 3, 5))
    assert math.isfinite(found.flow)
    assert found.flicker < 0.8


def test_motion_refuses():
    with pytest.raises(ValueError, match=r"at least 2 frames.*got 1"):
        motion(noise(1))
    with pytest.raises(ValueError, match="fps must be positive and finite, got 0"):
        motion(noise(2), fps=0)
    with pytest.raises(ValueError, match="lag must be less than the 4 frames, got 4"):
        motion(noise(4), lag=4)
    with pytest.raises(ValueError, match="lag must be at least 1, got 0"):
        motion(noise(4), lag=0)
    with pytest.raises(ValueError, match="one size"):
        measure_motion([noise(2), noise(2, 40)])
    with pytest.raises(ValueError, match="float"):
        motion(noise(2) / 255)


def test_fidelity_is_that_of_the_whole_videos():
    reference = moving_square(13)
    video = np.clip(reference + noise(13, 64, 128).astype(int) // 16 - 8, 0, 255).astype(np.uint8)
    found = measure_fidelity(np.split(video, [2, 9]), np.split(reference, [1, 5, 6]))
    assert found.frames == 13
    assert found.psnr_db == pytest.approx(psnr(video, reference), abs=1e-4)
    assert found.ssim == pytest.approx(ssim(video, reference), abs=1e-5)
    assert (found.lpips is None) == (found.lpips_missing is not None)
    assert measure_fidelity([video], [video]).psnr_db == math.inf


def test_fidelity_refuses():
    video = noise(5)
    with pytest.raises(ValueError, match="got 4 of the reference, and more of the video"):
        measure_fidelity([video], [video[:4]])
    with pytest.raises(ValueError, match="got 4 of the video, and more of the reference"):
        measure_fidelity([video[:4]], [video[:3], video[3:]])
    with pytest.raises(ValueError, match="must hold a frame"):
        measure_fidelity([], [])
    with pytest.raises(ValueError, match="one shape"):
        measure_fidelity([video], [video[:, 8:]])


@pytest.fixture
def no_download(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise AssertionError("downloaded")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    return tmp_path


def test_lpips_without_torchvision_says_how_to_have_it(monkeypatch, no_download):
    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    assert "[lpips]" in str(quality.lpips_missing())
    with pytest.raises(ValueError, match=r".+\[lpips\]"):
        lpips(noise(1), noise(1))
    assert measure_fidelity([noise(1)], [noise(1)]).lpips_missing == quality.lpips_missing()


def test_lpips_without_weights_says_where_they_go(no_download):
    pytest.importorskip("torchvision")
    missing = str(quality.lpips_missing())
    assert str(no_download / "checkpoints" / "alexnet") in missing
    assert "https://" in missing
    with pytest.raises(ValueError, match="AlexNet"):
        lpips(noise(1), noise(1))


@pytest.mark.slow
def test_lpips_with_weights(no_download):
    """Random ones here: the distance is another, the way to it is the same."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    (no_download / "checkpoints").mkdir()
    name = models.AlexNet_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save(models.alexnet().state_dict(), no_download / "checkpoints" / name)
    video, other = noise(5, 48, 64), noise(5, 48, 64, seed=1)
    assert lpips(video, video) == 0
    assert lpips(video, other) > 0
    found = measure_fidelity(np.split(video, [2]), np.split(other, [3]))
    assert found.lpips == pytest.approx(lpips(video, other), rel=1e-5)
    assert found.lpips_missing is None
    small = measure_fidelity([video[:, :16]], [other[:, :16]])
    assert "at least 32 x 32" in str(small.lpips_missing)
    with pytest.raises(ValueError, match="at least 32 x 32"):
        lpips(video[:, :16], other[:, :16])


@pytest.fixture
def run(tmp_path):
    write_video(moving_square(), tmp_path / "a.mp4", fps=16)
    write_video(moving_square(step=2), tmp_path / "b", fps=16)

    def call(*args, code=0):
        result = CliRunner().invoke(app, ["metrics", *map(str, args)])
        assert result.exit_code == code, result.output
        return result

    return call


@pytest.mark.slow
def test_metrics_of_one_file(run, tmp_path):
    result = run(tmp_path / "a.mp4", "--lag", "2", "--json", tmp_path / "a.json")
    found = measure_file(tmp_path / "a.mp4", lag=2)
    assert found.fps == 16
    written = json.loads((tmp_path / "a.json").read_text())
    assert written == json.loads(json.dumps(found.to_dict()))
    for name in ("loop score", "colour drift", "contrast drift", "dynamic degree", "flicker"):
        assert name in result.stdout
    assert f"{found.similarity:.3f} at the given" in result.stdout


def test_metrics_against_a_reference(run, tmp_path):
    result = run(tmp_path / "a.mp4", tmp_path / "b", "--json", tmp_path / "a.json")
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["frames"] == 16
    assert f"{written['psnr_db']:.2f} dB" in result.stdout
    assert f"{written['ssim']:.4f}" in result.stdout
    assert "lpips" in result.stdout.lower()


@pytest.mark.slow
def test_metrics_of_several_videos(run, tmp_path):
    names = [tmp_path / "a.mp4", tmp_path / "b"]
    result = run(*names, "--each", "--json", tmp_path / "each.json")
    written = json.loads((tmp_path / "each.json").read_text())["videos"]
    assert [*written] == [str(name) for name in names]
    alone = json.loads(run(names[0], "--json", "-").stdout)
    assert written[str(names[0])] == alone
    assert "a.mp4" in result.stdout
    assert f"{alone['flicker']:.4f}" in result.stdout
    against = json.loads(run(*names, "--reference", names[1], "--json", "-").stdout)["videos"]
    assert against[str(names[1])]["psnr_db"] == "Infinity"
    assert against[str(names[0])] == json.loads(run(*names, "--json", "-").stdout)


def test_figures_by_frame_go_into_the_json(run, tmp_path):
    pair = tmp_path / "a.mp4", tmp_path / "b"
    found = json.loads(run(*pair, "--by-frame", "--json", "-").stdout)
    errors = [10 ** (-float(x) / 10) for x in found["by_frame"]["psnr_db"]]
    assert -10 * math.log10(sum(errors) / 16) == pytest.approx(found["psnr_db"])
    assert sum(found["by_frame"]["ssim"]) / 16 == pytest.approx(found["ssim"])
    alone = json.loads(run(pair[0], "--by-frame", "--lag", "3", "--json", "-").stdout)
    assert alone["by_frame"]["similarity"][3] == pytest.approx(alone["similarity"])
    assert len(alone["by_frame"]["colors"]) == len(alone["by_frame"]["contrasts"]) == 16
    assert "by_frame" not in json.loads(run(pair[0], "--json", "-").stdout)


def test_a_folder_of_videos_stands_for_its_videos(run, tmp_path):
    write_video(moving_square(step=1), tmp_path / "more" / "c.mp4", fps=16)
    write_video(moving_square(step=2), tmp_path / "more" / "d.gif", fps=20)
    (tmp_path / "more" / "notes.txt").touch()
    written = json.loads(run(tmp_path / "more", "--json", "-").stdout)["videos"]
    assert [*written] == [str(tmp_path / "more" / name) for name in ("c.mp4", "d.gif")]


def test_json_on_standard_output_is_all_that_is_printed(run, tmp_path):
    found = json.loads(run(tmp_path / "a.mp4", tmp_path / "b", "--json", "-").stdout)
    assert found["frames"] == 16
    assert not (tmp_path / "-").exists()


@pytest.mark.slow
def test_metrics_fit_80_columns(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = [tmp_path / "a.mp4", tmp_path / "b"]
    for args in ([*names, "--each"], [*names, "--reference", names[1]], names[:1], names):
        said = run(*args).stdout
        reasons = [line for line in said.splitlines() if "needs" not in line]
        assert max(map(len, reasons)) <= 80


def test_a_folder_of_frames_takes_its_rate_from_the_option(run, tmp_path):
    assert json.loads(run(tmp_path / "b", "--fps", "24", "--json", "-").stdout)["fps"] == 24
    assert json.loads(run(tmp_path / "b", "--json", "-").stdout)["fps"] == 8


@pytest.mark.turns(3)
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("c.png", "c.png", "--metrics", "vmaf"), "vmaf is for videos, and c.png is a picture"),
        (("a.mp4", "d.mp4"), "one size, got 128 x 64 pixels of a.mp4 and 128 x 48 of d.mp4"),
        (("a.mp4", "e.mp4"), "frame rate, got 16 frames a second of a.mp4 and 24 of e.mp4"),
        (("a.mp4", "f.mp4"), "as many frames, got 9 of the reference, and more of the video"),
        (("b", "b", "--metrics", "cvvdp"), "frames a second, which neither video states"),
        (("nothing.mp4",), "nothing.mp4"),
        (("a.mp4", "nothing"), "nothing"),
        (("a.mp4", "b", "--lag", "3"), "--lag"),
        (("a.mp4", "--by-frame"), "--json FILE: give one"),
        (("a.mp4", "--lag", "16"), "less than the 16 frames, got 16"),
    ],
)
def test_metrics_refuses_in_one_line(run, tmp_path, monkeypatch, args, words):
    write_video(noise(1), tmp_path / "c.png", fps=16)
    write_video(moving_square(height=48), tmp_path / "d.mp4", fps=16)
    write_video(moving_square(), tmp_path / "e.mp4", fps=24)
    write_video(moving_square(9), tmp_path / "f.mp4", fps=16)
    monkeypatch.chdir(tmp_path)
    [line] = run(*args, code=2).stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
