"""The world that the demo model was trained on: one coloured shape that moves as its caption says.

Positions wrap around the canvas, so that a clip of any length stays in motion.
"""

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from gen_accel.demo import COLORS, DIRECTIONS, SHAPES, SPEEDS
from gen_accel.io import replacing
from gen_accel.measure.video_io import write_video

FPS = 16.0  # frames a second
BACKGROUND = 20  # grey level, 0 to 255
RADIUS = 12.0  # pixels, whatever the canvas
HELD_OUT = 12  # of the scenes that the model knows, no clip to train on shows them

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
    def velocity(self) -> tuple[float, float]:
        """(x, y) in pixels a frame; y points down."""
        dx, dy = DIRECTIONS[self.direction]
        return dx * SPEEDS[self.speed], dy * SPEEDS[self.speed]


SCENES = tuple(Scene(*parts) for parts in product(COLORS, SHAPES, DIRECTIONS, SPEEDS))
# Never trained: one scene for each colour and shape, spread evenly over directions and speeds.
UNSEEN = tuple(
    Scene(color, shape, [*DIRECTIONS][(c + s) % 4], [*SPEEDS][(c // 2 + s) % 2])
    for c, color in enumerate(COLORS)
    for s, shape in enumerate(SHAPES)
)
SEEN = tuple(scene for scene in SCENES if scene not in UNSEEN)


def scored_scenes(count: int = 24) -> tuple[Scene, ...]:
    """The same `count` of the trained scenes at every call, for scoring."""
    order = torch.randperm(len(SEEN), generator=torch.Generator().manual_seed(7))
    return tuple(SEEN[i] for i in order[:count].tolist())


SHOWN = tuple(scene for scene in SEEN if scene not in scored_scenes(HELD_OUT))  # by clips


def write_clips(folder: Path, *, frames: int, count: int, size: int = 96, seed: int = 0) -> None:
    """Write clips to train on, `0000.mp4` with its caption in `0000.txt` and so on, without the
    scenes that are scored later. Existing files are left.

    Args:
        size: height and width in pixels.
    """
    for i in range(count):
        scene = SHOWN[i % len(SHOWN)]
        stem = folder / f"{i:04d}"
        if not stem.with_suffix(".txt").exists():
            write_clip(stem, scene, scene.caption, frames=frames, size=size, seed=seed * 10**6 + i)


def write_clip(
    stem: Path, scene: Scene, caption: str, *, frames: int, size: int, seed: int
) -> None:
    """Write a clip of a scene and then its caption, at a path without a suffix."""
    generator = torch.Generator().manual_seed(seed)
    video = render([scene], frames=frames, size=size, generator=generator)[0]
    pixels = ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    write_video(pixels, stem.with_suffix(".mp4"), fps=FPS)
    with replacing(stem.with_suffix(".txt")) as partial:
        partial.write_text(caption + "\n", encoding="utf-8")


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
    offset = torch.remainder(pixels - center[..., None] + size / 2, size) - size / 2
    x, y = offset.unbind(1)
    inside = torch.stack(
        [
            (0.5 - distance(scene.shape, x[b, :, None, :], y[b, :, :, None])).clamp(0, 1)
            for b, scene in enumerate(scenes)
        ]
    )[:, None]
    color = torch.tensor([COLORS[scene.color] for scene in scenes]).view(-1, 3, 1, 1, 1)
    return (BACKGROUND + inside * (color - BACKGROUND)) / 127.5 - 1


def silhouette(shape: str, *, size: int, x: float = 0.0, y: float = 0.0) -> Tensor:
    """(size, size) bool: `shape` drawn about the middle, its centre of mass moved by (x, y)."""
    pixels = torch.arange(size) + 0.5 - size / 2
    sag = RADIUS * TRIANGLE_SAG if shape == "triangle" else 0.0
    return distance(shape, (pixels - x)[None, :], (pixels - y + sag)[:, None]) < 0


def distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance in pixels of (x, y) to the outline of `shape`, negative inside."""
    if shape == "circle":
        return torch.hypot(*torch.broadcast_tensors(x, y)) - RADIUS
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - SQUARE_SIDE * RADIUS
    slope = math.sqrt(3) / 2
    sides = slope * x.abs() - 0.5 * y - TRIANGLE_SIDE * RADIUS
    return torch.maximum(sides, y.expand_as(sides) - TRIANGLE_FLOOR * RADIUS)
