"""What each operator in C++ can be called with: good arguments of any size."""

import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gen_accel.kernels import native
from gen_accel.kernels.native.selection import kept_blocks

for _module in pkgutil.iter_modules(native.__path__, f"{native.__name__}."):
    import_module(_module.name)  # which registers its operators

OPS = torch.ops.gen_accel
LONG = torch.int64


@dataclass(frozen=True)
class Sizes:
    """Letters as in plan.py.

    Args:
        N: tokens; S - N slots hold none.
        C: groups, or chunks.
        most: key blocks of a query block, at most.
        axes: of a window.
        dtype: of q, k, v and what has their type.
        seed: of all that is drawn. Its bits choose besides: tensors for each sample and each head
            or for all, and which of the arguments that may be missing are there.
    """

    B: int = 2
    H: int = 3
    N: int = 60
    D: int = 16
    S: int = 64
    block_q: int = 16
    block_k: int = 8
    C: int = 5
    most: int = 3
    axes: int = 3
    dtype: str = "float32"
    seed: int = 0

    @property
    def Kq(self) -> int:
        return self.S // self.block_q

    @property
    def Kk(self) -> int:
        return self.S // self.block_k

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.B, self.H, self.N

    @property
    def patterns(self) -> tuple[int, int]:
        return self.B if self.seed & 1 else 1, self.H if self.seed & 2 else 1

    def draw(self, *shape: int, most: float = 1.0) -> Tensor:
        """Numbers from 0 to `most`, fp32."""
        g = torch.Generator().manual_seed(self.seed + math.prod(shape))
        return torch.rand(shape, generator=g) * most

    def true(self, *shape: int) -> Tensor:
        return self.draw(*shape) < 0.6

    def below(self, most: int, *shape: int) -> Tensor:
        """Whole numbers from 0 up to, but not including, `most`."""
        return self.draw(*shape, most=max(most, 1) - 1e-3).long()

    def rows(self) -> Tensor:
        return self.draw(*self.tokens, self.D).to(getattr(torch, self.dtype))

    def slots(self) -> Tensor:
        g = torch.Generator().manual_seed(self.seed)
        held = torch.full((self.S,), -1)
        # Padding at the end, or anywhere.
        places = torch.randperm(self.S, generator=g) if self.seed & 4 else torch.arange(self.S)
        held[places[: self.N]] = torch.randperm(self.N, generator=g)
        return held

    def slots_or_none(self) -> Tensor | None:
        return None if self.seed & 8 and self.N == self.S else self.slots()

    def blocks(self) -> dict[str, int]:
        return {"block_q": self.block_q, "block_k": self.block_k}


Made = dict[str, Any]


def qkv(s: Sizes) -> Made:
    return {name: s.rows() for name in "qkv"}


