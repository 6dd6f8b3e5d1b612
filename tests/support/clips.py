"""Small clips of known frames."""

from pathlib import Path

import av
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


def tone(seconds: float, rate: int, pitch: float = 440.0) -> np.ndarray:
    """(2, N) float32, the right channel at half the volume."""
    wave = np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate) * 0.5
    return np.stack([wave, wave / 2]).astype(np.float32)


def sounding(
    path: Path, frames: np.ndarray, sound: np.ndarray | None, rate: int, fps: int = 24
) -> Path:
    """Write a film without loss, of frames (F, H, W, 3) uint8 and of sound (2, N)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        heard = None
        if sound is not None:
            heard = container.add_stream("pcm_s16le", rate=rate, layout="stereo")
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if heard is not None and sound is not None:
            samples = np.round(sound.T * 32767).astype(np.int16).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
            frame.rate, frame.pts = rate, 0
            container.mux(heard.encode(frame))
            container.mux(heard.encode(None))
    return path


def refuse(*args, **kwargs):
    raise AssertionError("encoded again")


def read_clip(path, *, frames, size, fps=None):
    """The first frames of a film, as training reads them."""
    return CaptionedVideo("clip", "", Path(path)).read(frames=frames, size=size, fps=fps)


def survey_clip(path, *, frames):
    """Count the first frames of a film and find its size, as training does."""
    return CaptionedVideo("clip", "", Path(path)).survey(frames=frames, fps=None)
