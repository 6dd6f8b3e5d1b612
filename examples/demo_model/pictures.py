"""Make the pictures of README and docs by the demo: `python -m demo_model.pictures`."""

import argparse
import shutil
from pathlib import Path

import numpy as np
from demo_model.clips import picture
from PIL import Image

from gen_accel.demo import job
from gen_accel.demo.world import Scene
from gen_accel.io import replacing
from gen_accel.measure.video_io import read_video

DOCS = Path(__file__).parents[2] / "docs"
RACE, PICTURED = DOCS / "race.gif", DOCS / "image_prompt.png"
WIDTH, COLORS = 435, 64  # pixels, and shades of the race
EVERY = 2  # frames of the race
STILL, SEED = Scene("red", "triangle", "right", "slowly"), 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/pictures"))
    work = parser.parse_args().work
    race = job.run(work / "race")[1]["race"]
    write_race(read_video(race), RACE)
    sheet = job.run(work / "image", image=picture(STILL, SEED), seed=SEED)[1]["contact sheet"]
    with replacing(PICTURED) as partial:
        shutil.copyfile(sheet, partial)


def write_race(video: np.ndarray, file: Path) -> None:
    """Write a film, (F, H, W, 3) uint8, as a small GIF without end."""
    height = round(video.shape[1] * WIDTH / video.shape[2])
    frames = [
        Image.fromarray(frame).resize((WIDTH, height), Image.Resampling.LANCZOS)
        for frame in video[::EVERY]
    ]
    # One palette for all: a pixel that stays is then left out of a frame.
    shades = Image.fromarray(np.concatenate([*map(np.asarray, frames)])).quantize(
        COLORS, dither=Image.Dither.NONE
    )
    first, *others = [one.quantize(palette=shades, dither=Image.Dither.NONE) for one in frames]
    lasts = 1000 * EVERY / job.FPS  # ms
    with replacing(file) as partial:
        first.save(partial, "GIF", save_all=True, append_images=others, duration=lasts, loop=0)


if __name__ == "__main__":
    main()
