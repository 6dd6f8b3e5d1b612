"""Key blocks that a query sees, chosen in C++: see selection.cpp."""

import torch
from torch import Tensor

from gen_accel.kernels.native import build
from gen_accel.kernels.native.arguments import KeptArgs, PicksArgs, Pointers, SumsArgs
from gen_accel.kernels.native.bounds import DTYPES, blocks_of, check, check_rows, shape_of

SCOPES = ("query_head", "head_global", "overall", "block")


@torch.library.custom_op("gen_accel::native_block_sums", mutates_args=())
def block_sums(x: Tensor, slots: Tensor, block: int) -> Tensor:
    """Sum x (B, H, N, D) over blocks: (B, H, S / block, D) fp32. slots: (S,), the token of
    each slot."""
    check_rows("native", x)
    (B, H, N, D), (S,) = x.shape, shape_of("slots", slots, 1)
    check("slots", slots, torch.int64, (S,))
    K = blocks_of(S, block, block)[1]
    out = x.new_empty(B, H, K, D, dtype=torch.float32)
    call = Pointers(SumsArgs(B=B, H=H, N=N, D=D, S=S, block=block))
    call.strided(x=x)
    call.whole(slots=slots)
    call.filled(out=out)
    build.run("gen_accel_block_sums", call.args, DTYPES[x.dtype])
    return out


@block_sums.register_fake
def _(x: Tensor, slots: Tensor, block: int) -> Tensor:
    B, H, _, D = x.shape
    return x.new_empty(B, H, len(slots) // block, D, dtype=torch.float32)


def kept_blocks(keep: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Make `kernels.lists.kept_blocks` of `keep` and `whole` of a plan, (B', H', Kq, Kk) bool,
    with an index in int32."""
    *many, K = shape_of("keep", keep, 4)
    check("keep", keep, torch.bool, keep.shape)
    check("whole", whole, torch.bool, keep.shape)
    if not K:
        raise ValueError(f"keep must have key blocks, got {tuple(keep.shape)}")
    counts = keep.new_empty(2, *many, dtype=torch.int64)
    call = Pointers(KeptArgs(rows=keep.numel() // K, K=K))
    call.whole(keep=keep, whole=whole)
    call.filled(counts=counts)
    build.run("gen_accel_kept", call.args)
    most = max(int(counts[0].max()), 1) if counts.numel() else 1
    index = keep.new_empty(*many, most, dtype=torch.int32)
    call.args.most = most
    call.filled(index=index)
    build.run("gen_accel_kept", call.args)
    return index, counts


@torch.library.custom_op("gen_accel::native_picks", mutates_args=())
def picks(
    rows: Tensor,
    slots: Tensor,
    home: Tensor,
    means: Tensor,
    block: int,
    scope: int,
    topk: int,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Pick among C chunks by the products of rows with the chunks' means.

    Args:
        rows: (B, H, N, D), queries or their means.
        slots: (R,), the row of each slot; -1 for padding, which picks nothing.
        home: (R,), the own chunk of each slot; C or more for text, which picks all.
        means: (B, H, C, D) fp32.
        block: slots of a block.
        scope: index in `SCOPES`.
        topk: 0 where `threshold` decides.

    Returns:
        (B, H, R, C + 1) bool, the last for the text, which all pick; and (B, H, R / block, C + 1),
        the picks of any row of a block.
    """
    check_rows("native", rows)
    B, H, N, D = rows.shape
    (R,), C = shape_of("slots", slots, 1), shape_of("means", means, 4)[2]
    Kq = blocks_of(R, block, block)[0]
    check("slots", slots, torch.int64, (R,))
    check("home", home, torch.int64, (R,))
    check("means", means, torch.float32, (B, H, C, D))
    picked = rows.new_empty(B, H, R, C + 1, dtype=torch.bool)
    touched = rows.new_empty(B, H, Kq, C + 1, dtype=torch.bool)
    args = PicksArgs(B=B, H=H, N=N, D=D, R=R, C=C, block=block, scope=scope, topk=topk)
    args.threshold = threshold
    call = Pointers(args)
    call.strided(rows=rows)
    call.whole(slots=slots, home=home, means=means)
    call.filled(picks=picked, touched=touched)
    build.run("gen_accel_picks", call.args, DTYPES[rows.dtype])
    return picked, touched


@picks.register_fake
def _(
    rows: Tensor,
    slots: Tensor,
    home: Tensor,
    means: Tensor,
    block: int,
    scope: int,
    topk: int,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    B, H = rows.shape[:2]
    R, C = len(slots), means.shape[2] + 1
    picked = rows.new_empty(B, H, R, C, dtype=torch.bool)
    return picked, rows.new_empty(B, H, R // block, C, dtype=torch.bool)
