"""Masses of attention by tiles, layer by layer and head by head, as dense runs showed them.

`gen_accel.measure_profile` makes them. A file holds tensors and JSON alone.

T tiles of a grid, F, R and C of them along frames, rows and columns; h heads.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
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

KIND, VERSION = "masses", 2
FLOOR = -40.0  # of logarithms: less is nothing
ROUNDS = 12  # of the fit of weights by offset and by frame


class LayerMasses(NamedTuple):
    """Logarithms of the weight of a key token in one layer, fp16.

    Args:
        weights: (H, 2 F - 1, 2 R - 1, 2 C - 1), by the distance of two tiles.
        frames: (H, F), by the frame of tiles that the key lies in.
    """

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
        """Logarithms of the mass of a key token, (h, T, T) fp32 for the tiles of a video.

        Weights of distances that were not seen fall as in radial attention: half at twice as far.
        Each row is a softmax over the video.
        """
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
        ValueError: it is no such file, with the reason.
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
    """Fit mass_ij = a_i n_j w(j - i) c(frame of j), n_j tokens in tile j, to its sums.

    A softmax whose scores are a function of the offset plus one of the key's frame has this form,
    so that its weights are found, whatever the grid. Sums are brought to fit in turn, which is the
    fit by maximum likelihood.

    Args:
        by_offset: (h, D) sums of mass over the pairs of tiles with equal offset.
        by_frame: (h, F) over the pairs whose key lies in a frame of tiles.
        by_query: (h, T) over the keys.

    Returns:
        Logarithms of w, with its largest 0, and of c, without a trend.
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
