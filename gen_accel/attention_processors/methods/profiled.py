"""Profiled attention: blocks for each layer and head, measured once in dense runs of the model.

References:
    Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
    2024, https://arxiv.org/abs/2406.14909; public code thu-nics/MoA at e224fe3 (MIT).
    Chen et al., "Sparse-vDiT", 2025, https://arxiv.org/abs/2506.03065. Zhang et al., "Fast Video
    Generation with Sliding Tile Attention", 2025, https://arxiv.org/abs/2502.04507.
    They choose among a few shapes for each head, by errors on samples. Here a shape is any set of
    blocks, chosen by the mass of dense attention.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from gen_accel.attention_processors.methods.blocks import (
    Box,
    Layout,
    Pool,
    check_blocks,
    even_tile,
    layout_of,
    rest_of,
)
from gen_accel.attention_processors.methods.masses import (
    Masses,
    carried,
    chosen_blocks,
    known_masses,
    read_masses,
    spread,
    tiles_of,
    tokens_of_tiles,
)
from gen_accel.method import Method, plan_once
from gen_accel.parsing import Share, check_options
from gen_accel.plan import Centre, Plan, plan_of_call
from gen_accel.video import VideoShape


@dataclass(frozen=True)
class Profiled(Method):
    """Attention to the blocks that were heaviest in dense runs, for each layer and head.

    `gen_accel.measure_profile` makes one for a model. The pattern depends on the grid alone, so
    that nothing is chosen while the model runs.

    Query and key blocks are boxes of the video. Each query block of a head keeps as many key
    blocks as any other, up to one, those with the greatest mass for each token. Text blocks are
    kept by all, and text queries keep all.

    Args:
        share: of the video's token pairs that is kept, in (0, 1].
        file: what `measure_profile` or `save` wrote, *.safetensors. Without, no distance was seen
            and all weights fall with it, alike in all heads: a pattern for tests and pictures.
        sha256: of what the file holds; filled in from the file.
        rest, centre: "means" adds the remaining keys to the softmax, pooled around the mean
            "query" of each query block or the mean "key" of each key block: see
            `gen_accel.plan.Rest`. None drops them.
        block: tokens in a block, without a file.
    """

    share: Share = 0.1
    file: str = field(default="", compare=False)
    sha256: str = field(default="", repr=False)
    rest: Pool | None = "means"
    centre: Centre = "query"
    block: int = 64

    def __post_init__(self) -> None:
        check_options(self)
        check_blocks(self.block, self.block, "auto")
        rest_of(self.rest, self.centre)
        masses = known_masses(self.sha256) if self.sha256 else None
        if masses is None and self.file and not self.sha256:
            masses = read_masses(self.file)
            object.__setattr__(self, "sha256", masses.digest)
        elif masses is None and self.sha256 and not self.file:
            raise ValueError(
                f"the profile {self.sha256[:12]} was in memory alone: save it, "
                "method.save('profile.safetensors'), and give file='profile.safetensors'"
            )
        object.__setattr__(self, "_masses", masses)

    @classmethod
    def load(cls, file: str | Path, share: float = 0.1) -> "Profiled":
        """Read the file of a profile.

        Raises:
            FileNotFoundError, ValueError: no such file, or another one.
        """
        return cls(share, str(file))

    def save(self, file: str | Path) -> "Profiled":
        """Write the profile to a *.safetensors file, and return the method that names it."""
        if self.masses is None:
            raise ValueError("nothing was measured: gen_accel.measure_profile makes a profile")
        return replace(self, file=str(self.masses.save(file)))

    @classmethod
    def candidates(
        cls, video: VideoShape, *, tile: object = None, profile: str = ""
    ) -> Sequence["Profiled"]:
        return [cls(share, sha256=profile) for share in (0.1, 0.2, 0.3) if profile]

    @property
    def masses(self) -> Masses | None:
        """Masses that were measured, read from the file when first needed; None without one."""
        held: Masses | None = self.__dict__["_masses"]
        if held is None and self.file:
            held = read_masses(self.file)
            if held.digest != self.sha256:
                raise ValueError(
                    f"{self.file} holds another profile, {held.digest[:12]}, than the "
                    f"{self.sha256[:12]} that was asked for: leave out sha256 to take it"
                )
            object.__setattr__(self, "_masses", held)
        return held

    @property
    def named_layers(self) -> tuple[int, ...]:
        return () if self.masses is None else tuple(sorted(self.masses.layers))

    @property
    def least_grid(self) -> Box:
        return (1, 1, 1) if self.masses is None else self.masses.tile

    def unfit(self, model: str, layer: int, heads: int) -> str:
        return "" if self.masses is None else self.masses.unfit(model, layer, heads)

    def for_layer(self, layer: int) -> "Profiled | ProfiledHeads":
        masses = self.masses
        if masses is None:
            return self
        if layer not in masses.layers:
            raise ValueError(masses.unfit(masses.model, layer, 0))
        heads = tuple(range(masses.heads(layer)))
        shares = (self.share,) * len(heads)
        return ProfiledHeads(self.sha256, layer, heads, shares, self.rest, self.centre, masses)

    @plan_once
    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        """Plan of the first layer of the profile. On a model, each layer has its own blocks."""
        if self.masses is not None:
            return self.for_layer(self.named_layers[0]).plan(video, device)
        tile = even_tile(video, self.block)
        zeros = torch.zeros(1, 1, 1, 1, device=device)
        scores = spread(carried(zeros, tiles_of(video.grid, tile))[0])
        layout = layout_of(video, device, self.block, self.block)
        return _chosen(scores[None], (self.share,), tile, layout, video, self)

    def density(self, video: VideoShape) -> float:
        """Share of token pairs that is kept, the mean over heads and layers; pairs with text all
        are."""
        if self.masses is None:
            return self.plan(video).density
        return 1 - (1 - self.share) * (video.video_tokens / video.tokens) ** 2


@dataclass(frozen=True)
class ProfiledHeads(Method):
    """Blocks of some heads of one layer, by their masses.

    Args:
        sha256: of the masses.
        heads: numbers in the layer.
        shares: the density of each.
    """

    sha256: str = field(repr=False)
    layer: int
    heads: tuple[int, ...]
    shares: tuple[float, ...]
    rest: Pool | None
    centre: Centre
    masses: Masses = field(compare=False, repr=False)

    @property
    def least_grid(self) -> Box:
        return self.masses.tile

    def for_heads(self, heads: slice) -> "ProfiledHeads":
        return replace(self, heads=self.heads[heads], shares=self.shares[heads])

    def together(self, methods: Sequence["ProfiledHeads"]) -> "ProfiledHeads | None":
        """One method for heads whose methods differ by density alone, each of one head."""
        alike = {replace(one, heads=(), shares=()) for one in methods}
        if len(alike) > 1 or any(len(one.heads) != 1 for one in methods):
            return None
        heads = tuple(one.heads[0] for one in methods)
        return replace(self, heads=heads, shares=tuple(one.shares[0] for one in methods))

    @plan_once
    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        # Made on the device, where a plan that was forgotten is soon made again.
        tile, block = self.masses.tile, math.prod(self.masses.tile)
        scores = self.masses.scores(self.layer, self.heads, video, device)
        layout = layout_of(video, device, block, block, tile)
        return _chosen(scores, self.shares, tile, layout, video, self)


def _chosen(
    scores: Tensor,
    shares: Sequence[float],
    tile: Box,
    layout: Layout,
    video: VideoShape,
    method: Profiled | ProfiledHeads,
) -> Plan:
    """Plan of the best of the video's blocks by scores, (h, T, T), and all pairs with text."""
    T = scores.shape[-1]
    held = tokens_of_tiles(video.grid, tile).to(scores.device)
    keep = layout.always.expand(len(scores), -1, -1).clone()
    keep[:, :T, :T] |= chosen_blocks(scores, held, shares)
    rest = rest_of(method.rest, method.centre)
    base = plan_of_call(layout.slots, layout.always[None, None], rest=rest)
    return base.keeping(keep[None], dynamic=False)
