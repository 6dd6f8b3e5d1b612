"""Training of a video that is made chunk by chunk: noise levels, and what is seen, of all chunks
of a clip at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gen_accel.lora.batches import noise_level
from gen_accel.lora.caching.inputs import TEXT
from gen_accel.lora.config import CAUSAL, TrainConfig
from gen_accel.pipelines.long_video.chunks import streaming_family
from gen_accel.pipelines.zones import Middle, Zones
from gen_accel.video import temporal_patch

if TYPE_CHECKING:
    from diffusers import ModelMixin

CLEAN = 0.3  # share of the clips whose earlier chunks have no noise
SINKS = 0.4  # share of the steps with a sink, of at least one chunk
OWN = 0.5  # share of the steps with the middle that a generation takes
SEEN: tuple[Middle, ...] = ("none", "salient", "grid")  # drawn alike in the others


class Drawn(NamedTuple):
    """Draws of a step over chunks.

    Args:
        levels: noise of each chunk that is predicted, (B, chunks).
        context: noise of each chunk that is seen, (B, chunks).
        noise: of the chunks that are seen, (B, C, f, h, w).
        zones: what is seen.
    """

    levels: Tensor
    context: Tensor
    noise: Tensor
    zones: Zones


@dataclass(frozen=True)
class CausalChunks:
    """Chunks of a clip, each predicted from those before it, which are clean or slightly noisy and
    know their own noise.

    All chunks of a clip are predicted in one pass, each at a noise level of its own (Diffusion
    Forcing, Chen et al., 2024, https://arxiv.org/abs/2407.01392; CausVid, Yin et al., 2024,
    https://arxiv.org/abs/2412.07772). Window, sink and middle are drawn for each step, so that one
    LoRA serves caches of all kinds.

    Args:
        zones: the most that is seen.
        latents: latent frames of a chunk, before patchify.
        shift: of the noise levels.
    """

    config: TrainConfig
    zones: Zones
    latents: int
    shift: float

    @classmethod
    def of(
        cls, config: TrainConfig, transformer: "ModelMixin", shift: float
    ) -> "CausalChunks | None":
        """Take them from a config; None for another objective."""
        if config.objective != CAUSAL:
            return None
        zones = config.zones
        return cls(config, zones, zones.frames * temporal_patch(transformer), shift)

    def split(self, x: Tensor) -> Tensor:
        """Cut latents (B, C, f, h, w) into chunks, (B, chunks, C, latents, h, w)."""
        return x.unflatten(2, (-1, self.latents)).transpose(1, 2)

    def draw(self, seeds: Sequence[int] | None, sigma: Tensor, like: Tensor) -> Drawn:
        """Draw for the clips of a batch.

        Args:
            seeds: one for each clip, of which the first draws the zones; None: all chunks at
                `sigma` (B,), after clean ones, and `zones` whole.
            like: (B, C, f, h, w).
        """
        count = like.shape[2] // self.latents
        if seeds is None:
            levels = sigma[:, None].expand(-1, count)
            return Drawn(levels, torch.zeros_like(levels), torch.zeros_like(like), self.zones)
        levels, context, noise = [], [], []
        for seed in seeds:
            g = torch.Generator().manual_seed(seed)
            levels.append([noise_level(self.config, g, self.shift) for _ in range(count)])
            is_clean = torch.rand((), generator=g).item() < CLEAN
            most = 0.0 if is_clean else self.config.context_noise
            context.append(most * torch.rand(count, generator=g))
            noise.append(torch.randn(like.shape[1:], generator=g))
        zones = self._zones(torch.Generator().manual_seed(seeds[0] ^ 1))
        put = {"device": like.device, "dtype": torch.float32}
        return Drawn(
            torch.tensor(levels, **put),
            torch.stack(context).to(**put),
            torch.stack(noise).to(**put),
            zones,
        )

    def _zones(self, g: torch.Generator) -> Zones:
        window = 1 + int(torch.randint(self.zones.window, (), generator=g))
        has_sink = torch.rand((), generator=g).item() < SINKS
        is_own = torch.rand((), generator=g).item() < OWN
        middle = SEEN[int(torch.randint(len(SEEN), (), generator=g))]
        sink = min(max(1, self.zones.sink), window) if has_sink else 0
        seen = {"window": window, "sink": sink}
        return replace(self.zones, **(seen if is_own else {**seen, "middle": middle}))


def stream_of(config: TrainConfig, shift: float) -> dict[str, object] | None:
    """Return the `StreamSettings` that a LoRA was trained with; None of another objective."""
    if config.objective != CAUSAL:
        return None
    return {**config.zones.to_dict(), "noise": context_level(config), "shift": shift}


def context_level(config: TrainConfig) -> float:
    """Noise of the chunks that are seen, in a generation."""
    return round(config.context_noise / 3, 6)


def check_chunks(
    config: TrainConfig, transformer: "ModelMixin", condition: str, frames: Sequence[int]
) -> None:
    """Refuse, by a ValueError, a model that makes no chunks from text alone, and clips that chunks
    do not divide.

    Args:
        condition: that the model trains under, see `CONDITIONS`.
        frames: latent frames of each stage, after patchify.
    """
    if config.objective != CAUSAL:
        return
    streaming_family(transformer)
    if condition != TEXT:
        raise ValueError(
            f"objective causal trains models that make videos from text, and {config.model} is "
            f"trained under condition {condition}: take another objective"
        )
    for stage, count in zip(config.curriculum, frames, strict=True):
        chunk = config.chunk_frames
        if count % chunk or count < 2 * chunk:
            raise ValueError(
                f"stage {stage} has {count} latent frames, which are not two or more chunks of "
                f"chunk_frames {chunk}: take other frames, or another chunk_frames"
            )
