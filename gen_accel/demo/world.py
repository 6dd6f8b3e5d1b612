"""The world that the demo model was trained on: one coloured shape that moves as its caption says.

Positions wrap around the canvas, so that a clip of any length stays in motion.
"""

import math
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from gen_accel.demo.words import COLORS, DIRECTIONS, SHAPES, SPEEDS

BACKGROUND = 20  # grey level, 0 to 255
RADIUS = 12.0  # pixels, whatever the canvas

STILL_MARGIN = 16.0  # pixels from the edge of a still to its object's middle at least

# Where the sides of the square and of the triangle lie, as shares of RADIUS, and how far below
# the triangle's origin its centre of mass is.
SQUARE_SIDE, TRIANGLE_FLOOR, TRIANGLE_SIDE = 0.88, 0.75, 0.6
TRIANGLE_SAG = (2 * TRIANGLE_FLOOR - 2 * TRIANGLE_SIDE) / 3


@dataclass(frozen=True)
class Scene:
    """The content of one clip."""

    color: str
    shape: str
    direction: str
    speed: str

    @property
    def caption(self) -> str:
        return f"a {self.color} {self.shape} moves {self.direction} {self.speed}"

    @property
    def anonymous_caption(self) -> str:
        """Caption of the motion alone; an image prompt shows the object."""
        return f"something moves {self.direction} {self.speed}"

    @property
    def velocity(self) -> tuple[float, float]:
        """(x, y) in pixels a frame; y points down."""
        dx, dy = DIRECTIONS[self.direction]
        return dx * SPEEDS[self.speed], dy * SPEEDS[self.speed]


SCENES = tuple(Scene(*parts) for parts in product(COLORS, SHAPES, DIRECTIONS, SPEEDS))


def _never_trained() -> tuple[Scene, ...]:
    """One scene for each colour and shape, spread evenly over directions and speeds."""
    colors, directions, speeds = list(COLORS), list(DIRECTIONS), list(SPEEDS)
    return tuple(
        Scene(color, shape, directions[(c + s) % 4], speeds[(c // 2 + s) % 2])
        for c, color in enumerate(colors)
        for s, shape in enumerate(SHAPES)
    )


UNSEEN = _never_trained()
SEEN = tuple(scene for scene in SCENES if scene not in UNSEEN)


def _never_shown() -> tuple[Scene, ...]:
    """Two scenes for each colour and shape, three for each direction and speed: `UNSEEN`, and each
    of its objects once more with a motion along the other axis."""
    directions = list(DIRECTIONS)
    turned = [
        replace(scene, direction=directions[(directions.index(scene.direction) + 2) % 4])
        for scene in UNSEEN
    ]
    return (*UNSEEN, *turned)


# Scenes that image prompts are scored on: no clip with an image shows the object in that motion.
NOT_SHOWN = _never_shown()


def scored_scenes(count: int = 24) -> tuple[Scene, ...]:
    """The same `count` of the trained scenes at every call, for scoring."""
    order = torch.randperm(len(SEEN), generator=torch.Generator().manual_seed(7))
    return tuple(SEEN[i] for i in order[:count].tolist())


def render(scenes: list[Scene], *, frames: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw each scene from a random start, at its speed give or take 5 %.

    Args:
        size: height and width of the canvas in pixels.

    Returns:
        (B, 3, frames, size, size) in [-1, 1].
    """
    start = torch.rand(len(scenes), 2, generator=generator) * size
    pace = 0.95 + 0.1 * torch.rand(len(scenes), 1, generator=generator)
    velocity = torch.tensor([scene.velocity for scene in scenes]) * pace
    # (B, 2, frames)
    center = start[..., None] + velocity[..., None] * torch.arange(frames)
    pixels = torch.arange(size) + 0.5
    x, y = _wrap(pixels - center[..., None], size).unbind(1)
    inside = torch.stack(
        [
            (0.5 - _distance(scene.shape, x[b, :, None, :], y[b, :, :, None])).clamp(0, 1)
            for b, scene in enumerate(scenes)
        ]
    )[:, None]
    color = torch.tensor([COLORS[scene.color] for scene in scenes]).view(-1, 3, 1, 1, 1)
    return (BACKGROUND + inside * (color - BACKGROUND)) / 127.5 - 1


def still(scene: Scene, *, size: int, generator: torch.Generator) -> Tensor:
    """The object of a scene alone, whole and at a random place.

    Args:
        size: height and width in pixels, at least `2 * STILL_MARGIN`.

    Returns:
        (size, size, 3) uint8.
    """
    if size < 2 * STILL_MARGIN:
        raise ValueError(f"size must be at least {2 * STILL_MARGIN:g} pixels, got {size}")
    place = STILL_MARGIN + torch.rand(2, generator=generator) * (size - 2 * STILL_MARGIN)
    offset = torch.arange(size) + 0.5 - place[:, None]
    distance = _distance(scene.shape, offset[0, None, :], offset[1, :, None])
    inside = (0.5 - distance).clamp(0, 1)[..., None]
    color = torch.tensor(COLORS[scene.color])
    return (BACKGROUND + inside * (color - BACKGROUND)).round().to(torch.uint8)


def silhouette(shape: str, *, size: int, x: float = 0.0, y: float = 0.0) -> Tensor:
    """(size, size) bool: `shape` drawn about the middle, its centre of mass moved by (x, y)."""
    pixels = torch.arange(size) + 0.5 - size / 2
    sag = RADIUS * TRIANGLE_SAG if shape == "triangle" else 0.0
    return _distance(shape, (pixels - x)[None, :], (pixels - y + sag)[:, None]) < 0


def _distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance in pixels of (x, y) to the outline of `shape`, negative inside."""
    if shape == "circle":
        return torch.hypot(*torch.broadcast_tensors(x, y)) - RADIUS
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - SQUARE_SIDE * RADIUS
    slope = math.sqrt(3) / 2
    sides = slope * x.abs() - 0.5 * y - TRIANGLE_SIDE * RADIUS
    return torch.maximum(sides, y.expand_as(sides) - TRIANGLE_FLOOR * RADIUS)


def _wrap(offset: Tensor, size: int) -> Tensor:
    return torch.remainder(offset + size / 2, size) - size / 2
