"""UltraViCo: keys outside the trained window draw less attention.

Zhao et al., 2025, https://arxiv.org/abs/2511.20123; public code thu-ml/DiT-Extrapolation, branch
ultra-wan. A query's window is the trained length around the query. Scores of keys outside are
multiplied by a constant alpha below 1, and by a smaller beta at distances where rotary periods
align. As in the public code, only positive scores are multiplied, so that no score is raised, and
the first frame sees no keys beyond the trained length.

Unlike the public code, the gain is set for blocks, not for tokens. The distance of two blocks is
the distance of their nearest frames, so that a block on the edge of the window counts as inside.
Blocks that a sparse method leaves out stay out: the technique adds no cost to a sparse method.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gen_accel.attention_processors.attached.attachment import extend_attention
from gen_accel.attention_processors.attached.layer import AttentionExtension
from gen_accel.pipelines.long_video.technique import Remembered, Target, key_blocks, query_blocks
from gen_accel.plan import Plan
from gen_accel.video import VideoShape


@dataclass(frozen=True)
class UltraViCo:
    """Dampen the scores of keys outside the trained window, in frames after patchify.

    Args:
        alpha: factor of these scores, in (0, 1]; 1 changes nothing.
        beta: factor at distances near a multiple of `period`, in (0, 1].
        period: frames after which the model's attention repeats itself. None: no repetition, as
            with Wan; alpha holds everywhere.
        period_width: frames on each side of a multiple of the period that count as near.
        shorten_first: hide the frames beyond the trained length from the first frame, which
            otherwise blurs.
    """

    alpha: float = 0.9
    beta: float = 0.6
    period: float | None = None
    period_width: float = 1.0
    shorten_first: bool = True

    name: ClassVar[str] = "ultravico"
    excludes: ClassVar[Mapping[str, str]] = {
        "window_noise": "its windows are as long as the trained length, so that nothing is outside"
    }

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if self.period is not None and not self.period > 0:
            raise ValueError(f"period must be positive, got {self.period}")
        if not self.period_width >= 0:
            raise ValueError(f"period_width must not be negative, got {self.period_width}")

    def gain(self, distance: Tensor, trained: int) -> Tensor:
        """Compute the factor of scores at these distances, in frames; fp32 of the same shape."""
        gain = torch.full(distance.shape, self.alpha, device=distance.device)
        if self.period is not None:
            turns = (distance / self.period).round().clamp_min(1)
            near = (distance - turns * self.period).abs() <= self.period_width
            gain = gain.masked_fill(near, self.beta)
        return gain.masked_fill(2 * distance <= trained, 1.0)

    def adjusted(self, plan: Plan, video: VideoShape, trained: int) -> Plan:
        """Add the gain to a plan, and drop the blocks that are hidden from the first frame."""
        query, key = query_blocks(plan, video), key_blocks(plan, video)
        after = query.first[:, None] - key.last
        before = key.first - query.last[:, None]
        distance = torch.maximum(after, before).clamp_min(0)
        text = query.text[:, None] | key.text
        gain = self.gain(distance, trained).masked_fill(text, 1.0)[None, None]
        if not self.shorten_first:
            return plan.changed(gain=gain)
        hidden = (query.first == 0)[:, None] & (key.first >= trained) & ~text
        return plan.changed(gain=gain, keep=plan.keep & ~hidden)

    def extension(self, trained: int) -> AttentionExtension:
        """Return what it changes of attention, in a model that was trained at so many frames."""

        def adjusted(plan: Plan, video: VideoShape, step: int) -> Plan:
            return self.adjusted(plan, video, trained)

        return AttentionExtension(self.name, trained, adjust=Remembered(adjusted, by_step=False))

    def apply(self, target: Target) -> Callable[[], None]:
        return extend_attention(target.subject, self.extension(target.trained))

    def describe(self, target: Target) -> str:
        if not target.longer:
            return f"{target.lengths}: off"
        beta = "" if self.period is None else f", by {self.beta} around every {self.period} frames"
        return (
            f"scores of keys more than {target.trained / 2:g} of {target.frames} latent frames "
            f"away are multiplied by {self.alpha}{beta}"
        )
