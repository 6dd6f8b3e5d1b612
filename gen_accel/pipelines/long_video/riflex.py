"""RIFLEx: lower the one temporal rotary frequency whose period shows as repetition.

Zhao et al., 2025, https://arxiv.org/abs/2502.15894, and https://github.com/thu-ml/RIFLEx at
2bff7fe. Among the pairs on the time axis, the intrinsic pair k has the period N_k; videos longer
than N_k repeat themselves. Its frequency is lowered to 0.9 * 2 pi / L for a video of L latent
frames. Frequencies of the other pairs, and of the other axes, stay.

Unlike the paper, k need not be found by watching for repetitions. The default k is the pair with
the shortest period that is not shorter than the trained length, the first whose repetition no
training clip has shown. This gives the published k = 4 of HunyuanVideo and k = 2 of CogVideoX. For
Wan 2.1 it gives k = 4, where users of Wan report k = 6.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gen_accel.attention_processors.families import Family, family_for
from gen_accel.pipelines.long_video.technique import Target
from gen_accel.pipelines.long_video.temporal_rule import TemporalRule

MARGIN = 0.9  # most periods in a video, as in the published code, against repeating tails


@dataclass(frozen=True)
class Riflex:
    """Lower the intrinsic temporal frequency so that one period outlasts the video.

    Acts if the video is longer than the trained length and than the period N_k.

    Args:
        k: number of the intrinsic pair, from 1. None: see the module's docstring.
    """

    k: int | None = None

    name: ClassVar[str] = "riflex"
    excludes: ClassVar[Mapping[str, str]] = {
        "position_interpolation": "both set the temporal frequencies",
        "continuation": "its chunks are no longer than what the model was trained at",
    }

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def intrinsic(self, own: Tensor, trained: int) -> int:
        """Return k for a model with these temporal frequencies, (pairs,) in rad per latent frame.

        Raises ValueError for a k that the model does not have.
        """
        if self.k is None:
            periods = 2 * math.pi / own
            return min(int((periods < trained).sum()) + 1, len(own))
        if self.k > len(own):
            raise ValueError(f"k must be from 1 to {len(own)}, got {self.k}")
        return self.k

    def frequencies(self, own: Tensor, frames: int, trained: int) -> Tensor:
        """Compute frequencies for `frames` latent frames, (pairs,) in rad per latent frame."""
        pair, made = self.intrinsic(own, trained) - 1, own.clone()
        if frames > trained and frames > 2 * math.pi / float(own[pair]):
            made[pair] = MARGIN * 2 * math.pi / frames
        return made

    def apply(self, target: Target) -> Callable[[], None]:
        for transformer in target.transformers.values():
            model = getattr(transformer, "_orig_mod", transformer)
            family = family_for(model, "rules on rotary frequencies")
            check_heads(family)
            self.intrinsic(family.temporal_frequencies(transformer), target.trained)
        return TemporalRule(
            target.transformers, self.frequencies, frames=target.frames, trained=target.trained
        ).remove

    def describe(self, target: Target) -> str:
        name, transformer = next(iter(target.transformers.items()))
        family = target.families[name]
        own = family.temporal_frequencies(transformer)
        k = self.intrinsic(own, target.trained)
        period = 2 * math.pi / float(own[k - 1])
        made = self.frequencies(own, target.frames, target.trained)[k - 1]
        if made == own[k - 1]:
            return f"{target.lengths}: off, the period of pair {k} is {period:.1f}"
        longest = 2 * math.pi / made
        return f"{target.lengths}: period of pair {k} from {period:.1f} to {longest:.1f}"


def check_heads(family: Family) -> None:
    """Refuse, by a ValueError, a family whose heads have temporal frequencies of their own."""
    if not family.attention.heads_alike:
        raise ValueError(
            f"riflex lowers one frequency that all heads share, and in {family.models} each head "
            "has others: take position_interpolation"
        )
