"""Formats of goldens, and how far a result may be from one."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from support.checks import budget, largest_error
from torch import Tensor

from gen_accel.kernels import native

Arrays = Mapping[str, np.ndarray]

# Those that run everywhere at once. FlexAttention would be compiled for every case.
KERNELS = ("reference", "gather", *(["native"] if native.build.library() is not None else []))


# Products of fp32 add up in an order that differs from processor to processor: a reference on a
# Xeon with AVX-512 erred 2.2 times as much as goldens from a machine without it.
ACROSS = 3.0


@dataclass(frozen=True)
class Deviation:
    """Deviation of one result from what it has to be."""

    what: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget  # False for NaN

    def __str__(self) -> str:
        return f"{self.what} {self.error:.2g} (budget {self.budget:.2g})"


@dataclass(frozen=True)
class Format:
    """One kind of golden.

    Args:
        method: what the line printed for a file calls it.
        keys: those every case has.
        arrays: the names of the arrays of a case.
        check: yields how far each result of one case deviates.
    """

    method: str
    keys: frozenset[str]
    arrays: Callable[[dict], Sequence[str]]
    check: Callable[[dict, Arrays], Iterator[Deviation]]


def by_id(*letters: str) -> Callable[[dict], Sequence[str]]:
    """The names of arrays that are letters before the case's id."""
    return lambda case: [f"{letter}{case['id']}" for letter in letters]


def bits(packed: np.ndarray, shape: Sequence[int]) -> Tensor:
    """The bool tensor of a shape that `numpy.packbits` packed."""
    count = math.prod(shape)
    if packed.shape != (-(-count // 8),):
        raise ValueError(
            f"{count} bits of {tuple(shape)} must be packed, got {packed.shape} bytes"
        )
    return torch.from_numpy(np.unpackbits(packed, count=count).astype(bool)).view(*shape)


def wrong_blocks(keep: Tensor, want: Tensor) -> Deviation:
    """Blocks of two masks that differ, of which none may."""
    wrong = (keep.expand(want.shape) != want).sum().item()
    return Deviation("wrong blocks", wrong, 0)


def both_sides(
    results: Mapping[str, Tensor], golden: Tensor, exact: Tensor, of: str = ""
) -> Iterator[Deviation]:
    """Errors of each kernel and of the golden against `exact`, ours in fp64.

    Both sides are held to it, each with one spacing of floats to spare. A kernel may err twice as
    much as the golden or as our fp32 reference, and the golden twice as much as that reference. So
    a golden that answers another question fails, instead of setting itself a large budget. The
    reference may err `ACROSS` times as much as the golden, which comes from another machine.
    """
    reference = results["reference"]
    for kernel, result in results.items():
        most = budget(golden, exact, ACROSS if kernel == "reference" else 2.0)
        if kernel != "reference":
            most = max(most, budget(reference, exact))
        yield Deviation(f"error of {kernel}{of}", largest_error(result, exact), most)
    error = largest_error(golden, exact)
    yield Deviation(f"error of the golden{of}", error, budget(reference, exact))
