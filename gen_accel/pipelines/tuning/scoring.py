"""Scores of sparse videos against dense ones."""

from collections.abc import Callable

import numpy as np

# "psnr", "latent_error", or a function of the dense and the sparse video, (F, H, W, 3) uint8, to a
# score that is better if larger.
Objective = str | Callable[[np.ndarray, np.ndarray], float]

MOST_PSNR = 200.0  # dB, of equal videos, whose PSNR is infinite


def score_of_videos(objective: Objective, dense: np.ndarray, sparse: np.ndarray) -> float:
    """Score a sparse video by "psnr", or by a function."""
    if callable(objective):
        return float(objective(dense, sparse))
    from gen_accel.measure.quality import psnr  # of an extra

    return min(psnr(sparse, dense), MOST_PSNR)
