"""The embedded demo model: a real `WanPipeline`, its world, its detector and its training."""

from pathlib import Path

__all__ = ["TRAINED_FRAMES", "path"]

TRAINED_FRAMES = 33  # of its clips


def path() -> Path:
    """The folder that `WanPipeline.from_pretrained` loads."""
    return Path(__file__).parent / "model"
