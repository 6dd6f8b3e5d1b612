"""The methods as all shared tests use them: one row for each of `METHODS`.

A method that is new there needs no row: its options are then made small until it leaves something
out on the tests' few tokens. A row adds cases that suit it better.
"""

from dataclasses import fields, replace
from typing import Any, NamedTuple

from hypothesis import strategies as st

from gen_accel.attention_processors import (
    METHODS,
    VSA,
    BlockMixture,
    Dense,
    Neighborhood,
    Piecewise,
    Profiled,
    Radial,
    Reuse,
    SparseLinear,
)
from gen_accel.video import VideoShape

FEW = VideoShape(3, 5, 7)  # the least grid of the tiny models, on which `small` leaves some out


def small(kind: type) -> Any:
    """An instance with whole numbers so small that it keeps less than all of FEW."""
    method = kind()
    for most in (None, 16, 8, 4, 3, 2, 1):
        options = {
            field.name: _at_most(getattr(method, field.name), most) for field in fields(kind)
        }
        try:
            found = replace(method, **options)
            if found.density(FEW) < 1:
                return found
        except ValueError:  # such sizes do not go together
            continue
    return method


def _at_most(value: Any, most: int | None) -> Any:
    if isinstance(value, tuple):
        return tuple(_at_most(x, most) for x in value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return min(value, most) if whole and most is not None else value


@st.composite
def _radials(draw, video):
    rule = draw(st.sampled_from(["balanced", "paper", "code-2025-06", "code-2025-11"]))
    return Radial(
        rule=rule,
        decay_factor=draw(st.sampled_from([0.01, 0.2, 0.5, 1.0, 4.0])),
        sink=draw(st.booleans()),
        block=draw(st.sampled_from([1, 3, 8, 16, 24, 128])),
        anchor_every=draw(st.none() | st.integers(1, video.frames + 1)),
        tile_frames=draw(st.none() | st.integers(1, 4)) if rule == "balanced" else None,
        tile_side=draw(st.integers(1, 12)) if rule == "balanced" else 8,
    )


@st.composite
def _neighborhoods(draw, video):
    axes = []
    for size in video.grid:
        window = draw(st.sampled_from([-1, *range(1, size + 1)]))
        stride = draw(st.integers(1, size if window == -1 else window))
        dilation = 1 if window == -1 else draw(st.integers(1, size // window))
        axes.append((window, stride, dilation, draw(st.booleans())))
    return Neighborhood(*zip(*axes, strict=True))


def sides(*most: int) -> st.SearchStrategy:
    return st.tuples(*(st.integers(1, size) for size in most))


@st.composite
def _block_mixtures(draw, video):
    select = draw(st.sampled_from(["threshold", "topk"]))
    scopes = ["query_head", "head_global", "overall", "block"]
    return BlockMixture(
        partition=draw(st.sampled_from(["1d", "2d", "3d"])),
        chunk_1d=draw(st.none() | st.integers(1, video.frames)),
        chunk_2d=draw(st.none() | sides(*video.grid[1:])),
        chunk_3d=draw(st.none() | sides(*video.grid)),
        chunks=draw(sides(4, 12, 24)),
        select=select,
        scope=draw(st.sampled_from(scopes[: 4 if select == "threshold" else 3])),
        threshold=draw(st.sampled_from([1e-6, 0.1, 0.25, 0.5, 0.9, 1.0])),
        topk=draw(sides(3, 5, 9)),
        routing=draw(st.sampled_from(["token", "block"])),
        block=draw(st.sampled_from([1, 4, 7, 16, 64])),
    )


@st.composite
def _sparse_linears(draw, video):
    tile = draw(st.sampled_from(["auto", "raster"]))
    blocks = [(8, 8), (16, 8), (4, 12), (64, 64), (1, 1)] + [(12, 8), (5, 7)] * (tile == "raster")
    block_q, block_k = draw(st.sampled_from(blocks))
    return SparseLinear(
        critical=draw(st.sampled_from([1e-6, 0.05, 0.3, 0.7])),
        skipped=draw(st.sampled_from([0.0, 0.1, 0.3])),
        linear_over=draw(st.sampled_from(["all", "rest", "marginal"])),
        feature_map=draw(st.sampled_from(["softmax", "elu", "relu"])),
        combine=draw(st.sampled_from(["project", "alpha"])),
        block_q=block_q,
        block_k=block_k,
        tile=tile,
    )


@st.composite
def _piecewises(draw, video):
    by_threshold, centre = draw(st.booleans()), draw(st.sampled_from(["query", "key"]))
    raster, boxes = draw(st.booleans()), st.just("auto") | sides(*video.grid)
    blocks = [(8, 8), (16, 8), (4, 12), (64, 64), (1, 1)] + [(12, 8), (5, 7)] * raster
    block_q, block_k = draw(st.sampled_from(blocks))
    chosen = {"critical": draw(st.sampled_from([1e-6, 0.05, 0.3, 0.7]))}
    if by_threshold:
        chosen = {
            "select": "threshold",
            "tau": draw(st.sampled_from([-1e6, -0.5, 0.0, 1.0, 1e6])),
            "threshold": draw(st.sampled_from(["diag", "exact"])),
        }
    return Piecewise(
        **chosen,
        band=draw(st.none() | st.integers(0, 2)),
        sink=draw(st.integers(0, video.frames + 1)),
        score=draw(st.sampled_from(["spread", "mean"])),
        centre=centre,
        order=draw(st.sampled_from(["zeroth", "first"])),
        tile="raster" if raster else draw(boxes),
        block_q=block_q,
        block_k=block_k,
    )


class Tested(NamedTuple):
    """How one method is tested.

    Args:
        few: leaves something out on the grids of the tiny models.
        cases: on the videos of conftest.py, for every kernel and rule of the method.
        random: (video) -> a strategy that draws a method for it.
        differentiated: on 2 x 3 x 4 tokens and a text of 3, for finite differences.
        longer: on 6 x 5 x 6 tokens, under the techniques for longer video.
    """

    few: Any
    cases: tuple[Any, ...] = ()
    random: Any = None
    differentiated: tuple[Any, ...] = ()
    longer: Any = None

    def filled(self) -> "Tested":
        return Tested(
            self.few,
            self.cases or (self.few,),
            self.random or (lambda video: st.just(self.few)),
            self.differentiated or (self.few,),
            self.longer or self.few,
        )


_ROWS = {
    "dense": Tested(Dense()),
    "radial": Tested(
        Radial(decay_factor=0.2),  # on so few frames the default keeps every block
        (
            Radial(block=32),
            Radial("balanced", decay_factor=0.1, sink=False, block=16, anchor_every=3),
            Radial(decay_factor=0.5, block=64, tile_frames=2),
            Radial(decay_factor=0.5, sink=False, block=64, anchor_every=2, tile_side=4),
            Radial("paper", block=16),
            Radial("code-2025-06", block=16),
            Radial("code-2025-11", sink=False, block=24),
        ),
        _radials,
        (Radial(decay_factor=0.2, sink=False, block=4),),
        Radial(block=32),
    ),
    "neighborhood": Tested(
        Neighborhood(window=(-1, 3, 4)),
        (
            Neighborhood((-1, 4, 5)),
            Neighborhood((2, 3, 2), stride=(2, 1, 2), dilation=(1, 2, 2)),
            Neighborhood((3, 5, 1), stride=(1, 3, 1), is_causal=(True, False, True)),
        ),
        _neighborhoods,
        (Neighborhood((1, 2, 3), is_causal=(False, True, False)),),
        Neighborhood((2, 3, 3)),
    ),
    "block_mixture": Tested(
        BlockMixture(
            chunks=(3, 4, 6), select="topk", scope="query_head", topk=(1, 2, 2), block=16
        ),
        (
            BlockMixture(partition="3d", chunk_3d=(2, 3, 4), threshold=0.4, block=16),
            BlockMixture(partition="2d", chunk_2d=(3, 4), scope="query_head", block=16),
            BlockMixture(partition="1d", select="topk", scope="overall", topk=(2, 2, 2), block=24),
            BlockMixture(partition="3d", chunks=(2, 4, 8), routing="block", block=8),
        ),
        _block_mixtures,
        (
            BlockMixture(partition="3d", chunk_3d=(1, 2, 3), block=4),
            BlockMixture(partition="2d", chunk_2d=(2, 3), routing="block", block=4),
        ),
        BlockMixture(partition="3d", chunk_3d=(2, 3, 4), block=16),
    ),
    "sparse_linear": Tested(
        SparseLinear(critical=0.2, block_q=16, block_k=16),
        (
            SparseLinear(critical=0.3, block_q=16, block_k=8),
            SparseLinear(critical=0.2, block_q=16, block_k=24, tile="raster"),
        ),
        _sparse_linears,
        tuple(
            SparseLinear(0.3, 0.3, over, features, combine, block_q=4, block_k=4)
            for over, features, combine in (
                ("all", "softmax", "project"),
                ("rest", "elu", "alpha"),
                ("marginal", "softmax", "project"),
            )
        ),
        SparseLinear(critical=0.2, block_q=16, block_k=16, combine="alpha"),
    ),
    "piecewise": Tested(
        Piecewise(critical=0.2, block_q=16, block_k=16),
        (
            Piecewise(critical=0.3, block_q=16, block_k=8),
            Piecewise(0.2, score="mean", centre="key", order="first", tile=(1, 3, 5)),
            Piecewise(
                select="threshold",
                tau=0.5,
                band=0,
                sink=1,
                score="mean",
                centre="key",
                tile="raster",
                block_q=16,
                block_k=24,
            ),
        ),
        _piecewises,
        (
            Piecewise(critical=0.3, block_q=4, block_k=4),
            Piecewise(critical=0.3, centre="key", order="first", block_q=4, block_k=4),
        ),
        # What dampens scores does not go with a rest.
        Piecewise(critical=0.2, rest=None, block_q=16, block_k=16),
    ),
}


_ROWS["profiled"] = Tested(
    Profiled(0.3, block=8),
    (Profiled(0.3, block=16), Profiled(0.5, rest=None, block=8)),
    lambda video: st.builds(
        Profiled,
        st.sampled_from([1e-6, 0.05, 0.3, 0.7, 1.0]),
        rest=st.sampled_from(["means", None]),
        block=st.sampled_from([1, 4, 8, 16, 64]),
    ),
    (Profiled(0.3, block=4),),
    # What dampens scores does not go with a rest.
    Profiled(0.2, rest=None, block=8),
)


def _reuses(video: VideoShape) -> st.SearchStrategy:
    return st.builds(Reuse, _sparse_linears(video) | _block_mixtures(video))


_ROWS["reuse"] = Tested(
    Reuse(_ROWS["sparse_linear"].few),
    (
        Reuse(Piecewise(0.2, block_q=16, block_k=8)),
        Reuse(BlockMixture(partition="3d", chunks=(2, 4, 8), routing="block", block=8)),
    ),
    _reuses,
    (Reuse(SparseLinear(critical=0.3, block_q=4, block_k=4)),),
)

_ROWS["vsa"] = Tested(
    VSA(0.3, (2, 3, 4)),
    (VSA(0.3, (4, 4, 4)), VSA(0.4, (2, 3, 4), "once")),
    lambda video: st.builds(
        VSA,
        st.sampled_from([1e-6, 0.05, 0.3, 0.7, 1.0]),
        sides(4, 8, 8),
        st.sampled_from(["gated", "once"]),
    ),
    (VSA(0.3, (1, 2, 3), "once"),),
    VSA(0.2, (2, 3, 3)),
)

TESTED = {
    name: (_ROWS[name] if name in _ROWS else Tested(small(kind))).filled()
    for name, kind in METHODS.items()
}
CASES = [case for row in TESTED.values() for case in row.cases]

# Sparse ones, small enough for the tiny models, by name and in a list. Without those that keep a
# memory, whose calls in a model depend on those before: see test_reuse.py.
SPARSE = {
    name: row.few
    for name, row in TESTED.items()
    if not row.few.is_dense and not row.few.defines("step_state")
}
FEW_METHODS = list(SPARSE.values())
RADIAL, WINDOW = SPARSE["radial"], SPARSE["neighborhood"]
MIXTURE, LINEAR = SPARSE["block_mixture"], SPARSE["sparse_linear"]
