"""Hostile arguments of the operators in C++: good ones of any size, and up to three changed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from support.native_ops import CASES, Sizes
from torch import Tensor

TYPES = [
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "int64",
    "int32",
    "bool",
    "uint8",
    "complex64",
]
WHOLE = (-1, 0, 1, 2, 3, 7, 48, 10**6, 2**31, 2**40, 2**62, 2**63 - 1, -5, -(2**31), -(2**63))
REAL = ("nan", "inf", "-inf", "0", "-1", "1e38", "-1e38", "1e-45", "1e8", "1e308")
LAYOUTS = ("turned", "apart", "offset", "expanded", "reversed", "sparse", "grad")
SHAPES = ("longer", "shorter", "empty", "more", "fewer", "alone")
MOST_WORK = 3e7  # products of numbers in one call, at most


@dataclass(frozen=True)
class Case:
    """A call.

    Args:
        name: a key of `CASES`.
        changes: arguments, of a list as "rule 0", and what they become: see `changed`.
    """

    name: str
    sizes: Sizes
    changes: tuple[tuple[str, Any], ...] = ()
    threads: int = 1

    def arguments(self) -> dict[str, Any]:
        given = CASES[self.name][1](self.sizes)
        for argument, how in self.changes:
            name, _, place = argument.partition(" ")
            if not place:
                given[name] = changed(given[name], how)
            elif int(place) < len(given[name]):
                given[name][int(place)] = changed(given[name][int(place)], how)
        return given

    def __call__(self) -> Any:
        return CASES[self.name][0](**self.arguments())


def changed(x: Any, how: Any) -> Any:
    """`x` as `how` says: of a tensor a word and what belongs to it, of anything else the value."""
    if isinstance(x, list):
        return {"none": [], "more": [*x, x[-1]] if x else [], "fewer": x[:-1]}[how]
    if not isinstance(x, Tensor):
        return float(how) if isinstance(how, str) and not isinstance(x, str) else how
    word, *rest = how.split()
    match word:
        case "none":
            return None
        case "type":
            return x.to(getattr(torch, rest[0]))
        case "put" | "fill":
            return _with(x, word, *rest)
    if word in SHAPES:
        return _of_other_shape(x, word, int(rest[0]))
    return _laid_out(x, word)


def _with(x: Tensor, word: str, value: str, place: str = "0") -> Tensor:
    """Its numbers, or one of them, in the place of what they are; of bool the bytes."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    flat = x.view(torch.uint8).flatten() if x.dtype == torch.bool else x.flatten()
    if not flat.numel():
        return x
    number = float(value)
    if not x.is_floating_point():
        about = torch.iinfo(flat.dtype)
        whole = int(value) if value.lstrip("-").isdigit() else 0
        number = min(max(whole, about.min), about.max)
    flat[slice(None) if word == "fill" else int(place) % flat.numel()] = number
    return flat.view(x.dtype).view(x.shape)


def _of_other_shape(x: Tensor, word: str, axis: int) -> Tensor:
    if word == "more":
        return x[None]
    if word == "alone":
        return x.flatten()[0] if x.numel() else x.new_zeros(())
    if not x.ndim or not x.shape[axis % x.ndim]:
        return x
    axis %= x.ndim
    if word == "fewer":
        return x.select(axis, 0)
    if word == "longer":
        return torch.cat((x, x.narrow(axis, 0, 1)), axis)
    return x.narrow(axis, 0, x.shape[axis] - 1 if word == "shorter" else 0)


def _laid_out(x: Tensor, word: str) -> Tensor:
    """The same numbers somewhere else, but where they are expanded or nowhere."""
    match word:
        case "turned" if x.ndim > 1:
            return x.mT.contiguous().mT
        case "apart" if x.ndim:
            return torch.stack((x, x), -1)[..., 0]
        case "offset":
            moved = torch.cat((x.new_zeros(1), x.flatten()))
            return moved[1:].view(x.shape)
        case "expanded" if x.ndim and x.shape[0]:
            return x[:1].expand(x.shape)
        case "reversed" if x.ndim > 1:
            return (
                x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
            )
        case "sparse":
            return x.to_sparse()
        case "grad" if x.is_floating_point():
            return x.requires_grad_()
    return x


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    """Blocks that divide into each other and blocks that do not, shorter and longer than what is
    worked on at once; now and then no sample or head at all."""
    unit = draw(st.sampled_from((1, 2, 3, 5, 8, 16, 33, 64, 160)))
    q, k = (draw(st.sampled_from((1, 1, 2, 3, 4, 7))) for _ in range(2))
    both = unit * math.lcm(q, k)
    S = both * draw(st.integers(1, max(1, min(6, 2000 // both))))
    few = st.sampled_from((1, 1, 2, 3) * 8 + (0,))
    B, H = draw(few), draw(few)
    widths = [
        x
        for x in (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 64, 72, 128, 160)
        if B * H * S * S * x <= MOST_WORK or x == 1
    ]
    return Sizes(
        B=B,
        H=H,
        N=max(1, S - draw(st.sampled_from((0, 0, 0, 1, 7, unit, S)))),
        D=draw(st.sampled_from(widths)),
        S=S,
        block_q=unit * q,
        block_k=unit * k,
        C=draw(st.sampled_from((1, 2, 5, 16, 17, 40))),
        most=draw(st.sampled_from((0, 1, 3, 10**6))),
        axes=draw(st.integers(0, 3)),
        dtype=draw(st.sampled_from(("float32", "bfloat16", "float16"))),
        seed=draw(st.integers(0, 255)),
    )


@st.composite
def cases(draw: st.DrawFn, names: Sequence[str]) -> Case:
    """Of these operators; a quarter of the calls good."""
    name, size = draw(st.sampled_from(names)), draw(sizes())
    given, changes = CASES[name][1](size), []
    for argument in draw(st.lists(st.sampled_from([*given]), max_size=3, unique=True)):
        x = given[argument]
        if isinstance(x, list) and x and draw(st.integers(0, 3)):
            place = draw(st.integers(0, len(x) - 1))
            changes.append((f"{argument} {place}", draw(hows(x[place]))))
        else:
            changes.append((argument, draw(hows(x))))
    return Case(name, size, tuple(changes), draw(st.sampled_from((1, 2, 3))))


def hows(x: Any) -> st.SearchStrategy[Any]:
    """What `changed` can make of an argument."""
    match x:
        case list():
            return st.sampled_from(("none", "more", "fewer"))
        case bool() | None:
            return st.sampled_from((True, False) if x is not None else (None,))
        case int():
            return st.sampled_from(WHOLE)
        case float():
            return st.sampled_from(REAL)
        case str():
            return st.sampled_from(("spread", "loss", "pooled", "mean", ""))
    axis, place = st.integers(0, 4), st.integers(0, 10**4)
    values = st.sampled_from(REAL if x.is_floating_point() else [*map(str, WHOLE)])
    return st.one_of(
        st.builds("put {} {}".format, values, place),
        st.builds("fill {}".format, values),
        st.builds("{} {}".format, st.sampled_from(SHAPES), axis),
        st.sampled_from(LAYOUTS),
        st.builds("type {}".format, st.sampled_from(TYPES)),
        st.just("none"),
    )
