"""Detector of a clip's content from its pixels.

F frames, H rows, W columns, P pairs of frames, T templates.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gen_accel.demo import COLORS, DIRECTIONS, SHAPES, SPEEDS, world
from gen_accel.demo.world import BACKGROUND, RADIUS

CONTRAST = 80  # grey levels above the background; the darkest colour, green, has 180
LEAST_AREA = 0.25 * math.pi * RADIUS**2  # pixels
COLOR_REACH = 100.0  # grey levels in RGB; the closest two colours are 170 apart
LEAST_OVERLAP = 0.6  # intersection over union; a circle and a square have 0.83
CROP = 40  # pixels; the triangle reaches 16 from its centre of mass
SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # pixels

STRIDE = 4  # frames between the two of a pair: averages out the noise of single frames
STILL = 0.2  # pixels a frame; the slow speed is 0.8
CONSISTENT = 0.75  # share of the pairs that must agree on one direction


@dataclass(frozen=True)
class Detection:
    """Content of a clip. Shares are of all its frames, in [0, 1]."""

    color: str | None
    color_share: float  # frames whose own colour is `color`
    shape: str | None
    shape_share: float  # frames whose own shape is `shape`
    motion: str | None  # "moves", "still" or "wanders"; None when there is no object
    direction: str | None
    speed: str | None
    pace: float  # median absolute displacement along the main axis, pixels a frame
    visible_share: float  # frames in which there is an object

    @property
    def caption(self) -> str:
        if self.motion is None:
            return "nothing"
        motion = {
            "moves": f"moves {self.direction} {self.speed}",
            "still": "stands still",
            "wanders": "wanders",
        }[self.motion]
        return f"a {self.color or 'discoloured'} {self.shape or 'blob'} {motion}"


def detect(video: np.ndarray | Tensor) -> Detection:
    """Find the object in every frame, then name what most frames agree on.

    Args:
        video: (F, H, W, 3) uint8, H and W at least 40.
    """
    video = torch.as_tensor(video).cpu()
    if video.ndim != 4 or video.shape[3] != 3 or video.dtype != torch.uint8:
        raise ValueError(
            f"video must be (F, H, W, 3) uint8, got {tuple(video.shape)} {video.dtype}"
        )
    if min(video.shape[1:3]) < CROP:
        raise ValueError(f"video must be {CROP} pixels high and wide, got {tuple(video.shape)}")

    mask, visible, center = tracked(video)
    color, color_share = _vote(_frame_colors(video, mask), COLORS, visible)
    shape, shape_share = _vote(_frame_shapes(mask, center), SHAPES, visible)
    motion, direction, pace = _motion(velocity(mask, visible, center))
    speed = min(SPEEDS, key=lambda one: abs(math.log(pace / SPEEDS[one]))) if direction else None
    return Detection(
        color=color,
        color_share=color_share,
        shape=shape,
        shape_share=shape_share,
        motion=motion if visible.any() else None,
        direction=direction,
        speed=speed,
        pace=pace,
        visible_share=visible.float().mean().item(),
    )


def tracked(video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the object in (F, H, W, 3): its pixels, (F, H, W) bool; whether it is there, (F,) bool;
    and (F, 2), (x, y) of its centre of mass on the torus, in pixels from the top left corner."""
    mask = video.amax(3) > BACKGROUND + CONTRAST  # some channel is far above the background
    centers = []
    for mass in (mask.sum(1), mask.sum(2)):  # (F, N) at each of N pixels of a circle
        pixels = mass.shape[1]
        angle = (torch.arange(pixels) + 0.5) * (2 * math.pi / pixels)
        mean = torch.atan2(mass.float() @ angle.sin(), mass.float() @ angle.cos())
        centers.append(torch.remainder(mean * (pixels / (2 * math.pi)), pixels))
    return mask, mask.sum((1, 2)) >= LEAST_AREA, torch.stack(centers, dim=1)


