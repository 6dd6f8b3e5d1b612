"""Clips of the demo model's world with their captions, as a folder to train on:
`python -m gen_accel.demo.clips --out outputs/clips --frames 129 --count 512`.

With `--images` the captions describe the motion alone. A still beside each clip, `0000.png`, shows
the object, and `0000.teacher.txt` names it.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from gen_accel.demo.world import NOT_SHOWN, SCENES, SEEN, Scene, render, scored_scenes, still
from gen_accel.io import replacing
from gen_accel.measure.video_io import write_video
from gen_accel.registry import needed_for

with needed_for("the demo", extra="video"):
    from rich.progress import track

FPS = 16.0
STILL_SIZE = 48  # pixels
STILLS = 1 << 40  # seeds of stills begin here
TEACHER_SUFFIX = ".teacher.txt"  # as `gen-accel train` reads it
HELD_OUT = 12  # of the scenes that the demo model knows; `world.UNSEEN` is held out as well


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
    write_clips(
        args.out,
        frames=args.frames,
        count=args.count,
        size=args.size,
        seed=args.seed,
        images=args.images,
    )


def shown(images: bool = False) -> tuple[Scene, ...]:
    """Return the scenes for clips, without the scenes that are scored later."""
    if images:
        return tuple(scene for scene in SCENES if scene not in NOT_SHOWN)
    kept = scored_scenes(HELD_OUT)
    return tuple(scene for scene in SEEN if scene not in kept)


def write_clips(
    folder: Path,
    *,
    frames: int,
    count: int,
    size: int = 96,
    seed: int = 0,
    images: bool = False,
) -> None:
    """Write `0000.mp4` with `0000.txt` and so on. Existing files are left.

    Args:
        size: height and width in pixels.
        images: also write `0000.png`, with captions that do not name the object, and
            `0000.teacher.txt`, which does.
    """
    scenes = shown(images)
    for i in track(range(count), description=f"{count} clips of {frames} frames"):
        name = folder / f"{i:04d}"
        if name.with_suffix(".txt").exists():
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_000 + i)
        scene = scenes[i % len(scenes)]
        video = render([scene], frames=frames, size=size, generator=generator)[0]
        pixels = ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
        write_video(pixels, name.with_suffix(".mp4"), fps=FPS)
        if images:
            with replacing(name.with_suffix(".png")) as partial:
                picture(scene, STILLS + seed * 1_000_000 + i).save(partial, format="png")
            _write(name.with_suffix(TEACHER_SUFFIX), scene.caption)
        _write(name.with_suffix(".txt"), scene.anonymous_caption if images else scene.caption)


def _write(path: Path, caption: str) -> None:
    with replacing(path) as partial:
        partial.write_text(caption + "\n", encoding="utf-8")


def picture(scene: Scene, seed: int) -> Image.Image:
    """Draw a still of the object of a scene."""
    pixels = still(scene, size=STILL_SIZE, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


if __name__ == "__main__":
    main()
