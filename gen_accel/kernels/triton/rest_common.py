"""Common key of a head, which is subtracted from stored pooled keys; prefixes of names as in
`tiles`.

A key c that is added to all keys of a head adds scale q_t . c to all scores of query t, kept and
pooled, and changes no weight. In 16 bits it costs digits of the differences of pooled keys. So
pooled keys are stored off c, and scale q_t . c is subtracted from the log-sum-exp of the kept keys
before columns continue it: both are exact for any c. The nearer c is to the keys, the better; it
need not be their mean.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.launch import launch
from gen_accel.kernels.triton.tiles import load_rows

SOME = 64  # keys whose mean is c
WARPS = 4


@triton.jit
def common_key(common, i_head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load c of a head, [BLOCK_D] fp32; zeros past D."""
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(common + i_head * D + o_d, mask=o_d < D, other=0.0)


@triton.jit
def common_scores(b_q, b_common, scale):
    """Compute the scores of queries for c."""
    return scale * tl.sum(b_q.to(tl.float32) * b_common[None, :], 1)


@triton.jit(do_not_specialize=("H", "N"))
def common_kernel(
    k,
    common,
    stride_kb,
    stride_kh,
    stride_kn,
    H,
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOME: tl.constexpr,
):
    """Write the mean of SOME keys of one head, spread over its tokens."""
    i_head = tl.program_id(0).to(tl.int64)
    k += i_head // H * stride_kb + i_head % H * stride_kh
    o_t = tl.arange(0, SOME).to(tl.int64) * N // SOME
    b_k = load_rows(k, stride_kn, o_t, D, BLOCK_D, False).to(tl.float32)
    o_d = tl.arange(0, BLOCK_D)
    tl.store(common + i_head * D + o_d, tl.sum(b_k, 0) / SOME, mask=o_d < D)


def common_of(k: Tensor) -> Tensor:
    """Compute c of each head, (B, H, D) fp32, from keys (B, H, N, D), rows of one stride."""
    B, H, N, D = k.shape
    made = k.new_empty(B, H, D, dtype=torch.float32)
    launch(
        common_kernel,
        (B * H, 1),
        k,
        *(k, made),
        *k.stride()[:3],
        *(H, N),
        D=D,
        BLOCK_D=configs.padded_dim(D),
        SOME=SOME,
        num_warps=WARPS,
    )
    return made
