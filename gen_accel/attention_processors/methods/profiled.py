"""Profiled attention: blocks for each layer and head, measured once in dense runs of the model.

References:
    Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
    2024, https://arxiv.org/abs/2406.14909; public code thu-nics/MoA at e224fe3 (MIT).
    Chen et al., "Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video
    Diffusion Transformers", 2025, https://arxiv.org/abs/2506.03065.
    Zhang et al., "Fast Video Generation with Sliding Tile Attention", 2025,
    https://arxiv.org/abs/2502.04507, whose mask search chooses a window for each head.
    They choose among a few shapes for each head, by errors on samples. Here a shape is any set of
    blocks, chosen by the mass of dense attention.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
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
    known_masses,
    read_masses,
    shares_of,
    spread,
    tiles_of,
    tokens_of_tiles,
)
from gen_accel.memory import plan_cached
from gen_accel.method import Method
from gen_accel.parsing import check_types
from gen_accel.plan import Centre, Plan, plan_of_call
from gen_accel.video import VideoShape


@dataclass(frozen=True)
class Profiled(Method):
    """Attention to the blocks that were heaviest in dense runs, for each layer and head.

    `gen_accel.measure_profile` makes one for a model. The pattern depends on the grid alone, so
    that nothing is chosen while the model runs.

    Query and key blocks are boxes of the video. Each query block of a head keeps as many key
    blocks as any other, up to one, those with the greatest mass for each token. With `least`
    and `most`, the heads of all layers share one budget, by the least sum of squares of the mass
    that they lose, so that heads that look far and wide keep more. Text blocks are kept by all,
    and text queries keep all.

    Args:
        share: of the video's token pairs that is kept, the mean over heads and layers, in (0, 1].
        file: what `measure_profile` or `save` wrote, *.safetensors. Without, no distance was seen
            and all weights fall with it, alike in all heads: a pattern for tests and pictures.
        sha256: of what the file holds; filled in from the file.
        least, most: bounds on the density of a head; None: `share`. With both, heads share one
            budget.
        rest, centre: "means" adds the remaining keys to the softmax, pooled around the mean
            "query" of each query block or the mean "key" of each key block: see
            `gen_accel.plan.Rest`. None drops them.
        block: tokens in a block, without a file.
    """

    share: float = 0.1
    file: str = field(default="", compare=False)
    sha256: str = field(default="", repr=False)
    least: float | None = None
    most: float | None = None
    rest: Pool | None = "means"
    centre: Centre = "query"
    block: int = 64

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")
        least, most = self._bounds
        if not 0 <= least <= self.share <= most <= 1:
            raise ValueError(
                f"least and most must be 0 <= least <= share <= most <= 1, got {least}, "
                f"{self.share} and {most}"
            )
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
    def _bounds(self) -> tuple[float, float]:
        least = self.share if self.least is None else self.least
        return least, self.share if self.most is None else self.most

    @property
    def named_layers(self) -> tuple[int, ...]:
        """Layers that the profile holds."""
        return () if self.masses is None else tuple(sorted(self.masses.layers))

    @property
    def least_grid(self) -> Box:
        """The tile of the profile, which must fit into the grid."""
        return (1, 1, 1) if self.masses is None else self.masses.tile

    def unfit(self, model: str, layer: int, heads: int) -> str:
        """Say why a layer of a transformer cannot run it; "" where it can."""
        masses, fix = self.masses, "measure one, gen_accel.measure_profile(pipe, prompts)"
        if masses is None:
            return ""
        if model != masses.model:
            return f"the profile was measured on {masses.model}, this is {model}: {fix}"
        if layer not in masses.layers:
            held = f"layers {min(masses.layers)} to {max(masses.layers)}"
            return f"the profile holds {held}, got layer {layer}: {fix}"
        if heads != masses.heads(layer):
            held = f"{masses.heads(layer)} heads in layer {layer}"
            return f"the profile holds {held}, this model has {heads}: {fix}"
        return ""

    def for_layer(self, layer: int) -> "Profiled | ProfiledHeads":
        """Method of one layer, counted from 0."""
        masses = self.masses
        if masses is None:
            return self
        if layer not in masses.layers:
            raise ValueError(self.unfit(masses.model, layer, 0))
        shares = _shares(masses, self.share, *self._bounds)[layer]
        heads = tuple(range(len(shares)))
        return ProfiledHeads(self.sha256, layer, heads, shares, self.rest, self.centre, masses)

    def plan(self, video: VideoShape, device: torch.device | str = "cpu") -> Plan:
        """Plan of the first layer of the profile. On a model, each layer has its own blocks."""
        first = self.for_layer(self.named_layers[0]) if self.named_layers else self
        if first is self:
            return _unmeasured(self, video, torch.device(device))
        return first.plan(video, torch.device(device))

    def density(self, video: VideoShape) -> float:
        """Share of token pairs that is kept, the mean over heads and layers; pairs with text all
        are."""
        if self.masses is None:
            return self.plan(video).density
        return 1 - (1 - self.share) * (video.video_tokens / video.tokens) ** 2


@dataclass(frozen=True)
class ProfiledHeads(Method):
    """Blocks of some heads of one layer, as `Profiled` measured and shared them.

    Args:
        sha256: of the masses.
        heads: numbers in the layer.
        shares: the density of each.
        masses: what they are chosen by.
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
        """Method of some of the heads."""
        return replace(self, heads=self.heads[heads], shares=self.shares[heads])

    def together(self, methods: Sequence["ProfiledHeads"]) -> "ProfiledHeads | None":
        """One method for heads whose methods differ by density alone, each of one head."""
        alike = {replace(one, heads=(), shares=()) for one in methods}
        if len(alike) > 1 or any(len(one.heads) != 1 for one in methods):
            return None
        return replace(
            self,
            heads=tuple(one.heads[0] for one in methods),
            shares=tuple(one.shares[0] for one in methods),
        )

    def plan(self, video: VideoShape, device: torch.device | str = "cpu") -> Plan:
        """Plan of the heads."""
        return _plan(self, video, torch.device(device))


