"""Arguments of the calls of the C++ sources."""

import ctypes
from typing import Any

from torch import Tensor

from gen_accel.kernels.native.bounds import check_lists


class Args(ctypes.Structure):
    """`Args` of attention.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "grad")),
        *((name, ctypes.c_void_p) for name in ("o", "dq", "dk", "dv", "stats", "lse", "of_lse")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("q", "k", "v", "grad")),
        *((name, ctypes.c_void_p) for name in ("slots", "index", "counts", "slack")),
        *((name, ctypes.c_void_p) for name in ("center", "half", "place")),
        *((name, ctypes.c_void_p) for name in ("picks", "group", "gain")),
        *((name, ctypes.c_int64) for name in ("B", "H", "N", "D", "S", "block_q", "block_k")),
        *((name, ctypes.c_int64) for name in ("PB", "PH", "most", "axes", "RB", "RH", "C")),
        *((name, ctypes.c_int64) for name in ("GB", "GH", "wide")),
        ("scale", ctypes.c_float),
    ]


class LinearArgs(ctypes.Structure):
    """`Linear` of linear.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "grad", "o", "dq", "dk", "dv")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("q", "k", "v", "grad")),
        *((name, ctypes.c_void_p) for name in ("slots", "sets", "weight", "bias")),
        *((name, ctypes.c_int64) for name in ("B", "H", "N", "D", "S")),
        *((name, ctypes.c_int64) for name in ("block_q", "block_k", "map")),
        ("eps", ctypes.c_float),
    ]


class RestArgs(ctypes.Structure):
    """`RestArgs` of rest.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "grad", "out", "lse", "of_total")),
        *((name, ctypes.c_void_p) for name in ("o", "total", "dq", "dk", "dv", "dout", "dlse")),
        *((name, ctypes.c_void_p) for name in ("rise", "weight", "drise", "dweight")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("q", "k", "v", "grad")),
        *((name, ctypes.c_void_p) for name in ("slots", "keep")),
        *((name, ctypes.c_int64) for name in ("B", "H", "N", "D", "S", "block_q", "block_k")),
        *((name, ctypes.c_int64) for name in ("PB", "PH", "around_queries")),
        *((name, ctypes.c_float) for name in ("scale", "most")),
        *((name, ctypes.c_void_p) for name in ("slope", "shares", "gained")),
        ("factor", ctypes.c_float),
    ]


class CurveArgs(ctypes.Structure):
    """`Curve` of curve.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("q", "k")),
        *((name, ctypes.c_void_p) for name in ("slots", "of_q", "of_k")),
        *((name, ctypes.c_void_p) for name in ("rise", "weight", "by", "of_rise", "of_weight")),
        *((name, ctypes.c_void_p) for name in ("dq", "dk")),
        *((name, ctypes.c_int64) for name in ("B", "H", "N", "D", "S", "block_q", "block_k")),
        ("factor", ctypes.c_float),
    ]


class SlopeArgs(ctypes.Structure):
    """`Slope` of slope.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "grad")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("q", "k", "v", "grad")),
        *((name, ctypes.c_void_p) for name in ("slots", "shares", "slope")),
        *((name, ctypes.c_void_p) for name in ("dlse", "more", "dq", "dk", "dv")),
        *((name, ctypes.c_int64) for name in ("B", "H", "N", "D", "S", "block_q", "block_k")),
        ("around_queries", ctypes.c_int64),
        ("factor", ctypes.c_float),
    ]


class SpreadArgs(ctypes.Structure):
    """`Spread` of spread.cpp."""

    _fields_ = [
        ("means", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("k_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_void_p) for name in ("slots", "out")),
        *((name, ctypes.c_int64) for name in ("B", "H", "N", "D", "S", "Kq", "block")),
        ("scale", ctypes.c_float),
    ]


class SumsArgs(ctypes.Structure):
    """`Sums` of selection.cpp."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("x_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_void_p) for name in ("slots", "out")),
        *((name, ctypes.c_int64) for name in ("B", "H", "N", "D", "S", "block")),
    ]


class PicksArgs(ctypes.Structure):
    """`Picks` of selection.cpp."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("rows_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_void_p) for name in ("slots", "home", "means", "picks", "touched")),
        ("threshold", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("B", "H", "N", "D", "R", "C")),
        *((name, ctypes.c_int64) for name in ("block", "scope", "topk")),
    ]


class KeptArgs(ctypes.Structure):
    """`Kept` of selection.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keep", "whole", "index", "counts")),
        *((name, ctypes.c_int64) for name in ("rows", "K", "most")),
    ]


class Pointers:
    """Arguments of a call, with the tensors that they point into."""

    def __init__(self, args: ctypes.Structure) -> None:
        self._held: list[Tensor] = []
        self.args: Any = args

    def whole(self, **tensors: Tensor | None) -> None:
        """Set tensors that are read as contiguous memory."""
        for name, x in tensors.items():
            if x is not None:
                self.filled(**{name: x.contiguous()})

    def strided(self, **tensors: Tensor) -> None:
        """Set (B, H, N, D) tensors, read in place where the numbers of a token are contiguous."""
        for name, x in tensors.items():
            x = x if x.stride(3) == 1 else x.contiguous()
            self.filled(**{name: x})
            getattr(self.args, f"{name}_strides")[:] = x.stride()[:3]

    def filled(self, **tensors: Tensor) -> None:
        """Set contiguous tensors as they are: the results that the call writes."""
        for name, x in tensors.items():
            self._held.append(x)
            setattr(self.args, name, x.data_ptr())


class Call(Pointers):
    """Arguments of one call of attention.cpp.

    Args:
        q, k, v: (B, H, N, D).
        rest: as `Lists` names them.

    Raises:
        ValueError: `check_lists` refuses the arguments.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slots: Tensor | None,
        index: Tensor,
        counts: Tensor,
        rule: list[Tensor],
        gain: Tensor | None,
        block_q: int,
        block_k: int,
        scale: float,
    ) -> None:
        super().__init__(Args())
        check_lists(q, slots, index, counts, rule, gain, block_q, block_k)
        args = self.args
        args.B, args.H, args.N, args.D = q.shape
        args.S = len(rule[0])
        args.block_q, args.block_k, args.scale = block_q, block_k, scale
        self.strided(q=q, k=k, v=v)
        slack, *more = rule
        self.whole(slots=slots, slack=slack, gain=gain)
        if len(more) == 2:
            picks, group = more
            self.whole(picks=picks, group=group)
            args.RB, args.RH, _, args.C = picks.shape
        else:
            self.whole(index=index, counts=counts)
            self.whole(**dict(zip(("center", "half", "place"), more, strict=False)))
            args.PB, args.PH, _, args.most = index.shape
            args.axes = len(more[0]) if more else 0
        if gain is not None:
            args.GB, args.GH = gain.shape[:2]
