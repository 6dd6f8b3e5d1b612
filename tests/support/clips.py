"""Small clips of known frames."""

from pathlib import Path

import numpy as np

from gen_accel.lora.data.clips import CaptionedVideo

SIZE = (32, 48)
STEP = 4  # grey levels from one frame to the next


def footage(frames=9, height=32, width=48, seed=0):
    """Noise, so that no two frames or places are alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3))
    return noise.astype(np.uint8)


def ramp(frames=30, height=32, width=48):
    """Frame i is grey of level 4 i."""
    levels = STEP * np.arange(frames, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).copy()


def levels(video):
    """Of a `ramp`, the numbers of its frames."""
    return np.round(video.mean((1, 2, 3)) / STEP).astype(int).tolist()


def refuse(*args, **kwargs):
    raise AssertionError("encoded again")


def read_clip(path, *, frames, size, fps=None):
    """The first frames of a film, as training reads them."""
    return CaptionedVideo("clip", "", Path(path)).read(frames=frames, size=size, fps=fps)


def survey_clip(path, *, frames):
    """Count the first frames of a film and find its size, as training does."""
    return CaptionedVideo("clip", "", Path(path)).survey(frames=frames, fps=None)
