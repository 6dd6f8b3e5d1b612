"""Masses of attention by blocks, layer by layer and head by head, as dense runs showed them.

They are read from one safetensors file, or made by `gen_accel.measure_profile`. A file holds
numbers and JSON alone.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from gen_accel.attention_processors.methods.blocks import Box
from gen_accel.io import (
    check_finite,
    fields_of,
    parse_json,
    read_tensors,
    replacing,
    save_tensors,
    typed,
)
from gen_accel.parsing import shown
from gen_accel.paths import expanded
from gen_accel.video import VideoShape

Form = Literal["offsets", "blocks"]

KIND, VERSION = "masses", 1
FLOOR = -40.0  # of logarithms: less is nothing
LEVELS = 256  # quantiles of a head's scores that the budget is shared by
ROUNDS = 12  # of the fit of weights by offset and by frame
SCORES = 1 << 24  # scores that are held at once


@dataclass(frozen=True, eq=False)
class LayerMasses:
    """Masses of one layer, fp16.

    Args:
        weights: logarithms of the weight of a key token. By offset, (H, 2 F - 1, 2 R - 1, 2 C - 1)
            over the distances in tiles; by blocks, (H, T, T) for each query tile.
        frames: (H, F), logarithms by the frame of tiles that the key lies in; zeros by blocks.
        levels: (H, LEVELS), scores that a share ((i + 1) / LEVELS)^2 of the pairs exceeds.
    """

    weights: Tensor
    frames: Tensor
    levels: Tensor

    def check(self, form: Form, tiles: tuple[int, int, int], what: str) -> None:
        """Raise ValueError for shapes or types that do not belong together."""
        H, T = len(self.weights), math.prod(tiles)
        by_offset = (H, *(2 * n - 1 for n in tiles))
        shapes = {
            "weights": by_offset if form == "offsets" else (H, T, T),
            "frames": (H, tiles[0]),
            "levels": (H, LEVELS),
        }
        for name, shape in shapes.items():
            x = getattr(self, name)
            if x.shape != shape or x.dtype != torch.float16:
                raise ValueError(
                    f"{name} of {what} must be {shape} in float16, got {tuple(x.shape)} in "
                    f"{x.dtype}"
                )


@dataclass(frozen=True, eq=False)
class Masses:
    """Masses of a model's layers. Two with the same `digest` hold the same.

    Args:
        model: class of the transformer.
        form: "offsets" for weights by the distance of two tiles, which hold on any grid; "blocks"
            for weights by pair of tiles, of one grid.
        tile: frames, rows and columns of a tile, in tokens.
        grid: frames, rows and columns that were seen, in tokens.
        layers: by number.
        seen: hash of the prompts that were seen, and how.
        digest: sha256 of everything else.
    """

    model: str
    form: Form
    tile: Box
    grid: Box
    layers: Mapping[int, LayerMasses]
    seen: str = ""
    digest: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"form must be one of {get_args(Form)}, got {shown(self.form)}")
        for name in ("tile", "grid"):
            box = getattr(self, name)
            if len(box) != 3 or not all(isinstance(side, int) and side >= 1 for side in box):
                raise ValueError(f"{name} must be three positive sizes, got {shown(box)}")
        if any(side > size for side, size in zip(self.tile, self.grid, strict=True)):
            raise ValueError(f"tile {self.tile} is larger than the grid {self.grid}")
        if not self.layers:
            raise ValueError("masses must be of one layer at least, got none")
        for number, layer in self.layers.items():
            layer.check(self.form, tiles_of(self.grid, self.tile), f"layer {number}")
        check_finite(self.tensors(), "masses")
        object.__setattr__(self, "digest", self._hash())
        _known[self.digest] = self

    def heads(self, layer: int) -> int:
        return len(self.layers[layer].weights)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for a file."""
        return {
            f"{number}.{name}": getattr(layer, name)
            for number, layer in self.layers.items()
            for name in LayerMasses.__dataclass_fields__
        }

    def about(self) -> dict[str, Any]:
        """Return everything but tensors, as JSON holds it."""
        return {
            "version": VERSION,
            "model": self.model,
            "form": self.form,
            "tile": [*self.tile],
            "grid": [*self.grid],
            "layers": {str(n): self.heads(n) for n in self.layers},
            "seen": self.seen,
        }

    def _hash(self) -> str:
        digest = hashlib.sha256(json.dumps(self.about(), sort_keys=True).encode())
        for name, x in sorted(self.tensors().items()):
            digest.update(name.encode() + x.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

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
        """Logarithms of the mass of a key token, (h, T, T) fp32 for the tiles of a video.

        By offset, weights that no pair of tiles showed fall with the distance as radial attention
        does: half at twice as far. Each row is a softmax over the video.

        Raises:
            ValueError: weights by blocks, on another grid.
        """
        known, index = self.layers[layer], torch.tensor([*heads], device=device)
        weights = known.weights.to(device).index_select(0, index)
        if self.form == "blocks":
            if video.grid != self.grid:
                raise ValueError(
                    f"the profile holds blocks of the grid {self.grid}, got {video.grid}: measure "
                    'it at this size, or with form="offsets", which holds for any'
                )
            return weights.float()
        tiles, seen = tiles_of(video.grid, self.tile), tiles_of(self.grid, self.tile)
        frames = known.frames.to(device).index_select(0, index).float()
        more = frames.new_zeros(len(index), max(0, tiles[0] - seen[0]))
        frames = torch.cat([frames, more], 1)[:, : tiles[0]]
        by_offset = carried(weights.float(), tiles)
        held = tokens_of_tiles(video.grid, self.tile).to(device).log()
        scores = frames.new_empty(len(index), len(held), len(held))
        for head in range(len(index)):
            logits = spread(by_offset[head])
            logits += frames[head].repeat_interleave(tiles[1] * tiles[2])
            scores[head] = (logits + held).log_softmax(-1) - held
        return scores


# Masses that something holds, by digest, so that options find them again without a file.
_known: WeakValueDictionary[str, Masses] = WeakValueDictionary()


def known_masses(digest: str) -> Masses | None:
    """Return masses that this process holds."""
    return _known.get(digest)


def check_masses_path(path: Path) -> None:
    """Raise ValueError for a file that is not called *.safetensors."""
    if path.suffix != ".safetensors":
        raise ValueError(f"a profile is a file called *.safetensors, got {path}")


def read_masses(source: str | Path) -> Masses:
    """Read the file that `Masses.save` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no such file, with what is wrong.
    """
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
    listed = typed(about, "layers", dict, origin=path)
    names = tuple(LayerMasses.__dataclass_fields__)
    if not all(number.isascii() and number.isdigit() for number in listed):
        raise ValueError(f"layers of {path} must be numbers, got {shown([*listed])}")
    wanted = {f"{number}.{name}" for number in listed for name in names}
    if {*tensors} != wanted:
        wrong = ", ".join(sorted({*tensors} ^ wanted)[:3])
        raise ValueError(f"the tensors of {path} are not those of its layers: {wrong}")
    try:
        found = Masses(
            typed(about, "model", str, origin=path),
            typed(about, "form", str, origin=path),  # pyright: ignore[reportArgumentType]
            _box(typed(about, "tile", list, origin=path)),
            _box(typed(about, "grid", list, origin=path)),
            {
                int(number): LayerMasses(*(tensors[f"{number}.{name}"] for name in names))
                for number in listed
            },
            typed(about, "seen", str, origin=path),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if {str(n): found.heads(n) for n in found.layers} != listed:
        raise ValueError(f"the heads of {path} differ from the ones it names, {shown(listed)}")
    return found


def _box(sides: list[Any]) -> Any:
    return tuple(sides)


def tiles_of(grid: Box, tile: Box) -> tuple[int, int, int]:
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


def carried(weights: Tensor, tiles: tuple[int, int, int]) -> Tensor:
    """Carry logarithms of weights by offset, (h, 2 F - 1, 2 R - 1, 2 C - 1), to other tiles.

    An offset beyond the largest one takes its weight, times largest / offset.
    """
    for axis, count in enumerate(tiles, start=1):
        most = weights.shape[axis] // 2
        offset = torch.arange(1 - count, count, device=weights.device)
        weights = weights.index_select(axis, offset.clamp(-most, most) + most)
        decay = (max(most, 1) / offset.abs().clamp_min(1)).clamp_max(1).log()
        weights = weights + decay.view(-1, *[1] * (3 - axis))
    return weights


def spread(by_offset: Tensor) -> Tensor:
    """(T, T) of one head's (2 F - 1, 2 R - 1, 2 C - 1): query tile, key tile."""
    F, R, C = ((size + 1) // 2 for size in by_offset.shape)
    return by_offset.flatten()[offsets_of((F, R, C)).to(by_offset.device)]


def offsets_of(tiles: tuple[int, int, int]) -> Tensor:
    """(T, T) int64, the number of the offset of each pair of tiles, among all in raster order."""
    F, R, C = tiles
    axes = torch.meshgrid(*(torch.arange(n) for n in tiles), indexing="ij")
    place = torch.stack([axis.flatten() for axis in axes], -1)
    d = place[None] - place[:, None] + torch.tensor([F - 1, R - 1, C - 1])
    return (d[..., 0] * (2 * R - 1) + d[..., 1]) * (2 * C - 1) + d[..., 2]


def fit_offsets(
    by_offset: Tensor, by_frame: Tensor, by_query: Tensor, grid: Box, tile: Box
) -> tuple[Tensor, Tensor]:
    """Fit mass_ij = a_i n_j w(j - i) c(frame of j), n_j tokens in tile j, to its sums.

    A softmax whose scores are a function of the offset plus one of the key's frame has this form,
    so that its weights are found, whatever the grid. Sums are brought to fit in turn, which is the
    fit by maximum likelihood.

    Args:
        by_offset: (h, D) sums of mass over the pairs of tiles with equal offset.
        by_frame: (h, F) over the pairs whose key lies in a frame of tiles.
        by_query: (h, T) over the keys.

    Returns:
        (h, D) and (h, F), logarithms of w, with its largest 0, and of c, without a trend.
    """
    device = by_offset.device
    tiles = tiles_of(grid, tile)
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
    return torch.stack(weights), torch.stack(frames)


def _without_trend(w: Tensor, c: Tensor, tiles: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Move the trend of c over the frames after the first into w, as both say the same; c is then
    about 0 there."""
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


def levels_of(scores: Tensor) -> Tensor:
    """Scores that a share ((i + 1) / LEVELS)^2 of the pairs reaches, (h, LEVELS), of (h, T, T)."""
    count = scores[0].numel()
    shares = (torch.arange(1, LEVELS + 1, dtype=torch.float64) / LEVELS).square()
    places = (shares * count).ceil().long().clamp(1, count) - 1
    ranked = torch.stack([one.flatten().sort(descending=True).values for one in scores])
    return ranked[:, places.to(scores.device)]


def shares_of(
    levels: Mapping[int, Tensor], density: float, least: float, most: float
) -> dict[int, tuple[float, ...]]:
    """Share one budget among the heads of all layers, by the density of each.

    The squares of the masses that heads lose are least in sum. So the next block of each head is
    worth the same, its mass times the mass that the head still loses, and heads that look far and
    wide keep more. The worth is found by halving. Each head has at least `least` and at most
    `most`, and the mean is `density`.
    """
    numbers = [*levels]
    by_level = (torch.arange(LEVELS + 1, dtype=torch.float64) / LEVELS).square()
    mass = torch.cat([levels[n].double() for n in numbers]).exp() * by_level.diff()
    mass /= mass.sum(-1, keepdim=True)
    lost = (1 - mass.cumsum(-1)).clamp_min(0) + mass  # before each level
    known = (mass / by_level.diff() * lost).log()

    def shares(cut: float) -> Tensor:
        above = (known > cut).sum(-1)
        low, high = above.clamp(1) - 1, above.clamp_max(LEVELS - 1)
        first, last = (known.gather(1, x[:, None])[:, 0] for x in (low, high))
        part = ((first - cut) / (first - last).clamp_min(1e-9)).clamp(0, 1)
        between = by_level[above] + part * (by_level[high + 1] - by_level[above])
        return torch.where(above > 0, between, by_level[above]).clamp(least, most)

    low, high = known.min().item() - 1, known.max().item() + 1
    for _ in range(60):
        cut = (low + high) / 2
        if shares(cut).mean() > density:
            low = cut
        else:
            high = cut
    found = _with_mean(shares(high), density, least, most)
    split = found.split([len(levels[n]) for n in numbers])
    return {n: tuple(part.tolist()) for n, part in zip(numbers, split, strict=True)}


def _with_mean(shares: Tensor, mean: float, least: float, most: float) -> Tensor:
    """Scale shares until their mean is as asked, within their bounds."""
    for _ in range(60):
        lacking = mean - shares.mean()
        free = shares < most if lacking > 0 else shares > least
        if lacking.abs() < 1e-6 or not free.any():
            break
        shares = torch.where(free, shares + lacking * len(shares) / free.sum(), shares)
        shares = shares.clamp(least, most)
    return shares
