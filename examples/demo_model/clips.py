"""Clips of the demo model's world with their captions, as a folder to train on:
`PYTHONPATH=examples python -m demo_model.clips --out outputs/clips --frames 129 --count 512`.

With `--images` the captions describe the motion alone. A still beside each clip, `0000.png`, shows
the object, and `0000.teacher.txt` names it.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from gen_accel.demo.world import (
    BACKGROUND,
    COLORS,
    DIRECTIONS,
    SCENES,
    UNSEEN,
    Scene,
    distance,
    write_clip,
    write_clips,
)
from gen_accel.io import replacing

STILL_SIZE = 48  # pixels
STILL_MARGIN = 16.0  # pixels from the edge of a still to its object's middle at least
STILLS = 1 << 40  # seeds of stills begin here
TEACHER_SUFFIX = ".teacher.txt"  # as `gen-accel train` reads it

# Scenes that image prompts are scored on: no clip with an image shows the object in that motion.
# `UNSEEN`, and each of its objects once more with a motion along the other axis: two scenes for
# each colour and shape, three for each direction and speed.
NOT_SHOWN = (
    *UNSEEN,
    *(
        replace(scene, direction=[*DIRECTIONS][([*DIRECTIONS].index(scene.direction) + 2) % 4])
        for scene in UNSEEN
    ),
)
SHOWN = tuple(scene for scene in SCENES if scene not in NOT_SHOWN)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=129)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--size", type=int, default=96, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--images", action="store_true", help="with a still of what moves beside each clip"
    )
    args = parser.parse_args()
    write = write_pictured if args.images else write_clips
    write(args.out, frames=args.frames, count=args.count, size=args.size, seed=args.seed)


def write_pictured(
    folder: Path, *, frames: int, count: int, size: int = 96, seed: int = 0
) -> None:
    """Write `0000.mp4`, a still of its object in `0000.png`, the caption of its motion in
    `0000.txt`, one that names the object in `0000.teacher.txt`, and so on. Existing files are
    left.

    Args:
        size: height and width of the clips in pixels.
    """
    for i in range(count):
        scene, stem, own = SHOWN[i % len(SHOWN)], folder / f"{i:04d}", seed * 10**6 + i
        if stem.with_suffix(".txt").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(stem.with_suffix(".png")) as partial:
            picture(scene, STILLS + own).save(partial, format="png")
        with replacing(stem.with_suffix(TEACHER_SUFFIX)) as partial:
            partial.write_text(scene.caption + "\n", encoding="utf-8")
        write_clip(stem, scene, anonymous_caption(scene), frames=frames, size=size, seed=own)


def anonymous_caption(scene: Scene) -> str:
    """Caption of the motion alone; an image prompt shows the object."""
    return f"something moves {scene.direction} {scene.speed}"


def picture(scene: Scene, seed: int) -> Image.Image:
    """Draw a still of the object of a scene."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(still(scene, size=STILL_SIZE, generator=generator).numpy())


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
    inside = (0.5 - distance(scene.shape, offset[0, None, :], offset[1, :, None])).clamp(0, 1)
    color = torch.tensor(COLORS[scene.color])
    pixels = BACKGROUND + inside[..., None] * (color - BACKGROUND)
    return pixels.round().to(torch.uint8)


if __name__ == "__main__":
    main()
