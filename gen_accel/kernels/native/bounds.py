"""Checks of tensor sizes and types, by which the library reads and writes memory.

Each operator checks here that tensors have the sizes and types that its code assumes. Numbers
in them that point into other tensors (slots, blocks and groups) are checked in C++ where they
are read. So no argument of an operator reads or writes elsewhere, nor leaves a result unset.
"""

from typing import TypeGuard

import torch
from torch import Tensor

# Types of q, k and v, by their numbers in C++.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Sizes = tuple[int | tuple[int, int], ...]


def check_alike(kernel: str, *tensors: Tensor) -> None:
    """Check that tensors have q's shape and dtype: the library reads sizes off the first alone."""
    for x in tensors:
        check_rows(kernel, x)
    first = tensors[0]
    if any((x.shape, x.dtype) != (first.shape, first.dtype) for x in tensors):
        words = ", ".join(map(_told, tensors))
        raise ValueError(f"kernel {kernel!r}: q, k and v must be alike, got {words}")


def check_rows(kernel: str, x: Tensor | None) -> None:
    """Check for rows of tokens, (B, H, N, D), of a type that the library reads."""
    if _is_read(x) and x.ndim == 4 and x.shape[2] and x.shape[3] and x.dtype in DTYPES:
        return
    raise ValueError(
        f"kernel {kernel!r} takes dense (B, H, N, D) of {names()} on the CPU, got {_told(x)}"
    )


def _is_read(x: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a tensor has numbers in host memory. Operators get None for a missing tensor,
    whatever their signatures say."""
    return x is not None and x.is_cpu and x.layout is torch.strided


def _told(x: Tensor | None) -> str:
    if x is None:
        return "None"
    layout = "" if x.layout is torch.strided else f" {x.layout}"
    return f"{tuple(x.shape)} {x.dtype} on {x.device}{layout}"


def names() -> str:
    """Names of the types."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def check(name: str, x: Tensor | None, dtype: torch.dtype | None, sizes: Sizes) -> None:
    """Check a tensor's type, None for any, and its sizes, each of which is one number or a choice
    of two."""
    if _is_read(x) and dtype in (x.dtype, None) and _fits(x.shape, sizes):
        return
    wanted = ", ".join(
        " or ".join(map(str, want)) if isinstance(want, tuple) else str(want) for want in sizes
    )
    kind = "" if dtype is None else f" {dtype}"
    raise ValueError(f"{name} must be dense ({wanted}){kind} on the CPU, got {_told(x)}")


def _fits(shape: torch.Size, sizes: Sizes) -> bool:
    if shape == sizes:
        return True
    return len(shape) == len(sizes) and all(
        have in want if isinstance(want, tuple) else have == want
        for have, want in zip(shape, sizes, strict=True)
    )


def check_if_given(name: str, x: Tensor | None, dtype: torch.dtype | None, sizes: Sizes) -> None:
    if x is not None:
        check(name, x, dtype, sizes)


def shape_of(name: str, x: Tensor | None, axes: int) -> torch.Size:
    """Return the shape of a tensor. Raises ValueError for another number of axes."""
    if x is None or x.ndim != axes:
        raise ValueError(f"{name} must be a tensor of {axes} axes, got {_told(x)}")
    return x.shape


def blocks_of(slots: int, block_q: int, block_k: int) -> tuple[int, int]:
    """Compute Kq and Kk. Raises ValueError for blocks that do not divide the slots."""
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 1 or slots < 1 or slots % block:
            raise ValueError(f"{name} must divide the {slots} slots, got {block}")
    return slots // block_q, slots // block_k


def check_slots(slots: Tensor | None, count: int, tokens: int) -> None:
    """Check slots, which may be missing if each holds the token of its own number."""
    check_if_given("slots", slots, torch.int64, (count,))
    if slots is None and count != tokens:
        raise ValueError(f"slots must be given where {count} of them hold {tokens} tokens")


def check_lists(
    q: Tensor,
    slots: Tensor | None,
    index: Tensor,
    counts: Tensor,
    rule: list[Tensor],
    gain: Tensor | None,
    block_q: int,
    block_k: int,
) -> None:
    """Check a plan's arguments of attention.cpp and int8.cpp, as `Lists` names them."""
    if len(rule) not in (1, 3, 4):
        raise ValueError(f"a rule has 1, 3 or 4 tensors, got {len(rule)}")
    (slack, *more), wide = rule, torch.float32
    (B, H, N, _), (S,) = q.shape, shape_of("slack", slack, 1)
    Kq, Kk = blocks_of(S, block_q, block_k)
    patterns = (1, B), (1, H)
    check_slots(slots, S, N)
    check("slack", slack, wide, (S,))
    check_if_given("gain", gain, wide, (*patterns, Kq, Kk))
    if len(more) == 2:
        picks, group = more
        C = shape_of("picks", picks, 4)[-1]
        check("picks", picks, torch.bool, (*patterns, S, C))
        if not C:  # an empty tensor would count as missing
            raise ValueError(f"picks must be of one group or more, got {tuple(picks.shape)}")
        check("group", group, torch.int64, (Kk,))
        return
    for name, x in zip(("center", "half", "place"), more, strict=False):
        check(name, x, wide, (shape_of("center", more[0], 2)[0], S))
    most = shape_of("index", index, 4)[-1]
    check("index", index, torch.int32, (*patterns, Kq, most))
    check("counts", counts, torch.int64, (2, *index.shape[:2], Kq))
