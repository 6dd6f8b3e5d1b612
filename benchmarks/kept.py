"""Clips that benchmarks of the demo model have made so far."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from gen_accel.io import replacing


def to_make(folder: Path, count: int, worker: str, batch: int) -> list[list[int]]:
    """Numbers of the clips that `folder` lacks of `count`, in batches.

    Args:
        worker: "K/N", every N-th clip from K and no more.
    """
    first, workers = map(int, worker.split("/"))
    missing = [i for i in range(first, count, workers) if not clip_file(folder, i).exists()]
    return [missing[i : i + batch] for i in range(0, len(missing), batch)]


def keep_clip(folder: Path, i: int, video: np.ndarray) -> None:
    """(F, H, W, 3) uint8."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(clip_file(folder, i)) as partial:
        save_file({"video": torch.from_numpy(video).contiguous()}, partial)


def kept_clip(folder: Path, i: int) -> np.ndarray:
    return load_file(clip_file(folder, i))["video"].numpy()


def clip_file(folder: Path, i: int) -> Path:
    return folder / f"{i:02d}.safetensors"
