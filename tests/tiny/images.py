"""What tiny image models share: one frame, latents as a row of tokens or as a picture."""

from typing import Any

import torch
from torch import Tensor

GRIDS = ((1, 9, 11), (1, 6, 7))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positions(height: int, width: int, *, axes: int = 3, image: int = 0) -> Tensor:
    """(N, axes): which image, row, column, and zeros."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.zeros(height * width, axes)
    ids[:, 0], ids[:, 1], ids[:, 2] = image, rows.flatten(), columns.flatten()
    return ids


def poke_token(given: dict[str, Any], width: int, row: int, column: int) -> None:
    """Where latents are a row of tokens, of which the image is the first."""
    given["hidden_states"][0, row * width + column] += 1


def poke_patch(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    """Where latents are (B, C, H, W), in patches of 2 x 2."""
    given["hidden_states"][0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
