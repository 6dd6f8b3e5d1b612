"""Wan: video alone in self-attention."""

from typing import Any

import wan
from torch import Tensor

from tiny import Case


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: None = None,
    time: float = 700.0,
) -> dict[str, Tensor]:
    return wan.inputs(frames, 2 * height, 2 * width, batch=batch, time=time)


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    given["hidden_states"][0, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1


CASES = [Case("wan", wan.transformer, inputs, poke, pipeline=wan.pipeline, generate=wan.generate)]
