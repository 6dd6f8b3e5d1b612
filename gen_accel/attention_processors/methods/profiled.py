"""Profiled attention: blocks for each layer and head, measured once in dense runs of the model.

References:
    Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
    2024, https://arxiv.org/abs/2406.14909; public code thu-nics/MoA at e224fe3 (MIT).
    Chen et al., "Sparse-vDiT", 2025, https://arxiv.org/abs/2506.03065. Zhang et al., "Fast Video
    Generation with Sliding Tile Attention", 2025, https://arxiv.org/abs/2502.04507.
    They choose among a few shapes for each head, by errors on samples. Here a shape is any set of
    blocks, chosen by the mass of dense attention.

`gen_accel.measure_profile` makes the masses. Their file holds tensors and JSON alone.

T tiles of a grid, F, R and C of them along frames, rows and columns; h heads.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

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
from gen_accel.io import (
    check_finite,
    fields_of,
    parse_json,
    read_tensors,
    replacing,
    save_tensors,
    typed,
)
from gen_accel.method import Method, plan_once
from gen_accel.parsing import Share, check_options, shown
from gen_accel.paths import expanded
from gen_accel.plan import Centre, Plan, plan_of_call
from gen_accel.video import VideoShape

KIND, VERSION = "masses", 2
FLOOR = -40.0  # of logarithms: less is nothing
ROUNDS = 12  # of the fit of weights by offset and by frame


class LayerMasses(NamedTuple):
    """Logarithms of the weight of a key token in one layer, fp16: (H, 2 F - 1, 2 R - 1, 2 C - 1)
    by the distance of two tiles, and (H, F) by the frame of tiles that the key lies in."""

    weights: Tensor
    frames: Tensor


@dataclass(frozen=True, eq=False)
class Masses:
    """Masses of a model's layers. Two with the same `digest` hold the same.

    Args:
        model: class of the transformer.
        tile: frames, rows and columns of a tile, in tokens.
        grid: frames, rows and columns that were seen, in tokens.
        layers: by number.
        seen: hash of the prompts that were seen, and how.
        digest: sha256 of everything else.
    """

    model: str
    tile: Box
    grid: Box
    layers: Mapping[int, LayerMasses]
    seen: str = ""
    digest: str = field(default="", init=False)

    def __post_init__(self) -> None:
        for name in ("tile", "grid"):
            box = getattr(self, name)
            if len(box) != 3 or not all(isinstance(side, int) and side >= 1 for side in box):
                raise ValueError(f"{name} must be three positive sizes, got {shown(box)}")
        if any(side > size for side, size in zip(self.tile, self.grid, strict=True)):
            raise ValueError(f"tile {self.tile} is larger than the grid {self.grid}")
        if not self.layers:
            raise ValueError("masses must be of one layer at least, got none")
        tiles = tiles_of(self.grid, self.tile)
        for number, layer in self.layers.items():
            H = len(layer.weights)
            shapes = (H, *(2 * n - 1 for n in tiles)), (H, tiles[0])
            for name, x, shape in zip(layer._fields, layer, shapes, strict=True):
                if x.shape != shape or x.dtype != torch.float16:
                    raise ValueError(
                        f"{name} of layer {number} must be {shape} in float16, got "
                        f"{tuple(x.shape)} in {x.dtype}"
                    )
        check_finite(self.tensors(), "masses")
        digest = hashlib.sha256(json.dumps(self.about(), sort_keys=True).encode())
        for name, x in sorted(self.tensors().items()):
            digest.update(name.encode() + x.cpu().contiguous().numpy().tobytes())
        object.__setattr__(self, "digest", digest.hexdigest())
        _known[self.digest] = self

    def heads(self, layer: int) -> int:
        return len(self.layers[layer].weights)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for a file."""
        return {
            f"{number}.{name}": x
            for number, layer in self.layers.items()
            for name, x in layer._asdict().items()
        }

    def about(self) -> dict[str, object]:
        """Return everything but tensors, as JSON holds it."""
        return {
            "version": VERSION,
            "model": self.model,
            "tile": [*self.tile],
            "grid": [*self.grid],
            "seen": self.seen,
        }

    def unfit(self, model: str, layer: int, heads: int) -> str:
        """Say why a layer of so many heads, in a transformer of that class, has no masses here; ""
        if it has."""
        why = ""
        if model != self.model:
            why = f"was measured on {self.model}, this is {model}"
        elif layer not in self.layers:
            why = f"holds layers {min(self.layers)} to {max(self.layers)}, got layer {layer}"
        elif heads != self.heads(layer):
            held = f"{self.heads(layer)} heads in layer {layer}"
            why = f"holds {held}, this model has {heads}"
        return why and f"the profile {why}: measure one, gen_accel.measure_profile(pipe, prompts)"

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all."""
        path = expanded(path)
        check_masses_path(path)
        with replacing(path) as partial:
            save_tensors(self.tensors(), partial, {KIND: json.dumps(self.about())})
        return path

    def scores(
        self, layer: int, heads: Sequence[int], video: VideoShape, device: torch.device
    ) -> Tensor:
        """Logarithms of the mass of a key token, (h, T, T) fp32 for the tiles of a video. Weights
        of distances that were not seen fall as in radial attention. Each row is a softmax over the
        video."""
        index = torch.tensor([*heads], device=device)
        weights, frames = (x.to(device).index_select(0, index).float() for x in self.layers[layer])
        tiles, seen = tiles_of(video.grid, self.tile), tiles_of(self.grid, self.tile)
        more = frames.new_zeros(len(index), max(0, tiles[0] - seen[0]))
        frames = torch.cat([frames, more], 1)[:, : tiles[0]]
        by_offset = carried(weights, tiles)
        held = tokens_of_tiles(video.grid, self.tile).to(device).log()
        scores = frames.new_empty(len(index), len(held), len(held))
        for head in range(len(index)):
            logits = spread(by_offset[head])
            logits += frames[head].repeat_interleave(tiles[1] * tiles[2])
            scores[head] = (logits + held).log_softmax(-1) - held
        return scores


# Masses that something holds, by digest, so that options find them again without a file.
_known: WeakValueDictionary[str, Masses] = WeakValueDictionary()


def check_masses_path(path: Path) -> None:
    """Raise ValueError for a file that is not called *.safetensors."""
    if path.suffix != ".safetensors":
        raise ValueError(f"a profile is a file called *.safetensors, got {path}")


def read_masses(source: str | Path) -> Masses:
    """Read the file that `Masses.save` wrote. FileNotFoundError if it is missing; ValueError, with
    the reason, for another file."""
    path = expanded(source)
    check_masses_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no profile at {path}")
    tensors, metadata = read_tensors(path)
    if KIND not in metadata:
        raise ValueError(f"{path} is no profile: gen_accel.measure_profile writes one")
    about = fields_of(parse_json(metadata[KIND], path), path)
    version = typed(about, "version", int, origin=path)
    if version != VERSION:
        raise ValueError(f"{path} is of version {version}, not {VERSION}: measure it again")
    numbers = sorted(
        {int(n) for n in (name.partition(".")[0] for name in tensors) if n.isdecimal()}
    )
    names = LayerMasses._fields
    if wrong := sorted({*tensors} ^ {f"{n}.{name}" for n in numbers for name in names}):
        raise ValueError(
            f"the tensors of {path} are not those of its layers: {', '.join(wrong[:3])}"
        )
    try:
        return Masses(
            typed(about, "model", str, origin=path),
            tuple(typed(about, "tile", list, origin=path)),  # pyright: ignore[reportArgumentType]
            tuple(typed(about, "grid", list, origin=path)),  # pyright: ignore[reportArgumentType]
            {n: LayerMasses(*(tensors[f"{n}.{name}"] for name in names)) for n in numbers},
            typed(about, "seen", str, origin=path),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


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
        held = _known.get(self.sha256)
        if held is None and self.file and not self.sha256:
            held = read_masses(self.file)
            object.__setattr__(self, "sha256", held.digest)
        if held is not None:
            vars(self)["masses"] = held
        elif self.sha256 and not self.file:
            raise ValueError(
                f"the profile {self.sha256[:12]} was in memory alone: save it, "
                "method.save('profile.safetensors'), and give file='profile.safetensors'"
            )

    @classmethod
    def load(cls, file: str | Path, share: float = 0.1) -> "Profiled":
        """Read the file of a profile; FileNotFoundError or ValueError if it is missing or
        another."""
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

    @cached_property
    def masses(self) -> Masses | None:
        """Masses that were measured, read from the file when first needed; None without one."""
        if not self.file:
            return None
        held = read_masses(self.file)
        if held.digest != self.sha256:
            raise ValueError(
                f"{self.file} holds another profile, {held.digest[:12]}, than the "
                f"{self.sha256[:12]} that was asked for: leave out sha256 to take it"
            )
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
        return ProfiledHeads(replace(self, share=1.0), layer, heads, (self.share,) * len(heads))

    @plan_once
    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        """Plan of the first layer of the profile. On a model, each layer has its own blocks."""
        if self.masses is not None:
            return self.for_layer(self.named_layers[0]).plan(video, device)
        tile = even_tile(video, self.block)
        zeros = torch.zeros(1, 1, 1, 1, device=device)
        scores = spread(carried(zeros, tiles_of(video.grid, tile))[0])[None]
        layout = layout_of(video, device, self.block, self.block)
        return self._plan_of(scores, (self.share,), tile, layout, video)

    def _plan_of(
        self,
        scores: Tensor,
        shares: Sequence[float],
        tile: Box,
        layout: Layout,
        video: VideoShape,
    ) -> Plan:
        """Plan of the best of the video's blocks by scores, (h, T, T), and all pairs with text."""
        T = scores.shape[-1]
        held = tokens_of_tiles(video.grid, tile).to(scores.device)
        keep = layout.always.expand(len(scores), -1, -1).clone()
        keep[:, :T, :T] |= chosen_blocks(scores, held, shares)
        rest = rest_of(self.rest, self.centre, tokens=video.video_tokens)
        base = plan_of_call(layout.slots, layout.always[None, None], rest=rest)
        return base.keeping(keep[None], dynamic=False)

    def density(self, video: VideoShape) -> float:
        """Share of token pairs that is kept, the mean over heads and layers; pairs with text all
        are."""
        if self.masses is None:
            return self.plan(video).density
        return 1 - (1 - self.share) * (video.video_tokens / video.tokens) ** 2


