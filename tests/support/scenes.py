"""Films of several scenes: smooth random pictures, each under a camera that moves."""

import numpy as np
from PIL import Image


def scene(frames, height=48, width=64, seed=0, speed=1, noise=0):
    """A camera that pans over a picture, (frames, height, width, 3) uint8.

    Args:
        speed: pixels a frame, to and fro.
        noise: largest change of a pixel from one frame to the next.
    """
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (7, 9, 3)).astype(np.uint8)
    wide = Image.fromarray(patches).resize((3 * width, 3 * height), Image.Resampling.BICUBIC)
    whole = np.asarray(wide).astype(int)
    made = []
    for i in range(frames):
        along = speed * i % (4 * width)
        x = min(along, 4 * width - along)
        y = x * height // width
        frame = whole[y : y + height, x : x + width]
        made.append(frame + rng.integers(-noise, noise + 1, frame.shape))
    return np.clip(made, 0, 255).astype(np.uint8)


def film_of(lengths, **options):
    """Scenes one after the other, and the first frames of all but the first."""
    parts = [scene(frames, seed=seed, **options) for seed, frames in enumerate(lengths)]
    return np.concatenate(parts), np.cumsum(lengths)[:-1].tolist()