def lists(s: Sizes, **more: Any) -> Made:
    """The first query block has as many key blocks as there is room for."""
    most = min(s.most, s.Kk)
    index = s.draw(*s.patterns, s.Kq, s.Kk).argsort(-1)[..., :most].int()
    total = s.below(most + 1, *s.patterns, s.Kq)
    total.view(-1)[:1] = most
    counts = torch.stack((total, total // 2))
    given = {"slots": s.slots_or_none(), "index": index, "counts": counts}
    given |= {"rule": [s.draw(s.S)], "gain": None, **s.blocks(), "scale": 0.3}
    return given | more


def windows(s: Sizes) -> Made:
    gain = None if s.seed & 16 else s.draw(*s.patterns, s.Kq, s.Kk)
    return lists(s, rule=[s.draw(s.S), *(s.draw(s.axes, s.S) for _ in range(3))], gain=gain)


def routed(s: Sizes) -> Made:
    none = torch.zeros(0, dtype=LONG)
    rule = [s.draw(s.S), s.true(*s.patterns, s.S, s.C), s.below(s.C, s.Kk)]
    return lists(s, index=none, counts=none, rule=rule)


def backward(s: Sizes, of: Callable[[Sizes], Made] = lists) -> Made:
    out = s.rows().float() if s.seed & 32 else s.rows()
    of_lse = None if s.seed & 64 else s.draw(*s.tokens)
    given = {"grad": s.rows(), "of_lse": of_lse, **qkv(s), "out": out}
    return given | {"stats": s.draw(2, *s.tokens)} | of(s)


def rest(s: Sizes) -> Made:
    bend = not s.seed & 32
    given = {"out": s.draw(*s.tokens, s.D), "lse": s.draw(*s.tokens), **qkv(s)}
    given |= {"rise": s.draw(*s.tokens) if bend else None}
    given |= {"weight": s.draw(s.B, s.H, s.D) if bend else None}
    given |= {"slots": s.slots_or_none(), "keep": s.true(*s.patterns, s.Kq, s.Kk), **s.blocks()}
    factor = 0.0 if s.seed & 16 else 0.1
    return given | {"around_queries": not s.seed & 64, "factor": factor, "scale": 0.3}


def one_pass(s: Sizes) -> Made:
    order = s.seed // 16 % 3
    counts = [s.draw(s.Kq).round(), s.draw(s.Kk).round()] if order > 1 else [None, None]
    given = {**qkv(s), "keep": s.true(*s.patterns, s.Kq, s.Kk), "of_q": counts[0]}
    given |= {"of_k": counts[1], "slots": s.slots_or_none(), **s.blocks(), "order": order}
    given |= {"ranked": None, "counts": None, "score": "spread", "scale": 0.3}
    return given | {"attends": True, "by_bytes": bool(s.seed & 32)}


def choosing(s: Sizes) -> Made:
    given = one_pass(s) | {"keep": s.true(1, 1, s.Kq, s.Kk), "ranked": s.true(s.Kk)}
    score = ("spread", "loss", "pooled")[s.seed % 3]
    counts = s.below(s.Kk + 1, s.H)
    return given | {"counts": counts, "score": score, "attends": not s.seed & 128}


def shares(s: Sizes) -> Made:
    given = one_pass(s)
    kept = ("q", "k", "of_q", "of_k", "slots", "block_q", "block_k", "order", "scale")
    return {name: given[name] for name in kept} | {"count": s.S}


def rest_backward(s: Sizes) -> Made:
    given = {"grad": s.rows(), "of_total": s.draw(*s.tokens)}
    given |= {"joint": s.rows(), "total": s.draw(*s.tokens)}
    return given | {"slope": s.draw(s.B, s.H, s.D, s.D), "shares": s.draw(*s.tokens)} | rest(s)


def curve(s: Sizes) -> Made:
    given = {"q": s.rows(), "k": s.rows(), "of_q": s.draw(s.B, s.H, s.Kq)}
    given |= {"of_k": s.draw(s.B, s.H, s.Kk), "slots": s.slots_or_none(), "count": s.S}
    return given | s.blocks() | {"scale": 0.3}


def curve_backward(s: Sizes) -> Made:
    given = {x: s.draw(s.B, s.H, s.D) for x in ("of_weight", "weight", "by")}
    return {"of_rise": s.draw(*s.tokens)} | given | curve(s)


def linear(s: Sizes) -> Made:
    sets = None if s.seed & 16 else s.true(s.B, s.H, s.Kq, s.Kk)
    sizes = {**s.blocks(), "feature_map": s.seed // 32 % 3, "eps": 1e-6}
    return {**qkv(s), "slots": s.slots(), "sets": sets, **sizes}


def linear_added(s: Sizes) -> Made:
    return linear(s) | {"weight": s.draw(s.D, s.D), "bias": s.draw(s.D), "base": s.rows()}


def spread(s: Sizes) -> Made:
    given = {"query_means": s.draw(s.B, s.H, s.Kq, s.D), "k": s.rows()}
    return given | {"slots": s.slots_or_none(), "count": s.S, "block": s.block_k, "scale": 0.3}


def sums(s: Sizes) -> Made:
    return {"x": s.rows(), "slots": s.slots(), "block": s.block_k}


def picks(s: Sizes) -> Made:
    given = {"rows": s.rows(), "slots": s.slots(), "home": s.below(s.C + (s.seed & 1), s.S)}
    given |= {"means": s.draw(s.B, s.H, s.C, s.D), "block": s.block_k, "scope": s.seed // 2 % 4}
    best = 0 if s.seed & 8 else min(2, s.C)
    return given | {"topk": best, "threshold": 0.0 if best else 0.5}


def kept(s: Sizes) -> Made:
    shape = (*s.patterns, s.Kq, s.Kk)
    return {"keep": s.true(*shape), "whole": s.true(*shape)}


def wide(make: Callable[[Sizes], Made]) -> Callable[[Sizes], Made]:
    return lambda s: qkv(s) | make(s) | {"wide": bool(s.seed & 32)}


CASES: Mapping[str, tuple[Callable[..., Any], Callable[[Sizes], Made]]] = {
    "attention": (OPS.native_attention, wide(lists)),
    "windows": (OPS.native_attention, wide(windows)),
    "routed": (OPS.native_attention, wide(routed)),
    "backward": (OPS.native_attention_backward, backward),
    "windows backward": (OPS.native_attention_backward, lambda s: backward(s, windows)),
    "routed backward": (OPS.native_attention_backward, lambda s: backward(s, routed)),
    "int8": (OPS.native_int8, wide(lists)),
    "int8 windows": (OPS.native_int8, wide(windows)),
    "int8 routed": (OPS.native_int8, wide(routed)),
    "rest": (OPS.native_rest, rest),
    "one pass": (OPS.native_one_pass, one_pass),
    "choosing": (OPS.native_one_pass, choosing),
    "shares": (OPS.native_shares, shares),
    "rest backward": (OPS.native_rest_backward, rest_backward),
    "curve": (OPS.native_curve, curve),
    "curve backward": (OPS.native_curve_backward, curve_backward),
    "linear": (OPS.native_linear, linear),
    "linear backward": (OPS.native_linear_backward, lambda s: {"grad": s.rows(), **linear(s)}),
    "linear added": (OPS.native_add_projected_linear, linear_added),
    "spread": (OPS.native_spread, spread),
    "sums": (OPS.native_block_sums, sums),
    "picks": (OPS.native_picks, picks),
    "kept": (kept_blocks, kept),
}


def operators() -> set[str]:
    """Names of all that are registered."""
    known = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1] for name in known if name.startswith("gen_accel::native_")}
