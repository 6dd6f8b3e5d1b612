"""VMAF and ColorVideoVDP: held to the tools themselves, and in the order of what is seen."""

import json
import os
import subprocess

import numpy as np
import pytest

from gen_accel.measure import (
    cvvdp_jod,
    measure_fidelity,
    quality,
    vmaf,
    vmaf_per_frame,
    write_video,
)
from gen_accel.measure.quality import (
    NOT_ASKED,
    compare_files,
    cvvdp_of_streams,
    enlarged,
    enlargement,
    ffmpeg_binary,
)

needs_vmaf = pytest.mark.skipif(bool(quality.vmaf_missing()), reason=str(quality.vmaf_missing()))


def needs_cvvdp(test):
    """It takes a tenth of a second for a frame."""
    missing = quality.cvvdp_missing()
    return pytest.mark.slow(pytest.mark.skipif(bool(missing), reason=str(missing))(test))


def scene(frames=6, height=48, width=64, grain=4):
    """(F, H, W, 3) uint8: a texture that moves right by a pixel a frame."""
    generator = np.random.default_rng(0)
    size = (height // grain + 1, (width + frames) // grain + 1, 3)
    coarse = generator.integers(40, 216, size).astype(np.uint8)
    picture = coarse.repeat(grain, 0).repeat(grain, 1)
    return np.stack([picture[:height, i : i + width] for i in range(frames)])


def blurred(video, pixels):
    moved = [np.roll(video.astype(float), x, axis=2) for x in range(-pixels, pixels + 1)]
    return np.mean(moved, axis=0).astype(np.uint8)


def noisy(video, deviation):
    noise = np.random.default_rng(1).normal(0, deviation, video.shape)
    return np.clip(video + noise, 0, 255).astype(np.uint8)


WORSE = {"blur": [lambda v: blurred(v, 1), lambda v: blurred(v, 3)]}
WORSE["noise"] = [lambda v: noisy(v, 8), lambda v: noisy(v, 30)]


@needs_vmaf
@pytest.mark.parametrize("kind", WORSE)
def test_vmaf_falls_with_what_is_seen(kind):
    video = scene()
    slight, strong = (vmaf(worse(video), video) for worse in WORSE[kind])
    assert vmaf(video, video) > 95
    assert 0 <= strong < slight - 5 < vmaf(video, video) - 10


@pytest.mark.turns(3)
@needs_cvvdp
@pytest.mark.parametrize("kind", WORSE)
def test_jod_falls_with_what_is_seen(kind):
    video = scene(3)
    slight, strong = (cvvdp_jod(worse(video), video, fps=16) for worse in WORSE[kind])
    assert cvvdp_jod(video, video, fps=16) == pytest.approx(10, abs=1e-3)
    assert strong < slight - 0.3 < 10 - 0.6


@needs_vmaf
@pytest.mark.parametrize("size", [(48, 64), (37, 51), (160, 162)])
def test_vmaf_is_what_ffmpeg_says_of_the_files(tmp_path, size):
    """Of lossless files, by the two inputs that its documentation shows."""
    video = scene(5, *size)
    other = noisy(video, 12)
    write_video(video, tmp_path / "reference", fps=25)
    write_video(other, tmp_path / "video", fps=25)
    factor = enlargement(*size)
    shown = f"scale=iw*{factor}:ih*{factor}:flags=neighbor:out_color_matrix=bt709:out_range=tv"
    graph = (
        f"[0:v]{shown},format=yuv444p[a];[1:v]{shown},format=yuv444p[b];"
        "[a][b]libvmaf=log_fmt=json:log_path=log.json"
    )
    inputs = [f"-i {tmp_path}/{name}/%04d.png" for name in ("video", "reference")]
    command = [ffmpeg_binary(), "-v", "error", *" ".join(inputs).split(), "-lavfi", graph]
    subprocess.run([*command, "-f", "null", "-"], cwd=tmp_path, check=True)
    told = json.loads((tmp_path / "log.json").read_text())
    scores = vmaf_per_frame(other, video)
    assert scores == pytest.approx([frame["metrics"]["vmaf"] for frame in told["frames"]])
    assert vmaf(other, video) == pytest.approx(told["pooled_metrics"]["vmaf"]["mean"])


@needs_cvvdp
def test_jod_is_what_the_package_says_of_the_arrays():
    import pycvvdp
    import torch

    video = scene(5)
    other = noisy(video, 12)
    factor = enlargement(48, 64)
    large = [clip.repeat(factor, 1).repeat(factor, 2) for clip in (other, video)]
    metric = pycvvdp.cvvdp(display_name="standard_4k", quiet=True)
    with torch.no_grad():
        told, _ = metric.predict(*large, dim_order="FHWC", frames_per_second=16)
    assert cvvdp_jod(other, video, fps=16) == pytest.approx(float(told), abs=1e-4)


@needs_vmaf
def test_chunks_and_threads_do_not_change_vmaf():
    video, other = scene(7), noisy(scene(7), 12)
    with quality.VMAF(threads=2) as metric:
        for start in (0, 3, 4):
            part = slice(start, {0: 3, 3: 4, 4: 7}[start])
            metric.update(other[part], video[part])
        assert metric.compute() == vmaf_per_frame(other, video)


@needs_cvvdp
def test_chunks_do_not_change_the_jod():
    video, other = scene(5), noisy(scene(5), 12)
    found = cvvdp_of_streams(np.split(other, [2]), np.split(video, [1, 4]), frames=5, fps=16)
    assert found == cvvdp_jod(other, video, fps=16)


@needs_cvvdp
def test_the_frame_rate_changes_the_jod():
    video = scene(4)
    flicker = video.copy()
    flicker[1::2] = np.clip(video[1::2].astype(int) + 12, 0, 255)
    slow, fast = (cvvdp_jod(flicker, video, fps=rate) for rate in (8, 60))
    assert fast > slow + 0.5  # flicker that the eye hardly follows


def test_small_frames_are_enlarged_by_whole_factors():
    assert [enlargement(n, 2 * n) for n in (16, 64, 96, 144, 145, 480)] == [18, 4, 3, 2, 1, 1]
    frame = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(enlarged(frame, 3)[::3, ::3], frame)
    assert enlarged(frame, 3).shape == (6, 6, 3)


@needs_vmaf
@needs_cvvdp
def test_fidelity_has_what_was_asked_for():
    video, other = scene(4), noisy(scene(4), 12)
    plain = measure_fidelity([other], [video])
    assert plain.vmaf == pytest.approx(vmaf(other, video))
    assert plain.vmaf_lowest == min(vmaf_per_frame(other, video)) < plain.vmaf
    assert (plain.cvvdp_jod, plain.cvvdp_missing) == (None, NOT_ASKED)
    assert plain.enlarged == 6
    both = measure_fidelity([other], [video], metrics=("cvvdp",), fps=16)
    assert (both.vmaf, both.vmaf_missing, both.lpips_missing) == (None, NOT_ASKED, NOT_ASKED)
    assert both.cvvdp_jod == cvvdp_jod(other, video, fps=16)
    assert both.psnr_db == plain.psnr_db


def test_what_is_missing_is_a_sentence_and_no_error(monkeypatch):
    video = scene(2)
    monkeypatch.setattr(quality, "_has_libvmaf", lambda executable: False)
    found = measure_fidelity([video], [video])
    assert found.vmaf is None
    assert "IMAGEIO_FFMPEG_EXE" in str(found.vmaf_missing)
    with pytest.raises(ValueError, match="an ffmpeg with libvmaf"):
        measure_fidelity([video], [video], metrics=("vmaf",))
    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    assert '[quality]"' in str(measure_fidelity([video], [video]).vmaf_missing)
    with pytest.raises(ValueError, match=r"cvvdp needs pycvvdp: pip install .*\[cvvdp"):
        measure_fidelity([video], [video], metrics=("cvvdp",), fps=16)


def test_refusals():
    video = scene(3)
    with pytest.raises(ValueError, match="got 'vmav'; did you mean 'vmaf'"):
        measure_fidelity([video], [video], metrics=("vmav",))
    with pytest.raises(ValueError, match="frames a second, which neither video states"):
        measure_fidelity([video], [video], metrics=("cvvdp",))
    with pytest.raises(ValueError, match="a second time: give lists of chunks"):
        measure_fidelity(iter([video]), [video], metrics=("cvvdp",), fps=16)
    with pytest.raises(ValueError, match="vmaf is for videos, got a picture"):
        measure_fidelity([video[:1]], [video[:1]], metrics=("vmaf",))
    assert "a picture" in str(measure_fidelity([video[:1]], [video[:1]]).vmaf_missing)
    with pytest.raises(ValueError, match="one shape"):
        vmaf(video, video[:, 1:])
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, got 12 x 64"):
        vmaf(video[:, :12], video[:, :12])
    assert "at least 16 x 16" in str(
        measure_fidelity([video[:, :12]], [video[:, :12]]).vmaf_missing
    )
    with pytest.raises(ValueError, match="hold a frame, got none"):
        vmaf(video[:0], video[:0])


@needs_cvvdp
def test_jod_refuses():
    video = scene(3)
    with pytest.raises(ValueError, match="one shape"):
        cvvdp_jod(video, video[:2], fps=16)
    with pytest.raises(ValueError, match="fps must be positive and finite, got 0"):
        cvvdp_jod(video, video, fps=0)
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, got 12 x 64"):
        cvvdp_jod(video[:, :12], video[:, :12], fps=16)
    with pytest.raises(ValueError, match="must hold 4 frames, got fewer"):
        cvvdp_of_streams([video], [video], frames=4, fps=16)


@needs_vmaf
def test_an_ffmpeg_that_ends_is_an_error_with_its_words(monkeypatch):
    monkeypatch.setattr(quality, "_SHOWN", "scale=no_such_size")
    with pytest.raises(OSError, match=r"ffmpeg computed no VMAF: .+"):
        vmaf(scene(40, 160, 160), scene(40, 160, 160))


@needs_vmaf
def test_no_process_and_no_folder_is_left(monkeypatch):
    metric = quality.VMAF()
    metric.update(scene(2), scene(2))
    process, folder = metric._process, metric._folder.name
    assert process.poll() is None
    assert os.path.isdir(folder)
    with metric, pytest.raises(RuntimeError, match="stopped"):
        raise RuntimeError("stopped")
    assert process.poll() is not None
    assert not os.path.exists(folder)


def test_files_of_different_sizes_or_rates_are_refused_before_they_are_read(tmp_path):
    first = write_video(scene(4), tmp_path / "a.mp4", fps=16)
    other = write_video(scene(4), tmp_path / "b.mp4", fps=24)
    large = write_video(scene(4, 64), tmp_path / "c.mp4", fps=16)
    shown = write_video(scene(4), tmp_path / "d.gif", fps=16)
    with pytest.raises(ValueError, match=r"one frame rate, got 24 .*b\.mp4 and 16 .*a\.mp4"):
        compare_files(other, first)
    with pytest.raises(ValueError, match=r"one size, got 64 x 64 pixels of .*c\.mp4 and 64 x 48"):
        compare_files(large, first)
    assert compare_files(shown, first).frames == 4  # a GIF rounds its rate
