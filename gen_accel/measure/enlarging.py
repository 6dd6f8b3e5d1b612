"""Size at which metrics of visible differences look at small frames."""

import numpy as np

VIEWED_SIDE = 288  # pixels: the height of CIF, the smallest format that films are shown in


def enlargement(height: int, width: int) -> int:
    """Whole factor that brings the smaller side up to 288 pixels at most; 1 from 145 on.

    Frames of a toy model are seen enlarged, pixel by pixel, and metrics that model an eye before a
    screen would call blocks of 96 pixels invisible.
    """
    return max(1, VIEWED_SIDE // min(height, width))


def enlarged(frame: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each pixel of (H, W, 3) `factor` times down and across."""
    return frame if factor == 1 else frame.repeat(factor, 0).repeat(factor, 1)
