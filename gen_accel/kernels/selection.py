"""Chunks that queries pick, in one pass; the method that picks does the same in torch."""

from torch import Tensor

from gen_accel.kernels.helpers import native_serves, triton_serves
from gen_accel.kernels.native import selection as native


def picks(
    rows: Tensor,
    slots: Tensor,
    home: Tensor,
    means: Tensor,
    block: int,
    *,
    scope: str,
    topk: int,
    threshold: float,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor] | None:
    """Pick among C chunks by the products of rows with the chunks' means; None where no kernel
    serves these tensors.

    Args:
        rows: (B, H, N, D), queries or their means.
        slots: (R,), the row of each slot; -1 for padding, which picks nothing.
        home: (R,), the own chunk of each slot; C or more for text, which picks all.
        means: (B, H, C, D) fp32.
        block: slots of a block.
        scope: "query_head", "head_global", "overall" or "block".
        topk: 0 where `threshold` decides.
        kernel: name of the attention kernel, which decides what runs here: see `helpers`.

    Returns:
        (B, H, R, C + 1) bool, the last for the text, which all pick; and (B, H, R / block, C + 1),
        the picks of any row of a block.
    """
    if not native_serves(kernel, rows):
        return None
    number = native.SCOPES.index(scope)
    return native.picks(rows, slots, home, means, block, number, topk, threshold)


def cuts_in_place(scores: Tensor, kernel: str = "auto") -> bool:
    """Whether `least_taken` serves scores (B, H, R, C) fp32, in their own memory."""
    return triton_serves(kernel, scores)


def least_taken(keys: Tensor, slack: Tensor, weighted: bool) -> Tensor:
    """Greatest key below which at most `slack` of the mass lies; a number above all keys where the
    total mass is no more than that.

    Args:
        keys: (..., n) int32. With `weighted`, the bits of fp32 numbers that are not negative, and
            their whole parts are the masses; else each key counts 1.
        slack: (...) int64, not negative.

    Returns:
        (...) int64.
    """
    from gen_accel.kernels.triton import bins  # imports triton

    return bins.least_taken(keys.contiguous(), slack, weighted)
