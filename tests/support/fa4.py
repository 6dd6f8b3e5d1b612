"""FlashAttention-4 on the CPU: what it documents of its block lists, in plain torch.

The forward pass reads `block_sparse_tensors` alone, and the backward pass nothing of the pairs but
`block_sparse_tensors_bwd`, as the real one does. What the real one asserts of shapes and dtypes is
asserted here (flash-attn-4 4.0.0b36, `block_sparsity.normalize_block_sparse_config`).
"""

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gen_accel.kernels.fa4 import RULES, Library, Mask, _mask_mod


class BlockSparse(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


def library(calls: list | None = None) -> Library:
    """What `fa4._library` returns, on the CPU.

    Args:
        calls: gets the keywords of each call.
    """

    def attend(q, k, v, **options):
        if calls is not None:
            calls.append(options)
        lse_wanted = options.pop("return_lse")
        out, lse = _Attention.apply(q, k, v, options)
        return out, lse if lse_wanted else None

    return Library(attend, BlockSparse, twin)


def compile_all(block_q: int, block_k: int, dim: int, backward: bool = True) -> None:
    """Compile the real kernels with each mask, without a GPU, and print each.

    For the card of the environment's FLASH_ATTENTION_ARCH, which is read once a process.
    """
    real = import_module("flash_attn.cute.interface")
    sparse = import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    B, S, H = 2, 12 * 128, 2
    Kq, Kk, blocks = S // block_q, S // block_k, (block_q, block_k)

    def whole(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device="cuda")

    def lists(rows: int, columns: int) -> Any:
        masked = whole(1, 1, rows), whole(1, 1, rows, 1)
        return sparse(*masked, whole(B, H, rows), whole(B, H, rows, columns), block_size=blocks)

    aux = {"padding": 1, "route": 1, "short windows": 4, "long windows": 8}
    own = block_q // 2, block_k // 2
    masks = [None, *map(Mask, RULES), *(Mask(name, own) for name in ("padding", "route"))]
    for one in masks:
        name = one and one.rule
        with FakeTensorMode():
            q, k, v, grad = torch.empty(4, B, S, H, dim, dtype=torch.bfloat16, device="cuda")
            mask = {"mask_mod": None, "aux_tensors": None}
            if one is not None:
                mask = {"mask_mod": _mask_mod(one), "aux_tensors": [whole(S)] * aux[name]}
            if name == "route":
                picks = torch.empty(1, 1, S, 4, dtype=torch.uint8, device="cuda")
                mask["aux_tensors"].append(picks.expand(B, H, -1, -1))
            if one is not None and one.blocks:
                kept = torch.empty(1, 1, 2 * Kq, 2 * Kk, dtype=torch.int8, device="cuda")
                mask["aux_tensors"].insert(0, kept.expand(B, H, -1, -1))
            given = {"block_sparse_tensors": lists(Kq, Kk), "return_lse": True, **mask}
            out, lse, *_ = real._flash_attn_fwd(q, k, v, softmax_scale=0.3, **given)
            if backward:
                given = {"block_sparse_tensors": lists(Kk, Kq), "dlse": lse, **mask}
                real._flash_attn_bwd(q, k, v, out, grad, lse, 0.3, False, 0.0, **given)
        print(one, flush=True)


def twin(mask: Mask):
    """A mask on tensors that broadcast."""
    bits, seen = mask.bits()
    return lambda b, h, query, key, aux: bits(aux, b, h, query, key) == seen


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, options):
        assert q.shape == k.shape == v.shape
        assert len({x.dtype for x in (q, k, v)}) == 1
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        scores, pairs = _scores(q, k, options, "block_sparse_tensors")
        lse = scores.masked_fill(~pairs, -torch.inf).logsumexp(-1)
        weights = (scores - lse[..., None]).exp().masked_fill(~pairs, 0.0)
        out = (weights @ v.to(weights.dtype).transpose(1, 2)).transpose(1, 2).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out.contiguous(), lse

    @staticmethod
    def backward(ctx: Any, grad, grad_lse):
        q, k, v, out, lse = ctx.saved_tensors
        scores, pairs = _scores(q, k, ctx.options, "block_sparse_tensors_bwd")
        scale = ctx.options["softmax_scale"]
        weights = (scores - lse[..., None]).exp().masked_fill(~pairs, 0.0)
        wide = [x.to(weights.dtype).transpose(1, 2) for x in (q, k, v, out, grad)]
        wide_q, wide_k, wide_v, wide_out, wide_grad = wide
        delta = (wide_out * wide_grad).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse
        of_scores = weights * (wide_grad @ wide_v.mT - delta[..., None]) * scale
        grads = of_scores @ wide_k, of_scores.mT @ wide_q, weights.mT @ wide_grad
        return *(x.transpose(1, 2).to(q.dtype) for x in grads), None


def _scores(q, k, options, which):
    """(B, H, S, S): products, and which of them are seen by the lists."""
    B, S, H, _ = q.shape
    lists, aux = options[which], options["aux_tensors"]
    is_backward = which.endswith("bwd")
    blocks = [S // size for size in lists.block_size]
    assert all(S % size == 0 for size in lists.block_size)
    if is_backward:
        blocks.reverse()
    masked = _tiles(lists.mask_block_cnt, lists.mask_block_idx, B, H, *blocks)
    whole = _tiles(lists.full_block_cnt, lists.full_block_idx, B, H, *blocks)
    assert not (masked & whole).any()
    if is_backward:
        masked, whole = masked.mT, whole.mT
    masked, whole = (
        x.repeat_interleave(lists.block_size[0], 2).repeat_interleave(lists.block_size[1], 3)
        for x in (masked, whole)
    )
    pairs = whole | masked
    if options["mask_mod"] is not None:
        for x in aux:
            assert x.dtype in (torch.int32, torch.uint8, torch.int8)
            unit = [n for n, step in zip(x.shape, x.stride(), strict=True) if step == 1]
            assert len(unit) == 1, "CuTe finds no leading dimension"
        b, h, s = torch.arange(B), torch.arange(H), torch.arange(S)
        where = b[:, None, None, None], h[:, None, None], s[:, None], s
        pairs = whole | (masked & options["mask_mod"](*where, aux))
    else:
        assert not aux
    wide = torch.promote_types(q.dtype, torch.float32)
    products = q.transpose(1, 2).to(wide) @ k.transpose(1, 2).to(wide).mT
    return products * options["softmax_scale"], pairs


def _tiles(count, index, B, H, rows, columns):
    """(B, H, rows, columns) bool, from counts and lists of which only the counted part is read."""
    assert count.dtype == index.dtype == torch.int32
    assert index.stride(-1) == 1
    assert count.shape[0] in (1, B)
    assert count.shape[1] in (1, H)
    assert count.shape == index.shape[:3]
    assert count.shape[2] == rows
    assert 1 <= index.shape[3] <= columns
    unused = torch.arange(index.shape[3]) >= count[..., None]
    assert (index.masked_fill(unused, columns).diff(dim=-1) >= 0).all()
    index = index.long().masked_fill(unused, columns)
    tiles = torch.zeros(*index.shape[:3], columns + 1, dtype=torch.bool)
    tiles.scatter_(-1, index, True)
    assert torch.equal(tiles[..., :-1].sum(-1).int(), count)
    return tiles[..., :-1].expand(B, H, -1, -1)