@lru_cache(maxsize=64)
def _shares(
    masses: Masses, density: float, least: float, most: float
) -> dict[int, tuple[float, ...]]:
    levels = {number: layer.levels for number, layer in masses.layers.items()}
    return shares_of(levels, density, least, most)


@plan_cached
@torch.inference_mode(False)  # a plan built while sampling must serve training too
def _plan(method: ProfiledHeads, video: VideoShape, device: torch.device) -> Plan:
    # Made on the device, where a plan that was forgotten is soon made again.
    masses = method.masses
    layout = layout_of(video, device, *_blocks(masses.tile), masses.tile)
    scores = masses.scores(method.layer, method.heads, video, device)
    held = tokens_of_tiles(video.grid, masses.tile).to(device)
    rest = method.rest, method.centre
    return _of_layout(layout, chosen_blocks(scores, held, method.shares), *rest)


@plan_cached
@torch.inference_mode(False)
def _unmeasured(method: Profiled, video: VideoShape, device: torch.device) -> Plan:
    tile = even_tile(video, method.block)
    layout = layout_of(video, device, *_blocks(tile))
    scores = spread(carried(torch.zeros(1, 1, 1, 1, device=device), tiles_of(video.grid, tile))[0])
    held = tokens_of_tiles(video.grid, tile).to(device)
    keep = chosen_blocks(scores[None], held, (method.share,))
    return _of_layout(layout, keep, method.rest, method.centre)


def _blocks(tile: Box) -> tuple[int, int]:
    return math.prod(tile), math.prod(tile)


def _of_layout(layout: Layout, keep: Tensor, rest: Pool | None, centre: Centre) -> Plan:
    """Plan that keeps (h, T, T) of the video's blocks, and all pairs of blocks with text."""
    slots, T = layout.slots, keep.shape[-1]
    whole = layout.always.expand(len(keep), -1, -1).clone()
    whole[:, :T, :T] |= keep
    base = plan_of_call(slots, layout.always[None, None], rest=rest_of(rest, centre))
    return base.keeping(whole[None], dynamic=False)


def chosen_blocks(scores: Tensor, held: Tensor, shares: Sequence[float]) -> Tensor:
    """Choose blocks of each head, (h, T, T) bool: of each query tile the key tiles that score
    best, so that the share of token pairs is as asked, but at least one.

    Args:
        scores: (h, T, T).
        held: (T,), tokens in each tile.
        shares: one a head.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    cost, all_pairs = held[:, None].double() * held, float(held.sum()) ** 2
    for head, share in enumerate(shares):
        ranked = scores[head].sort(dim=-1, descending=True, stable=True)
        tokens = held[ranked.indices]
        before = tokens.cumsum(-1) - tokens  # in the better tiles of the row
        costs = cost.gather(-1, ranked.indices).flatten()
        # Rows in turn take their next best; of a last round that not all can take, the best do.
        order = ranked.values.flatten().argsort(descending=True, stable=True)
        order = order[before.flatten()[order].argsort(stable=True)]
        end = costs[order].cumsum(0)
        taken = (end - costs[order] / 2 <= share * all_pairs) | (before.flatten()[order] == 0)
        flat = torch.zeros_like(taken).index_copy_(0, order, taken).view_as(ranked.indices)
        keep[head].scatter_(-1, ranked.indices, flat)
    return keep
