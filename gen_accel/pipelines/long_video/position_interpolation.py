"""Position interpolation: a longer video takes the positions of the trained length.

Chen et al., 2023, https://arxiv.org/abs/2306.15595. All temporal rotary frequencies are multiplied
by trained / L, so that L latent frames span the positions of the trained length. Without tuning,
the model shows slower motion; the rule is meant for training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gen_accel.pipelines.long_video.technique import Target
from gen_accel.pipelines.long_video.temporal_rule import TemporalRule


@dataclass(frozen=True)
class PositionInterpolation:
    """Shrink the positions of a video longer than the trained length to that length."""

    name: ClassVar[str] = "position_interpolation"
    excludes: ClassVar[Mapping[str, str]] = {
        "riflex": "both set the temporal frequencies",
        "continuation": "its chunks are no longer than what the model was trained at",
    }

    def frequencies(self, own: Tensor, frames: int, trained: int) -> Tensor:
        """Compute frequencies for `frames` latent frames, (pairs,) in rad per latent frame."""
        return own * (trained / max(frames, trained))

    def apply(self, target: Target) -> Callable[[], None]:
        return TemporalRule(
            target.transformers, self.frequencies, frames=target.frames, trained=target.trained
        ).remove

    def describe(self, target: Target) -> str:
        if not target.longer:
            return f"{target.lengths}: off"
        times = target.trained / target.frames
        return f"{target.lengths}: temporal frequencies times {times:.3f}"
