"""Methods by the names that the node lists."""

from functools import lru_cache
from typing import Any

from gen_accel import Radial, SparseLinear, VideoShape

METHODS = ("sparse_linear", "radial")


@lru_cache(maxsize=8)
def method_for(name: str, keep: float, video: VideoShape) -> tuple[Any, float]:
    """A method and the density that it has on `video`.

    "sparse_linear" keeps that share of the key blocks for each query block. Of "radial" it is the
    widest at most as dense as `keep`, or the sparsest there is: every token sees its own frame and
    the first one.
    """
    if name == "sparse_linear":
        return SparseLinear(critical=keep), keep
    low, high = -10.0, 10.0  # of log2 decay_factor: beyond, nothing changes on any video
    for _ in range(16):
        middle = (low + high) / 2
        wide = Radial(decay_factor=2**middle).density(video) > keep
        low, high = (low, middle) if wide else (middle, high)
    method = Radial(decay_factor=2**low)
    return method, method.density(video)
