"""Optical flow of pictures that were moved by a known number of pixels."""

import math
import sys

import numpy as np
import pytest

from gen_accel.measure import measure_motion
from gen_accel.measure.motion import Flow, flow_missing, largest

cv2 = pytest.importorskip("cv2")


def texture(height, width, *, grain=2.0, seed=0):
    """(H, W) float32 of about 128, smooth over `grain` pixels."""
    noise = np.random.default_rng(seed).standard_normal((height, width)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), grain)
    return 128 + 45 * (smooth - smooth.mean()) / smooth.std()


def moved(picture, down, right):
    """Moved by any fraction of a pixel; what comes in at an edge is cut off."""
    matrix = np.float32([[1, 0, right], [0, 1, down]])
    shape = picture.shape[::-1]
    there = cv2.warpAffine(picture, matrix, shape, flags=cv2.INTER_CUBIC)
    return np.clip(there[24:-24, 24:-24], 0, 255).round().astype(np.uint8)


def speed(before, after):
    return largest(Flow().speeds(before, after))


@pytest.mark.parametrize("size", [96, 256])
@pytest.mark.parametrize("step", [(0, 3), (0, 0.5), (0.75, 1.25), (-6, 0), (0, 12)])
def test_a_moved_picture_moves_by_its_step(size, step):
    picture = texture(size + 48, size + 48)
    found = Flow().speeds(moved(picture, 0, 0), moved(picture, *step))
    if size == 256:  # of the smaller one, much has left the picture
        assert np.median(found) == pytest.approx(math.hypot(*step), rel=0.02, abs=0.05)
    assert largest(found) == pytest.approx(math.hypot(*step), rel=0.1, abs=0.1)


def test_only_what_moves_has_a_speed():
    picture = texture(112, 112)
    before = moved(picture, 0, 0)
    after = before.copy()
    after[20:52, 24:56] = before[20:52, 20:52]
    found = Flow().speeds(before, after)
    assert np.median(found[26:46, 32:48]) == pytest.approx(4, abs=0.1)
    assert found[:, :10].max() == 0
    assert (found > 0).mean() < 0.35


@pytest.mark.parametrize("deviation", [2, 8])
def test_noise_on_a_plain_wall_stands_still(deviation):
    """Which DIS alone gives large flows."""
    generator = np.random.default_rng(0)
    walls = 128 + generator.normal(0, deviation, (2, 128, 128))
    walls[:, 40:80, 40:80] = texture(40, 40)
    before, after = np.clip(walls, 0, 255).astype(np.uint8)
    plain = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(before, after, None)
    assert largest(np.hypot(plain[..., 0], plain[..., 1])) > 2
    assert speed(before, after) < 0.1


def test_pure_noise_stands_still():
    frames = np.random.default_rng(0).integers(0, 256, (2, 96, 96), dtype=np.uint8)
    assert speed(*frames) < 0.1


def test_a_still_picture_and_a_fading_one_stand_still():
    before = moved(texture(112, 112), 0, 0)
    assert speed(before, before) == 0
    assert speed(before, np.clip(before.astype(int) - 4, 0, 255).astype(np.uint8)) < 0.05


def test_a_move_is_found_through_noise_and_fading():
    picture, generator = texture(112, 112), np.random.default_rng(0)
    frames = [moved(picture, 0, right).astype(int) for right in (0, 3)]
    noisy = [frame + generator.normal(0, 4, frame.shape) for frame in frames]
    for before, after in (noisy, (frames[0], frames[1] - 5)):
        pair = [np.clip(frame, 0, 255).round().astype(np.uint8) for frame in (before, after)]
        assert np.median(Flow().speeds(*pair)) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (15, 40), (9, 200)])
def test_small_frames(shape):
    frames = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
    found = Flow().speeds(*frames)
    assert found.shape == shape
    assert np.isfinite(found).all()


def test_the_largest_are_five_percent():
    speeds = np.zeros((10, 10), np.float32)
    speeds[0, :5] = 1, 2, 3, 4, 5
    speeds[1, 0] = 0.5
    assert largest(speeds) == 3
    assert largest(np.float32([[7]])) == 7


def test_without_opencv_all_but_the_flow_is_measured(monkeypatch):
    video = np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), dtype=np.uint8)
    whole = measure_motion([video]).to_dict()
    assert whole["flow_missing"] is None
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr("gen_accel.measure.motion.find_spec", lambda name: None)
    found = measure_motion([video]).to_dict()
    assert found.pop("flow_missing") == flow_missing()
    assert "[quality]" in str(flow_missing())
    for name in ("flow", "dynamic_degree", "dynamic"):
        assert found.pop(name) is None
    for name, value in found.items():
        assert value == whole[name]
    with pytest.raises(ModuleNotFoundError, match=r"optical flow needs cv2.*\[quality\]"):
        Flow()