@dataclass(frozen=True)
class ProfiledHeads(Method):
    """Blocks of some heads of one layer, each at its own share, by the masses of a profile at
    share 1."""

    profile: Profiled
    layer: int
    heads: tuple[int, ...]
    shares: tuple[float, ...]

    @property
    def least_grid(self) -> Box:
        return self.profile.least_grid

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
        masses = self.profile.masses
        assert masses is not None
        tile, block = masses.tile, math.prod(masses.tile)
        scores = masses.scores(self.layer, self.heads, video, device)
        layout = layout_of(video, device, block, block, tile)
        return self.profile._plan_of(scores, self.shares, tile, layout, video)


def tiles_of(grid: Box, tile: Box) -> Box:
    """Number of tiles along each axis."""
    F, R, C = (-(-size // side) for size, side in zip(grid, tile, strict=True))
    return F, R, C


def tokens_of_tiles(grid: Box, tile: Box) -> Tensor:
    """(T,) fp32, tokens in each tile, in raster order of the tiles."""
    sides = []
    for size, side in zip(grid, tile, strict=True):
        first = torch.arange(0, size, side)
        sides.append((first + side).clamp_max(size) - first)
    F, R, C = sides
    return (F[:, None, None] * R[:, None] * C).flatten().float()


def carried(weights: Tensor, tiles: Box) -> Tensor:
    """Carry logarithms of weights by offset, (h, 2 F - 1, 2 R - 1, 2 C - 1), to other tiles. An
    offset beyond the largest one takes its weight, times largest / offset."""
    for axis, count in enumerate(tiles, start=1):
        most = weights.shape[axis] // 2
        offset = torch.arange(1 - count, count, device=weights.device)
        weights = weights.index_select(axis, offset.clamp(-most, most) + most)
        decay = (max(most, 1) / offset.abs().clamp_min(1)).clamp_max(1).log()
        weights = weights + decay.view(-1, *[1] * (3 - axis))
    return weights


def spread(by_offset: Tensor) -> Tensor:
    """(T, T), query tile by key tile, of one head's (2 F - 1, 2 R - 1, 2 C - 1)."""
    F, R, C = ((size + 1) // 2 for size in by_offset.shape)
    return by_offset.flatten()[offsets_of((F, R, C)).to(by_offset.device)]


def offsets_of(tiles: Box) -> Tensor:
    """(T, T) int64, the number of the offset of each pair of tiles, among all in raster order."""
    F, R, C = tiles
    axes = torch.meshgrid(*(torch.arange(n) for n in tiles), indexing="ij")
    place = torch.stack([axis.flatten() for axis in axes], -1)
    d = place[None] - place[:, None] + torch.tensor([F - 1, R - 1, C - 1])
    return (d[..., 0] * (2 * R - 1) + d[..., 1]) * (2 * C - 1) + d[..., 2]


def fit_offsets(
    by_offset: Tensor, by_frame: Tensor, by_query: Tensor, grid: Box, tile: Box
) -> LayerMasses:
    """Fit mass_ij = a_i n_j w(j - i) c(frame of j), n_j tokens in tile j, to its sums: (h, D) over
    the pairs of tiles with equal offset, (h, F) over the pairs whose key lies in a frame of tiles,
    and (h, T) over the keys. Return logarithms of w, with its largest 0, and of c, without a
    trend.

    A softmax whose scores are a function of the offset plus one of the key's frame has this form,
    whatever the grid. Sums are brought to fit in turn, which is the fit by maximum likelihood.
    """
    device, tiles = by_offset.device, tiles_of(grid, tile)
    index = offsets_of(tiles).to(device).flatten()
    held = tokens_of_tiles(grid, tile).to(device).double()
    frame = torch.arange(len(held), device=device) // (tiles[1] * tiles[2])
    tiny = math.exp(FLOOR)
    weights, frames = [], []
    each = by_offset.double(), by_frame.double(), by_query.double()
    for sums, columns, rows in zip(*each, strict=True):
        pairs = torch.bincount(index, minlength=len(sums)).clamp_min(1)
        w = (sums / pairs).clamp_min(tiny)
        c = torch.ones_like(columns)
        for _ in range(ROUNDS):
            found = w[index].view(len(held), -1) * (held * c[frame])
            found *= (rows / found.sum(-1).clamp_min(tiny))[:, None]
            seen = torch.zeros_like(c).index_add_(0, frame, found.sum(0))
            c = (c * columns / seen.clamp_min(tiny)).clamp_min(tiny)
            found *= (columns / seen.clamp_min(tiny))[frame]
            seen = torch.zeros_like(w).index_add_(0, index, found.flatten())
            w = (w * sums / seen.clamp_min(tiny)).clamp_min(tiny)
        w, c = _without_trend(w.log(), c.log(), tiles)
        weights.append((w - w.max()).clamp_min(FLOOR))
        frames.append(c)
    shape = len(weights), *(2 * n - 1 for n in tiles)
    return LayerMasses(torch.stack(weights).view(shape).half(), torch.stack(frames).half())


def _without_trend(w: Tensor, c: Tensor, tiles: Box) -> tuple[Tensor, Tensor]:
    """Move the trend of c over the frames after the first into w; c is then about 0 there."""
    if len(c) < 2:
        return w, torch.zeros_like(c)
    rest = c[1:]
    place = torch.arange(1, len(c), device=c.device, dtype=c.dtype)
    slope = c.new_zeros(())
    if len(rest) > 1:
        off = place - place.mean()
        slope = (off * rest).sum() / off.square().sum()
    distance = torch.arange(1 - tiles[0], tiles[0], device=c.device, dtype=c.dtype)
    w = (w.view(len(distance), -1) + (slope * distance)[:, None]).flatten()
    c = c - slope * torch.arange(len(c), device=c.device)
    return w, c - c[1:].mean()


def chosen_blocks(scores: Tensor, held: Tensor, shares: Sequence[float]) -> Tensor:
    """Choose blocks of each head, (h, T, T) bool: of each query tile the key tiles that score
    best, at least one, so that the share of token pairs is as asked for the head; `held` is (T,),
    the tokens in each tile."""
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
