"""Calls of the functions of the library, whose arguments are checked as they are set.

Each operator checks here that tensors have the sizes and types that its code assumes. Numbers
in them that point into other tensors (slots, blocks and groups) are checked in C++ where they
are read. So no argument of an operator reads or writes elsewhere, nor leaves a result unset.
"""

from typing import Any

import torch
from torch import Tensor

from gen_accel.kernels.native import build

# Types of q, k and v, by their numbers in C++.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Each is one number, or a choice of two.
Sizes = tuple[int | tuple[int, int], ...]


class NativeCall:
    """Call of the library: its arguments, with the tensors that they point into.

    Operators get None for a missing tensor, whatever their signatures say.

    Args:
        kind: one of `build.KINDS`.
        kernel: its name, for errors.
        numbers: arguments by name.
    """

    def __init__(self, kind: str, kernel: str = "native", **numbers: float) -> None:
        self.args: Any = build.KINDS[kind](**numbers)
        self.kernel = kernel
        self._dtype: torch.dtype | None = None  # of the rows
        self._held: list[Tensor] = []

    def run(self, name: str, *more: int) -> None:
        """Call `gen_accel_` + `name` for tokens of the dtype of `rows`, if any were set; raises
        what `build.run` does."""
        typed = [] if self._dtype is None else [DTYPES[self._dtype]]
        build.run(f"gen_accel_{name}", self.args, *typed, *more, kernel=self.kernel)

    def rows(self, **tensors: Tensor | None) -> torch.Size:
        """Set rows of tokens, (B, H, N, D), alike in shape and dtype, and return the shape. They
        are read in place if the numbers of a token are contiguous."""
        args, first = self.args, None
        for x in tensors.values():
            if x is None or not x.is_cpu or x.layout is not torch.strided or x.ndim != 4:
                raise ValueError(self._takes(x))
            if not (x.shape[2] and x.shape[3]) or x.dtype not in DTYPES:
                raise ValueError(self._takes(x))
        for name, x in tensors.items():
            assert x is not None
            first = x if first is None else first
            if x.shape != first.shape or x.dtype != first.dtype:
                words = ", ".join(map(_told, tensors.values()))
                raise ValueError(f"kernel {self.kernel!r}: q, k and v must be alike, got {words}")
            x = x if x.stride(3) == 1 else x.contiguous()
            self._held.append(x)
            setattr(args, name, x.data_ptr())
            getattr(args, f"{name}_strides")[:] = x.stride()[:3]
        assert first is not None
        self._dtype = first.dtype
        args.B, args.H, args.N, args.D = first.shape
        return first.shape

    def grad(self, grad: Tensor, like: Tensor) -> None:
        """Set the gradient of an output of the shape of `like`, cast to its dtype."""
        check("grad", grad, None, like.shape)
        self.rows(grad=grad.to(like.dtype))

    def slots(self, slots: Tensor | None, count: int, *, optional: bool = True) -> None:
        """Set the slots, (count,) int64, after the rows of tokens.

        Args:
            optional: whether None stands for slots that hold the tokens of their own numbers.
        """
        self.args.S = count
        self.read(
            "slots", slots, torch.int64, (count,), optional=optional and count == self.args.N
        )

    def read(
        self,
        name: str,
        x: Tensor | None,
        dtype: torch.dtype | None,
        sizes: Sizes,
        *,
        optional: bool = False,
    ) -> None:
        """Check a tensor as `check` does, and set it, to be read as contiguous memory.

        Args:
            optional: whether it may be missing.
        """
        if x is None and optional:
            return
        # Most tensors fit at the first look; the second knows choices, and names the fault.
        if (
            x is None
            or x.shape != sizes
            or x.dtype != dtype
            or not x.is_cpu
            or x.layout is not torch.strided
        ):
            check(name, x, dtype, sizes)
        assert x is not None
        x = x.contiguous()
        self._held.append(x)
        setattr(self.args, name, x.data_ptr())

    def writes(self, **tensors: Tensor) -> None:
        """Set contiguous tensors as they are: the results that the call writes."""
        for name, x in tensors.items():
            self._held.append(x)
            setattr(self.args, name, x.data_ptr())

    def lists(
        self,
        slots: Tensor | None,
        index: Tensor,
        counts: Tensor,
        rule: list[Tensor],
        gain: Tensor | None,
        block_q: int,
        block_k: int,
    ) -> None:
        """Set the lists of kept blocks of attention.cpp and int8.cpp, after the rows of tokens;
        the arguments are as `native.Lists` names them."""
        if len(rule) not in (1, 3, 4):
            raise ValueError(f"a rule has 1, 3 or 4 tensors, got {len(rule)}")
        (slack, *more), args, wide = rule, self.args, torch.float32
        (S,) = shape_of("slack", slack, 1)
        Kq, Kk = blocks_of(S, block_q, block_k)
        args.S, args.block_q, args.block_k = S, block_q, block_k
        self.read("slots", slots, torch.int64, (S,), optional=S == args.N)
        patterns = (1, args.B), (1, args.H)
        self.read("slack", slack, wide, (S,))
        if gain is not None:
            self.read("gain", gain, wide, (*patterns, Kq, Kk))
            args.GB, args.GH = gain.shape[:2]
        if len(more) == 2:
            picks, group = more
            args.RB, args.RH, _, C = shape_of("picks", picks, 4)
            self.read("picks", picks, torch.bool, (*patterns, S, C))
            if not C:  # an empty tensor would count as missing
                shape = tuple(picks.shape)
                raise ValueError(f"picks must be of one group or more, got {shape}")
            self.read("group", group, torch.int64, (Kk,))
            args.C = C
            return
        for name, x in zip(("center", "half", "place"), more, strict=False):
            self.read(name, x, wide, (shape_of("center", more[0], 2)[0], S))
        args.axes = len(more[0]) if more else 0
        args.PB, args.PH, _, args.most = shape_of("index", index, 4)
        self.read("index", index, torch.int32, (*patterns, Kq, args.most))
        self.read("counts", counts, torch.int64, (2, args.PB, args.PH, Kq))

    def _takes(self, x: Tensor | None) -> str:
        return (
            f"kernel {self.kernel!r} takes dense (B, H, N, D) of {names()} on the CPU, got "
            f"{_told(x)}"
        )


def check(name: str, x: Tensor | None, dtype: torch.dtype | None, sizes: Sizes) -> None:
    """Raise ValueError for a tensor of another type, None for any, of other sizes, or without
    numbers in host memory."""
    is_read = x is not None and x.is_cpu and x.layout is torch.strided
    if x is not None and is_read and dtype in (x.dtype, None) and x.ndim == len(sizes):
        for have, want in zip(x.shape, sizes, strict=True):
            if have not in want if isinstance(want, tuple) else have != want:
                break
        else:
            return
    wanted = ", ".join(
        " or ".join(map(str, want)) if isinstance(want, tuple) else str(want) for want in sizes
    )
    kind = "" if dtype is None else f" {dtype}"
    raise ValueError(f"{name} must be dense ({wanted}){kind} on the CPU, got {_told(x)}")


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


def names() -> str:
    """Names of the types of q, k and v."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def _told(x: Tensor | None) -> str:
    if x is None:
        return "None"
    layout = "" if x.layout is torch.strided else f" {x.layout}"
    return f"{tuple(x.shape)} {x.dtype} on {x.device}{layout}"
