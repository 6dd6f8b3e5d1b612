"""Methods by the names that the nodes list, and by how much each keeps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod, sqrt
from typing import Any

from gen_accel import (
    BlockMixture,
    Neighborhood,
    Piecewise,
    Radial,
    Reuse,
    SparseLinear,
    VideoShape,
)
from gen_accel.attention_processors.methods.registry import values_of

# ComfyUI's own names, for users of its Model Sparse Attention.
SOL, SLA, VSA = "sol-attn", "sla", "vsa"
METHODS = (
    *("sparse_linear", "radial", "piecewise", "neighborhood", "block_mixture", "reuse"),
    *(SOL, SLA, VSA),
)
OWN = "the method's own"
SINKS = (OWN, "off", "exact_kv", "exact_kv_and_rows")
BLOCKS = ("auto", "64", "128")
VSA_TILE = (4, 4, 4)  # tokens of its cubes


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
        """Return the method and the density that it has on `video`; None where each call decides.

        Of "radial" it is the widest at most as dense as `keep`, or the sparsest there is.
        "neighborhood" sees all frames, and of rows and columns the same share.
        """
        return _asked(self, video)

    def check(self) -> None:
        """Raise ValueError for what the method does not have, before anything is sampled."""
        _made(self, VideoShape(9, 16, 16))


@lru_cache(maxsize=64)
def density_at(method: Any, video: VideoShape) -> float | None:
    """The density of a method on a grid; None where it depends on q and k."""
    if method.is_dense:
        return 1.0
    return None if method.is_dynamic and not method.has_plan else method.density(video)


@lru_cache(maxsize=16)
def _asked(asked: Asked, video: VideoShape) -> tuple[Any, float | None]:
    method = _made(asked, video)
    blocks = (SparseLinear, Piecewise, BlockMixture, Reuse)
    if asked.settings or not isinstance(method, blocks):
        return method, density_at(method, video)
    return method, None if asked.name == SOL else asked.keep


def _made(asked: Asked, video: VideoShape) -> Any:
    method = _METHODS[asked.name](asked, video)
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


def _radial(asked: Asked, video: VideoShape) -> Radial:
    if asked.decay_factor:
        return Radial(decay_factor=asked.decay_factor)
    low, high = -10.0, 10.0  # of log2 decay_factor: beyond, nothing changes on any video
    for _ in range(16):
        middle = (low + high) / 2
        wide = Radial(decay_factor=2**middle).density(video) > asked.keep
        low, high = (low, middle) if wide else (middle, high)
    return Radial(decay_factor=2**low)


def _neighborhood(asked: Asked, video: VideoShape) -> Neighborhood:
    side = sqrt(asked.keep)
    rows, columns = (max(1, round(side * n)) for n in (video.height, video.width))
    return Neighborhood((-1, rows, columns))


def _block_mixture(asked: Asked, video: VideoShape) -> BlockMixture:
    chunks = BlockMixture().chunks
    one, two, three = (max(1, round(asked.keep * count)) for count in chunks)
    return BlockMixture(select="topk", scope="query_head", topk=(one, two, three))


def _sol(asked: Asked, video: VideoShape) -> Piecewise:
    return Piecewise(
        select="threshold", tau=asked.tau, centre="key", score="mean", band=1, tile="raster"
    )


def _vsa(asked: Asked, video: VideoShape) -> SparseLinear:
    tokens = prod(VSA_TILE)
    return SparseLinear(critical=asked.keep, block_q=tokens, block_k=tokens, tile=VSA_TILE)


_METHODS: dict[str, Callable[[Asked, VideoShape], Any]] = {
    "sparse_linear": lambda asked, video: SparseLinear(critical=asked.keep),
    "radial": _radial,
    "piecewise": lambda asked, video: Piecewise(asked.keep),
    "neighborhood": _neighborhood,
    "block_mixture": _block_mixture,
    "reuse": lambda asked, video: Reuse(SparseLinear(critical=asked.keep)),
    SOL: _sol,
    SLA: lambda asked, video: SparseLinear(critical=asked.keep),
    VSA: _vsa,
}


def _with_blocks(method: Any, name: str, tokens: int) -> Any:
    if isinstance(method, SparseLinear | Piecewise):
        return replace(method, block_q=tokens, block_k=tokens, tile="auto")
    if isinstance(method, Radial | BlockMixture):
        return replace(method, block=tokens)
    raise ValueError(f"{name} has no block_size of its own: set it to {BLOCKS[0]}")


def _with_sink(method: Any, name: str, sink: str) -> Any:
    rows = sink == SINKS[3]
    if isinstance(method, Piecewise):
        return replace(method, sink=int(sink != "off"), sink_queries=rows)
    if isinstance(method, Radial) and not rows:
        return replace(method, sink=sink != "off")
    of = "sol-attn and piecewise" if rows else "sol-attn, piecewise and radial"
    raise ValueError(f"sink_conditioning {sink} is of {of}, {name} has none: set it to {OWN!r}")
