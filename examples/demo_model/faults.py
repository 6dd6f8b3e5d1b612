"""Clips of `scenes` with one fault each, to judge the judge by."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from demo_model.scenes import (
    BACKGROUNDS,
    BEHIND,
    BOUNCES,
    CIRCLES,
    COLORS,
    FRONT,
    GREY,
    HIDES,
    LEAVES,
    MOVES,
    SHAPES,
    SIZES,
    STAYS,
    Group,
    Scene,
    draw,
)
from torch import Tensor

from gen_accel.demo import DIRECTIONS


def other_count(scene: Scene, seed: int) -> Scene:
    """One object more or less."""
    lanes = scene.depth or scene.motion == LEAVES or (scene.motion == MOVES and scene.other)
    most = 2 if lanes else 4 - (scene.other is not None)
    count = scene.group.count
    more = count == 1 or (seed % 2 and count < most)
    return replace(scene, group=replace(scene.group, count=count + (1 if more else -1)))


def other_color(scene: Scene, seed: int) -> Scene:
    named = [group.color for group in scene.groups]
    return replace(scene, group=replace(scene.group, color=_other(COLORS, named, seed)))


def other_shape(scene: Scene, seed: int) -> Scene:
    shape = _other(SHAPES, [scene.group.shape], seed)
    return replace(scene, group=replace(scene.group, shape=shape))


def other_size(scene: Scene, seed: int) -> Scene:
    size = _other(SIZES, [scene.group.size], seed)
    return replace(scene, group=replace(scene.group, size=size))


def other_motion(scene: Scene, seed: int) -> Scene:
    """Another direction, or another path."""
    if scene.direction is not None and (scene.depth or seed % 2):
        return replace(scene, direction=_other(DIRECTIONS, [scene.direction], seed))
    if scene.motion == HIDES:
        direction = _other(DIRECTIONS, [], seed)
        return replace(scene, motion=MOVES, direction=direction, speed="quickly")
    motion = _other((MOVES, BOUNCES, CIRCLES, STAYS), [scene.motion], seed)
    moves = motion == MOVES
    direction, speed = ("left", "slowly") if moves else (None, None)
    return replace(scene, motion=motion, direction=direction, speed=speed)


def other_depth(scene: Scene, seed: int) -> Scene | None:
    if scene.depth is None or scene.motion == HIDES:
        return None
    return replace(scene, depth=FRONT if scene.depth == BEHIND else BEHIND)


def other_background(scene: Scene, seed: int) -> Scene:
    return replace(scene, background=_other(BACKGROUNDS, [scene.background], seed), pan=None)


def other_pan(scene: Scene, seed: int) -> Scene | None:
    if scene.background == BACKGROUNDS[0]:
        return None
    pans = [pan for pan in ("left", "right", None) if pan != scene.pan]
    return replace(scene, pan=pans[seed % 2])


OTHERS: dict[str, Callable[[Scene, int], Scene | None]] = {
    "count": other_count,
    "color": other_color,
    "shape": other_shape,
    "size": other_size,
    "motion": other_motion,
    "depth": other_depth,
    "background": other_background,
    "pan": other_pan,
}
HALFWAY = ("becomes another", "vanishes")
KINDS = (*OTHERS, "one of another colour", *HALFWAY)


def planted(kind: str, scene: Scene, *, frames: int, seed: int) -> Tensor | None:
    """Draw a scene with a fault; None where it cannot have this one.

    Args:
        kind: of `KINDS`. Objects become others, or vanish, halfway through the clip.

    Returns:
        (F, H, W, 3) uint8.
    """
    if kind in OTHERS:
        other = OTHERS[kind](scene, seed)
        return None if other is None else draw(other, frames=frames, seed=seed).video
    film, half = draw(scene, frames=frames, seed=seed), frames // 2
    if kind == "becomes another":
        other = (other_shape if seed % 2 else other_color)(scene, seed)
        later = draw(other, frames=frames, seed=seed).video[half:]
        return torch.cat([film.video[:half], later])
    video = film.video.clone()
    if kind == "vanishes":
        gone = film.visible[: scene.group.count, half:].any(0).float()[:, None]
        gone = torch.nn.functional.max_pool2d(gone, 3, 1, 1)[:, 0] > 0
        video[half:][gone] = round(GREY)
        return video
    color = _other(COLORS, [group.color for group in scene.groups], seed)
    stray = draw(Scene(Group(1, "small", color, "circle"), BOUNCES), frames=frames, seed=seed)
    video[stray.visible[0]] = stray.video[stray.visible[0]]
    return video


def _other(names: Iterable[str], but: Iterable[str], seed: int) -> str:
    rest = [name for name in names if name not in [*but]]
    return rest[seed % len(rest)]
