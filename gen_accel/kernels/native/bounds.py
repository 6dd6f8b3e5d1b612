"""What the library takes for granted of tensors, by whose sizes it reads and writes memory.

Each operator checks here that tensors are of the sizes and types that its code counts on. The
numbers in them that point into other tensors, slots, blocks and groups, are checked in C++ where
they are read. So no argument of an operator reads or writes elsewhere, nor leaves a result unset.
"""

import torch
from torch import Tensor

# Types of q, k and v, by their numbers in C++.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Sizes = tuple[int | tuple[int, int], ...]


def check_alike(kernel: str, *tensors: Tensor) -> None:
    """q, k, v and what has their shape: the library reads sizes off the first alone."""
    first = tensors[0]
    about = first.shape, first.dtype, first.device
    if any((x.shape, x.dtype, x.device) != about for x in tensors):
        words = ", ".join(f"{tuple(x.shape)} {x.dtype} {x.device}" for x in tensors)
        raise ValueError(f"kernel {kernel!r}: q, k and v must be alike, got {words}")
    check_rows(kernel, first)


def check_rows(kernel: str, x: Tensor) -> None:
    """Rows of tokens, (B, H, N, D), of a type that the library reads."""
    if not x.is_cpu:
        raise ValueError(f"kernel {kernel!r} is for the CPU, got {x.device.type}")
    if x.ndim != 4 or not x.shape[3] or x.dtype not in DTYPES:
        raise ValueError(
            f"kernel {kernel!r} takes (B, H, N, D) of {names()}, got {tuple(x.shape)} {x.dtype}"
        )


def names() -> str:
    """Of the types."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def check(name: str, x: Tensor | None, dtype: torch.dtype, sizes: Sizes) -> None:
    """Whether a tensor that may be missing is of this type and these sizes, of which each is one
    number or one of two."""
    if x is None or (x.shape == sizes and x.dtype == dtype and x.is_cpu):
        return
    fits = len(x.shape) == len(sizes) and all(
        have in want if isinstance(want, tuple) else have == want
        for have, want in zip(x.shape, sizes, strict=True)
    )
    if not fits or x.dtype != dtype or x.device.type != "cpu":
        wanted = ", ".join(
            " or ".join(map(str, want)) if isinstance(want, tuple) else str(want) for want in sizes
        )
        raise ValueError(
            f"{name} must be ({wanted}) {dtype} on the CPU, got {tuple(x.shape)} {x.dtype} on "
            f"{x.device}"
        )


def blocks_of(slots: int, block_q: int, block_k: int) -> tuple[int, int]:
    """Kq and Kk. Raises ValueError for blocks that do not divide the slots."""
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 1 or slots < 1 or slots % block:
            raise ValueError(f"{name} must divide the {slots} slots, got {block}")
    return slots // block_q, slots // block_k


def check_slots(slots: Tensor | None, count: int) -> None:
    check("slots", slots, torch.int64, (count,))


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
    """What attention.cpp and int8.cpp take of a plan, as `Lists` names it."""
    (B, H, _, _), S, wide = q.shape, rule[0].numel(), torch.float32
    Kq, Kk = blocks_of(S, block_q, block_k)
    patterns = (1, B), (1, H)
    check_slots(slots, S)
    slack, *more = rule
    check("slack", slack, wide, (S,))
    check("gain", gain, wide, (*patterns, Kq, Kk))
    if len(more) == 2:
        picks, group = more
        check("picks", picks, torch.bool, (*patterns, S, picks.shape[-1]))
        check("group", group, torch.int64, (Kk,))
        return
    if len(more) not in (0, 3):
        raise ValueError(f"a rule has 1, 3 or 4 tensors, got {len(rule)}")
    for name, x in zip(("center", "half", "place"), more, strict=False):
        check(name, x, wide, (more[0].shape[0], S))
    check("index", index, torch.int32, (*patterns, Kq, index.shape[-1]))
    check("counts", counts, torch.int64, (2, *index.shape[:2], Kq))
