"""Clips in which an object is hidden for some chunks and returns, as a folder to train on:
`PYTHONPATH=examples python -m demo_model.recall --out outputs/recall --count 240`.

The caption of the return names its motion alone, so that its colour and shape can come from what
was shown before. Where two objects were shown, their motions tell them apart.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from demo_model.clips import anonymous_caption
from torch import Tensor

from gen_accel.demo.world import BACKGROUND, FPS, SHOWN, Scene, render
from gen_accel.io import replacing
from gen_accel.measure.video_io import write_video
from gen_accel.pipelines.generation.stream import Lengths

LENGTHS = Lengths(frames=93, latents=3, factor=4)  # of a clip and its chunks
HIDDEN = "something"  # caption while nothing is to be seen
MASK_SIZE = 16  # pixels


@dataclass(frozen=True)
class Recall:
    """Plan of what a clip shows in which chunk.

    Args:
        scenes: objects, shown one after the other.
        back: number of the one that returns.
        lead: chunks with nothing before them.
        shown: chunks with each object.
        gap: chunks with nothing before one returns, to stay.
    """

    scenes: tuple[Scene, ...]
    back: int = 0
    lead: int = 0
    shown: int = 1
    gap: int = 4

    @property
    def scene(self) -> Scene:
        """The object that returns."""
        return self.scenes[self.back]

    @property
    def returns(self) -> int:
        """Number of the chunk in which it is there again."""
        return self.lead + self.shown * len(self.scenes) + self.gap

    def of(self, chunk: int) -> Scene | None:
        """Return what a chunk shows."""
        place = (chunk - self.lead) // self.shown
        if chunk >= self.returns:
            return self.scene
        return self.scenes[place] if 0 <= place < len(self.scenes) else None

    def captions(self) -> dict[int, str]:
        """Captions by the frame from which they hold."""
        found: dict[int, str] = {}
        for chunk in range(self.returns):
            scene = self.of(chunk)
            text = HIDDEN if scene is None else scene.caption
            if [*found.values()][-1:] != [text]:
                found[LENGTHS.first(chunk)] = text
        return {**found, LENGTHS.first(self.returns): anonymous_caption(self.scene)}

    def draw(self, *, frames: int, size: int, generator: torch.Generator) -> Tensor:
        """Draw it, (3, frames, size, size) in [-1, 1]; a hidden object keeps moving.

        Args:
            size: height and width in pixels.
        """
        scenes = [*self.scenes]
        films = render(scenes, frames=frames, size=size, generator=generator)
        video = torch.full_like(films[0], BACKGROUND / 127.5 - 1)
        for chunk in range(replace(LENGTHS, frames=frames).chunks):
            scene = self.of(chunk)
            part = slice(LENGTHS.first(chunk), LENGTHS.first(chunk + 1))
            if scene is not None:
                video[:, part] = films[scenes.index(scene), :, part]
        return video


def drawn(seed: int, scenes: tuple[Scene, ...] = SHOWN) -> Recall:
    """Draw what a clip of eight chunks shows. A third of the clips have two objects, which differ
    in colour or shape and in motion."""
    g = torch.Generator().manual_seed(seed)

    def one_of(count: int) -> int:
        return int(torch.randint(count, (), generator=g))

    shown = [scenes[one_of(len(scenes))]]
    if one_of(3) == 0:
        first = shown[0]
        others = [
            one
            for one in scenes
            if (one.direction, one.speed) != (first.direction, first.speed)
            and (one.color, one.shape) != (first.color, first.shape)
        ]
        shown.append(others[one_of(len(others))])
    lead, each = one_of(2), 1 if len(shown) > 1 else 1 + one_of(2)
    gap = 1 + one_of(min(4, LENGTHS.chunks - 1 - lead - each * len(shown)))
    return Recall((*shown,), one_of(len(shown)), lead, each, gap)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--size", type=int, default=96, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_recalls(args.out, count=args.count, size=args.size, seed=args.seed)


def write_recalls(folder: Path, *, count: int, size: int = 96, seed: int = 0) -> None:
    """Write `0000.mp4`, its captions in `0000.txt`, `0000.mask.mp4` that is white in the chunk of
    the return, and so on. Existing files are left.

    Args:
        size: height and width of the clips in pixels.
    """
    frames = LENGTHS.frames
    for i in range(count):
        stem, own = folder / f"{i:04d}", seed * 10**6 + i
        if stem.with_suffix(".txt").exists():
            continue
        recall, generator = drawn(own), torch.Generator().manual_seed(own)
        video = recall.draw(frames=frames, size=size, generator=generator)
        pixels = ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
        write_video(pixels, stem.with_suffix(".mp4"), fps=FPS)
        mask = np.zeros((frames, MASK_SIZE, MASK_SIZE, 3), np.uint8)
        mask[LENGTHS.first(recall.returns) : LENGTHS.first(recall.returns + 1)] = 255
        write_video(mask, stem.with_suffix(".mask.mp4"), fps=FPS)
        lines = [f"{frame}: {text}" for frame, text in recall.captions().items()]
        with replacing(stem.with_suffix(".txt")) as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
