"""Rotary tables with other frequencies on the time axis, in the place of a model's own."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families.sites import Model
from gen_accel.plan import widest

Table = tuple[Tensor, Tensor]  # cosines and sines


class TemporalRotary(nn.Module):
    """A rotary module in the place of the model's own, with other frequencies on the time axis.

    Args:
        stock: the model's own.
        numbers: the frequencies, as numbers, so that `.to()` does not round them.
        table: (stock, numbers, arguments of the forward pass) to cosines and sines.
    """

    def __init__(self, stock: Model, numbers: Sequence, table: Callable[..., Table]) -> None:
        super().__init__()
        self.stock, self.numbers, self.table = stock, numbers, table

    def prepare_video_coords(self, *args: object, **kwargs: object) -> Tensor:
        """Positions as LTX-2's own module gives them."""
        return self.stock.prepare_video_coords(*args, **kwargs)

    def forward(self, *args: object, **kwargs: object) -> Table:
        """Cosines and sines in the shapes of the model's own module."""
        return self.table(self.stock, self.numbers, *args, **kwargs)


def stock_rotary(transformer: Model) -> Model:
    """Return the model's own rotary module, whether or not another one is in its place."""
    rope = transformer.rope
    return rope.stock if isinstance(rope, TemporalRotary) else rope


def check_shape(freqs: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError for frequencies of another shape."""
    if tuple(freqs.shape) != tuple(shape):
        raise ValueError(f"freqs must be of shape {tuple(shape)}, got {tuple(freqs.shape)}")


class Like(TypedDict):
    """Options of a function that makes a tensor."""

    device: torch.device
    dtype: torch.dtype


def precise(like: Tensor) -> Like:
    """Dtype and device in which angles for a table are computed."""
    return {"dtype": widest(like.device), "device": like.device}


def by_frames(cos: Tensor, sin: Tensor, frames: int, freqs: Sequence[float] | Tensor) -> Table:
    """Tables (tokens, head dim) whose first columns, in pairs, are the time axis, with `freqs` in
    rad a latent frame there.

    Args:
        frames: of the tokens, which come frame by frame.
    """
    real = precise(cos)
    frame = torch.arange(frames, **real).repeat_interleave(len(cos) // frames)
    angles = torch.outer(frame, torch.as_tensor(freqs, **real)).repeat_interleave(2, 1)
    rest = angles.shape[1]
    return (
        torch.cat([angles.cos().to(cos.dtype), cos[:, rest:]], 1),
        torch.cat([angles.sin().to(sin.dtype), sin[:, rest:]], 1),
    )


def turned_pairs(x: Tensor, first: Tensor, second: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs of columns of x (..., D) by angles in rad, one for each pair, in float32.

    Args:
        first, second: columns of the pairs.
    """
    a, b = (x.index_select(-1, some.to(x.device)).float() for some in (first, second))
    cos, sin = (part.float().to(x.device) for part in (angles.cos(), angles.sin()))
    columns = torch.cat([first, second]).to(x.device)
    turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return x.index_copy(-1, columns, turned.to(x.dtype))


def turned_neighbours(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the first columns of x (..., D), in pairs side by side, by angles in rad."""
    first = 2 * torch.arange(angles.shape[-1])
    return turned_pairs(x, first, first + 1, angles)


def rewrite(rope: Model, tables: Sequence[Tensor], values: Sequence[Tensor] | None) -> None:
    """Write other values into tables that a model keeps, or for None its own, bit for bit."""
    own = getattr(rope, "own_temporal", None)
    if values is not None and own is None:
        rope.own_temporal = tuple(table.clone() for table in tables)
    if values is None and own is not None:
        del rope.own_temporal
        values = own
    for table, value in zip(tables, values or (), strict=False):
        table.copy_(value)