def velocity(mask: Tensor, visible: Tensor, center: Tensor) -> Tensor:
    """Velocity of a `tracked` object, (P, 2) (x, y) in pixels a frame, for the pairs of frames
    that both show it."""
    stride = max(1, min(STRIDE, len(center) - 1))
    size = torch.tensor([mask.shape[2], mask.shape[1]])
    step = center[stride:] - center[:-stride]
    step = torch.remainder(step + size / 2, size) - size / 2
    return step[visible[stride:] & visible[:-stride]] / stride


def _frame_colors(video: Tensor, mask: Tensor) -> Tensor:
    """(F,) index into COLORS: the colour of more than half of the object's pixels, -1 if none."""
    palette = torch.tensor(list(COLORS.values()), dtype=torch.float32)
    distance, nearest = torch.cdist(video[mask].float(), palette).min(1)
    frame, close = mask.nonzero()[:, 0], distance < COLOR_REACH
    ballot = frame[close] * len(palette) + nearest[close]
    votes = ballot.bincount(minlength=len(mask) * len(palette)).view(len(mask), -1)
    most, winner = votes.max(1)
    return torch.where(2 * most > mask.sum((1, 2)), winner, -1)


def _frame_shapes(mask: Tensor, center: Tensor) -> Tensor:
    """(F,) index into SHAPES: the shape that overlaps the object best, -1 if none does well."""
    _, height, width = mask.shape
    corner = (center - CROP / 2).round().long()
    columns = (corner[:, 0, None] + torch.arange(CROP)) % width
    rows = (corner[:, 1, None] + torch.arange(CROP)) % height
    frames = torch.arange(len(mask))[:, None, None]
    # (F, CROP, CROP)
    crop = mask[frames, rows[:, :, None], columns[:, None, :]]

    templates = _templates()
    # (F, T)
    both = crop.flatten(1).float() @ templates.T
    # The object's area is the whole canvas's: what lies outside of the crop counts against it.
    either = mask.sum((1, 2))[:, None] + templates.sum(1) - both
    overlap, best = (both / either).max(1)
    return torch.where(overlap >= LEAST_OVERLAP, best // len(SHIFTS) ** 2, -1)


@lru_cache(maxsize=1)
def _templates() -> Tensor:
    """(T, CROP * CROP) in {0, 1}: every shape at every shift, shape by shape."""
    with torch.inference_mode(False):
        silhouettes = [
            world.silhouette(shape, size=CROP, x=x, y=y)
            for shape in SHAPES
            for y in SHIFTS
            for x in SHIFTS
        ]
        return torch.stack(silhouettes).flatten(1).float()


def _vote(labels: Tensor, names: Collection[str], visible: Tensor) -> tuple[str | None, float]:
    """The name that most visible frames bear and its share of all frames; (None, 0) if the most
    bear none.

    Args:
        labels: (F,) index into `names`, or -1.
        visible: (F,) bool.
    """
    counts = (labels[visible] + 1).bincount(minlength=len(names) + 1)
    winner = int(counts.argmax())
    if winner == 0:
        return None, 0.0
    return list(names)[winner - 1], counts[winner].item() / len(labels)


def _motion(velocity: Tensor) -> tuple[str, str | None, float]:
    """Motion, direction and pace from (P, 2) velocities."""
    if len(velocity) == 0:
        return "still", None, 0.0
    paces = velocity.abs().median(0).values
    axis = int(paces.argmax())
    pace = paces[axis].item()
    if pace < STILL:
        return "still", None, pace

    sign = 1 if velocity[:, axis].median() > 0 else -1
    along, across = sign * velocity[:, axis], velocity[:, 1 - axis].abs()
    agreeing = (along > STILL) & (along > 2 * across)
    if agreeing.float().mean() < CONSISTENT:
        return "wanders", None, pace
    heading = (sign, 0) if axis == 0 else (0, sign)
    return "moves", next(name for name, unit in DIRECTIONS.items() if unit == heading), pace
