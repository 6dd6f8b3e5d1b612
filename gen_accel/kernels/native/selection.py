"""Key blocks that a query sees, chosen in C++: see selection.cpp."""

import torch
from torch import Tensor

from gen_accel.kernels.native.arguments import NativeCall, blocks_of, shape_of

SCOPES = ("query_head", "head_global", "overall", "block")


@torch.library.custom_op("gen_accel::native_block_sums", mutates_args=())
def block_sums(x: Tensor, slots: Tensor, block: int) -> Tensor:
    """Sum x (B, H, N, D) over blocks: (B, H, S / block, D) fp32. slots: (S,), the token of
    each slot."""
    call = NativeCall("sums", block=block)
    B, H, _, D = call.rows(x=x)
    (S,) = shape_of("slots", slots, 1)
    call.slots(slots, S, optional=False)
    out = x.new_empty(B, H, blocks_of(S, block, block)[1], D, dtype=torch.float32)
    call.writes(out=out)
    call.run("block_sums")
    return out


@block_sums.register_fake
def _(x: Tensor, slots: Tensor, block: int) -> Tensor:
    B, H, _, D = x.shape
    return x.new_empty(B, H, len(slots) // block, D, dtype=torch.float32)


def kept_blocks(keep: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Make `kernels.lists.kept_blocks` of `keep` and `whole` of a plan, (B', H', Kq, Kk) bool,
    with an index in int32."""
    *many, K = shape_of("keep", keep, 4)
    if not K:
        raise ValueError(f"keep must have key blocks, got {tuple(keep.shape)}")
    call = NativeCall("kept", rows=keep.numel() // K, K=K)
    call.read("keep", keep, torch.bool, keep.shape)
    call.read("whole", whole, torch.bool, keep.shape)
    counts = keep.new_empty(2, *many, dtype=torch.int64)
    call.writes(counts=counts)
    call.run("kept")
    most = max(int(counts[0].max()), 1) if counts.numel() else 1
    index = keep.new_empty(*many, most, dtype=torch.int32)
    call.args.most = most
    call.writes(index=index)
    call.run("kept")
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
    call = NativeCall("picks", block=block, scope=scope, topk=topk, threshold=threshold)
    B, H, _, D = call.rows(rows=rows)
    (R,), C = shape_of("slots", slots, 1), shape_of("means", means, 4)[2]
    call.args.R, call.args.C = R, C
    call.read("slots", slots, torch.int64, (R,))
    call.read("home", home, torch.int64, (R,))
    call.read("means", means, torch.float32, (B, H, C, D))
    picked = rows.new_empty(B, H, R, C + 1, dtype=torch.bool)
    Kq = blocks_of(R, block, block)[0]
    touched = rows.new_empty(B, H, Kq, C + 1, dtype=torch.bool)
    call.writes(picks=picked, touched=touched)
    call.run("picks")
    return picked, touched


@picks.register_fake
def _(
    rows: Tensor, slots: Tensor, home: Tensor, means: Tensor, block: int, *given: object
) -> tuple[Tensor, Tensor]:
    B, H = rows.shape[:2]
    R, C = len(slots), means.shape[2] + 1
    picked = rows.new_empty(B, H, R, C, dtype=torch.bool)
    return picked, rows.new_empty(B, H, R // block, C, dtype=torch.bool)
