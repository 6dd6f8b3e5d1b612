"""Methods by the names that the nodes list, and by how much each keeps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import gen_accel
from gen_accel import (
    VSA,
    BlockMixture,
    Piecewise,
    Radial,
    Reuse,
    SparseLinear,
    VideoShape,
)
from gen_accel.attention_processors.methods.registry import options_of, values_of
from gen_accel.method import Method

SOL, SLA = "sol-attn", "sla"
OURS = tuple(name for name, kind in gen_accel.METHODS.items() if "keeping" in vars(kind))
METHODS = (*OURS, SOL, SLA)
OWN = "the method's own"
SINKS = (OWN, "off", "exact_kv", "exact_kv_and_rows")
BLOCKS = ("auto", "64", "128")


@dataclass(frozen=True)
class Asked:
    """A wish of the node.

    Args:
        name: of `METHODS`.
        keep: share of the pairs, or of the key blocks, that are kept; `SOL` has `tau` for that.
        decay_factor: of "radial", in the place of `keep`; 0: by `keep`.
        block_size: tokens in a block, of `BLOCKS`.
        sink: of `SINKS`, for the first frame.
        settings: "field=value" each, of the method's own fields; they win.
    """

    name: str
    keep: float
    tau: float = 1.3
    decay_factor: float = 0.0
    block_size: str = BLOCKS[0]
    sink: str = OWN
    settings: tuple[str, ...] = ()

    def __call__(self, video: VideoShape) -> tuple[Any, float | None]:
        """Return the method and its density on `video`; None if each call decides."""
        return _asked(self, video)

    def check(self) -> None:
        """Raise ValueError for what the method does not have, before anything is sampled."""
        _made(self, VideoShape(9, 16, 16))


@lru_cache(maxsize=64)
def density_at(method: Any, video: VideoShape) -> float | None:
    """The density of a method on a grid; None where it depends on q and k."""
    if method.is_dense:
        return 1.0
    return None if method.is_dynamic and not method.defines("plan") else method.density(video)


@lru_cache(maxsize=16)
def _asked(asked: Asked, video: VideoShape) -> tuple[Any, float | None]:
    method = _made(asked, video)
    blocks = (SparseLinear, Piecewise, BlockMixture, Reuse, VSA)
    if asked.settings or not isinstance(method, blocks):
        return method, density_at(method, video)
    return method, None if asked.name == SOL else asked.keep


def _made(asked: Asked, video: VideoShape) -> Any:
    if asked.name == "radial" and asked.decay_factor:
        method: Any = Radial(decay_factor=asked.decay_factor)
    elif asked.name in _THEIRS:
        method = _THEIRS[asked.name](asked)
    else:
        method = gen_accel.METHODS[asked.name].keeping(asked.keep, video)
    if asked.block_size != BLOCKS[0]:
        method = _with_blocks(method, asked.name, int(asked.block_size))
    if asked.sink != OWN:
        method = _with_sink(method, asked.name, asked.sink)
    if asked.decay_factor and asked.name != "radial":
        raise ValueError(f"decay_factor is of radial, {asked.name} has keep_percent: set it to 0")
    if asked.settings:
        kind = type(method)
        method = replace(method, **values_of(kind, asked.name, asked.settings))
    return method


def _sol(asked: Asked) -> Piecewise:
    return Piecewise(
        select="threshold", tau=asked.tau, centre="key", score="mean", band=1, tile="raster"
    )


# ComfyUI's own names, for users of its Model Sparse Attention.
_THEIRS: dict[str, Callable[[Asked], Method]] = {
    SOL: _sol,
    SLA: lambda asked: SparseLinear(asked.keep),
}


def _with_blocks(method: Any, name: str, tokens: int) -> Any:
    known = {one.name for one in options_of(type(method))}
    if "block_q" in known:
        return replace(method, block_q=tokens, block_k=tokens, tile="auto")
    if "block" in known:
        return replace(method, block=tokens)
    raise ValueError(f"{name} has no block_size of its own: set it to {BLOCKS[0]}")


def _with_sink(method: Any, name: str, sink: str) -> Any:
    rows = sink == SINKS[3]
    known = {one.name for one in options_of(type(method))}
    if "sink_queries" in known:
        return replace(method, sink=int(sink != "off"), sink_queries=rows)
    if "sink" in known and not rows:
        return replace(method, sink=sink != "off")
    of = "sol-attn and piecewise" if rows else "sol-attn, piecewise and radial"
    raise ValueError(f"sink_conditioning {sink} is of {of}, {name} has none: set it to {OWN!r}")
