"""xformers' block-diagonal attention on the CPU, in plain torch.

As documented of `ops.fmha.attn_bias.BlockDiagonalMask` and of the log-sum-exp that
`memory_efficient_attention_forward_requires_grad` returns, natural, in the two forms that
`AttentionFwOpBase.VARLEN_LSE_PACKED` tells apart (xformers 0.0.33).
"""

from types import SimpleNamespace

import torch

PADDED = 3  # more entries than the queries need, as operators round lengths up


class BlockDiagonalMask:
    """Runs of queries, each of which sees its own run of keys."""

    def __init__(self, queries, keys):
        self.q_seqinfo, self.k_seqinfo = (
            SimpleNamespace(seqstart_py=[0, *torch.tensor(lengths).cumsum(0).tolist()])
            for lengths in (queries, keys)
        )

    @classmethod
    def from_seqlens(cls, queries, keys=None, *, device=None):
        return cls(queries, queries if keys is None else keys)

    def materialize(self, shape, dtype=torch.float32):
        mask = torch.full(shape, -torch.inf, dtype=dtype)
        starts = self.q_seqinfo.seqstart_py, self.k_seqinfo.seqstart_py
        for i in range(len(starts[0]) - 1):
            mask[starts[0][i] : starts[0][i + 1], starts[1][i] : starts[1][i + 1]] = 0
        return mask


def library(is_packed):
    """Stand-in for `gen_accel.kernels.xformers._fmha()`, with one operator."""
    operator = SimpleNamespace(VARLEN_LSE_PACKED=is_packed)

    def attend(query, key, value, *, attn_bias, scale, op):
        assert op is operator
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        wide = torch.promote_types(q.dtype, torch.float32)
        mask = attn_bias.materialize((q.shape[2], k.shape[2]), dtype=wide)
        scores = scale * q.to(wide) @ k.to(wide).mT + mask
        out = (scores.softmax(-1) @ v.to(wide)).to(q.dtype).transpose(1, 2)
        lse = scores.logsumexp(-1)  # (1, H, T)
        if is_packed:
            return out, lse
        starts = attn_bias.q_seqinfo.seqstart_py
        lengths = torch.tensor(starts).diff().tolist()
        apart = lse.new_full((len(lengths), lse.shape[1], max(lengths) + PADDED), torch.nan)
        for row, length, start in zip(apart, lengths, starts, strict=False):
            row[:, :length] = lse[0, :, start : start + length]
        return out, apart

    return SimpleNamespace(
        attn_bias=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask),
        memory_efficient_attention_forward_requires_grad=attend,
        operators=(operator, None),
    )
