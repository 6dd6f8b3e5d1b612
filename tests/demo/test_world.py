from dataclasses import replace

import pytest
import torch
from demo_model.scoring import keeps_pace, quarter_paces, score, strays
from torch import Tensor

from gen_accel.demo import world
from gen_accel.demo.detector import detect
from gen_accel.demo.world import BACKGROUND, COLORS, DIRECTIONS, SHAPES, SPEEDS, Scene

RED_CIRCLE = Scene("red", "circle", "right", "quickly")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def render(*scenes: Scene, frames: int = 33, size: int = 96, seed: int = 0) -> Tensor:
    return world.render(list(scenes), frames=frames, size=size, generator=generator(seed))


def to_pixels(video: Tensor) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] to (B, F, H, W, 3) uint8."""
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def add_noise(video: Tensor) -> Tensor:
    return video + 15 / 127.5 * torch.randn(video.shape, generator=generator(1))


def blur(video: Tensor) -> Tensor:
    """A 3 x 3 binomial filter, twice: a standard deviation of one pixel."""
    for axis in (-1, -2) * 2:
        video = (video.roll(1, axis) + 2 * video + video.roll(-1, axis)) / 4
    return video


def assert_right(video: Tensor, scenes: tuple[Scene, ...]) -> None:
    for clip, scene in zip(to_pixels(video), scenes, strict=True):
        detection = detect(clip)
        assert detection.caption == scene.caption
        assert detection.visible_share == 1
        assert score(detection, scene).right, (scene, detection)


@pytest.mark.slow
def test_every_scene_is_detected():
    for start in range(0, len(world.SCENES), 24):
        scenes = world.SCENES[start : start + 24]
        assert_right(render(*scenes), scenes)


@pytest.mark.turns(5)
@pytest.mark.slow
@pytest.mark.parametrize(
    "distort", [lambda video: video, add_noise, blur], ids=["", "noise", "blur"]
)
@pytest.mark.parametrize("size", [48, 96])
def test_detection_survives_small_canvases_noise_and_blur(size, distort):
    scenes = world.scored_scenes(24)
    assert_right(distort(render(*scenes, size=size)), scenes)


def test_pixels_may_be_numpy():
    video = to_pixels(render(RED_CIRCLE))[0]
    assert detect(video.numpy()) == detect(video)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_few_frames(frames):
    detection = detect(to_pixels(render(RED_CIRCLE, frames=frames))[0])
    assert (detection.color, detection.shape) == ("red", "circle")
    assert detection.motion == ("still" if frames == 1 else "moves")


def test_every_other_scene_is_scored_wrong():
    detection = detect(to_pixels(render(RED_CIRCLE))[0])
    for scene in world.SCENES:
        result = score(detection, scene)
        assert result.right == (scene == RED_CIRCLE)
        for part in ("color", "shape", "direction", "speed"):
            assert getattr(result, part) == (getattr(scene, part) == getattr(RED_CIRCLE, part))


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("distort", [lambda video: video, add_noise], ids=["", "noise"])
def test_frozen_clip_is_wrong(distort, speed):
    scene = Scene("yellow", "square", "up", speed)
    frozen = render(scene)[:, :, :1].repeat(1, 1, 33, 1, 1)
    detection = detect(to_pixels(distort(frozen))[0])
    assert detection.caption == "a yellow square stands still"
    result = score(detection, scene)
    assert result.color
    assert result.shape
    assert not result.direction
    assert not result.speed
    assert not result.right


def test_clip_that_freezes_halfway_is_wrong():
    video = render(RED_CIRCLE)
    video[:, :, 20:] = video[:, :, 19:20]
    detection = detect(to_pixels(video)[0])
    assert detection.motion == "wanders"
    assert not score(detection, RED_CIRCLE).right


def test_colour_that_changes_is_wrong():
    blue_circle = Scene("blue", "circle", "right", "quickly")
    red, blue = render(RED_CIRCLE), render(blue_circle)
    detection = detect(to_pixels(torch.cat([red[:, :, :17], blue[:, :, 17:]], dim=2))[0])
    assert detection.color == "red"
    assert detection.color_share == pytest.approx(17 / 33)
    result = score(detection, RED_CIRCLE)
    assert not result.color
    assert result.shape
    assert result.direction
    assert result.speed


def test_unknown_colour_and_shape_have_no_name():
    grey = to_pixels(render(RED_CIRCLE))[0].amax(3, keepdim=True).expand(-1, -1, -1, 3)
    assert detect(grey).caption == "a discoloured circle moves right quickly"
    bar = torch.full((33, 96, 96, 3), BACKGROUND, dtype=torch.uint8)
    bar[:, 40:46] = torch.tensor(COLORS["green"], dtype=torch.uint8)
    assert detect(bar).caption == "a green blob stands still"


def test_diagonal_mover_wanders():
    first = render(RED_CIRCLE)[0, :, 0]
    video = torch.stack([first.roll((2 * t, 2 * t), (1, 2)) for t in range(33)], dim=1)
    detection = detect(to_pixels(video[None])[0])
    assert detection.caption == "a red circle wanders"
    assert detection.direction is None
    assert detection.speed is None
    assert not score(detection, RED_CIRCLE).right


def test_mover_that_turns_back_wanders():
    video = render(RED_CIRCLE)
    video = torch.cat([video, video.flip(2)], dim=2)
    assert detect(to_pixels(video)[0]).motion == "wanders"


def test_what_strays_from_its_path():
    """A jump lies between as many pairs as frames that these are apart."""
    (clip,) = to_pixels(render(RED_CIRCLE))
    assert strays(clip, RED_CIRCLE) == 0
    jumps = torch.cat([clip[:16], clip[16:].roll(30, dims=2)])
    assert detect(jumps).caption == RED_CIRCLE.caption
    assert strays(jumps, RED_CIRCLE) == 4 / 29
    assert strays(clip, replace(RED_CIRCLE, direction="left")) == 1
    assert strays(clip[:1].expand(33, -1, -1, -1), RED_CIRCLE) == 1
    assert strays(torch.zeros_like(clip), RED_CIRCLE) == 1


def test_a_clip_keeps_its_pace_in_every_quarter_or_not_at_all():
    (clip,) = to_pixels(render(RED_CIRCLE, frames=64))
    assert quarter_paces(clip, RED_CIRCLE) == pytest.approx([1.0] * 4, abs=0.06)
    assert keeps_pace(quarter_paces(clip, RED_CIRCLE))
    stops = torch.cat([clip[:48], clip[47:48].expand(16, -1, -1, -1)])
    assert score(detect(stops), RED_CIRCLE).right  # three quarters of its pairs move
    assert quarter_paces(stops, RED_CIRCLE)[-1] == 0
    assert not keeps_pace(quarter_paces(stops, RED_CIRCLE))
    assert quarter_paces(clip.flip(0), RED_CIRCLE) == pytest.approx([-1.0] * 4, abs=0.06)
    gone = torch.cat([clip[:48], torch.zeros_like(clip[:16])])
    assert quarter_paces(gone, RED_CIRCLE)[-1] == 0
    assert not keeps_pace(quarter_paces(clip, replace(RED_CIRCLE, speed="slowly")))


def test_empty_clip():
    detection = detect(torch.full((33, 96, 96, 3), BACKGROUND, dtype=torch.uint8))
    names = (detection.color, detection.shape, detection.motion, detection.direction)
    assert (*names, detection.speed) == (None,) * 5
    assert detection.visible_share == detection.color_share == detection.shape_share == 0
    assert detection.pace == 0
    assert detection.caption == "nothing"
    assert not score(detection, RED_CIRCLE).right


@pytest.mark.parametrize(
    "video",
    [torch.zeros(3, 9, 96, 96, dtype=torch.uint8), torch.zeros(9, 96, 96, 3)],
    ids=["channels first", "float"],
)
def test_other_layouts_are_refused(video):
    with pytest.raises(ValueError, match="uint8"):
        detect(video)


def test_small_canvas_is_refused():
    with pytest.raises(ValueError, match="40 pixels"):
        detect(torch.zeros(9, 32, 96, 3, dtype=torch.uint8))


def test_unseen_scenes():
    assert len(world.SCENES) == 96
    assert len(world.UNSEEN) == 12
    assert not set(world.UNSEEN) & set(world.SEEN)
    assert set(world.UNSEEN) | set(world.SEEN) == set(world.SCENES)
    words = {"color": COLORS, "shape": SHAPES, "direction": DIRECTIONS, "speed": SPEEDS}
    for part, values in words.items():
        assert {getattr(scene, part) for scene in world.SEEN} == set(values)
        assert {getattr(scene, part) for scene in world.UNSEEN} == set(values)


def test_scored_scenes_are_stable():
    scenes = world.scored_scenes(24)
    assert scenes == world.scored_scenes(24)
    assert scenes[:4] == world.scored_scenes(4)
    assert len(set(scenes)) == 24
    assert set(scenes) <= set(world.SEEN)
    assert scenes[0].caption == "a yellow square moves down slowly"


def test_render_is_deterministic_and_bounded():
    scene = Scene("green", "triangle", "down", "slowly")
    video = render(scene, seed=3)
    assert video.shape == (1, 3, 33, 96, 96)
    assert torch.equal(video, render(scene, seed=3))
    assert not torch.equal(video, render(scene, seed=4))
    assert video.min() >= -1
    assert video.max() <= 1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_motion_wraps_around(direction):
    scene = Scene("blue", "triangle", direction, "quickly")
    video = render(scene, frames=97, size=48)
    mass = (video + 1).sum((0, 1, 3, 4))
    torch.testing.assert_close(mass, mass[:1].expand_as(mass), rtol=0.01, atol=0.0)
    assert_right(video, (scene,))


def test_silhouette_is_centred_on_its_centre_of_mass():
    pixels = torch.arange(40) + 0.5 - 20
    for shape in SHAPES:
        mass = world.silhouette(shape, size=40, x=2.0, y=-3.0).float()
        assert (mass.sum(0) @ pixels / mass.sum()).item() == pytest.approx(2, abs=0.3)
        assert (mass.sum(1) @ pixels / mass.sum()).item() == pytest.approx(-3, abs=0.3)
