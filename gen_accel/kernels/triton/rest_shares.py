"""Gradients of the kept keys' output in the joint softmax; prefixes of names as in `tiles`."""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from gen_accel.kernels.triton.rest_common import common_key, common_scores
from gen_accel.kernels.triton.tiles import LOG2E, load_rows, store_rows


@triton.jit(do_not_specialize=("H", "N"))
def shares_kernel(
    q,
    common,
    grad,
    kept,
    joint,
    dkept,
    lse,
    joint_lse,
    grad_lse,
    dlse,
    delta,
    of_rest,
    low_lse,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_ob,
    stride_oh,
    stride_on,
    stride_jb,
    stride_jh,
    stride_jn,
    stride_db,
    stride_dh,
    stride_dn,
    H,
    N,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the gradients of the kept keys' output and log-sum-exp, by their share in the softmax,
    and delta of the joint output as in `sparse_backward`. For the rest, write the sum of the
    gradients of its scores, and the joint log-sum-exp without the score of the common key."""
    i_head = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    o_n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_t = tl.where(o_n < N, o_n, -1)
    b_grad = load_rows(grad + i_b * stride_gb + i_h * stride_gh, stride_gn, o_t, D, BLOCK_D, True)
    b_kept = load_rows(kept + i_b * stride_ob + i_h * stride_oh, stride_on, o_t, D, BLOCK_D, True)
    b_joint = load_rows(
        joint + i_b * stride_jb + i_h * stride_jh, stride_jn, o_t, D, BLOCK_D, True
    )
    o_row = i_head * N + o_n
    b_lse = tl.load(lse + o_row, mask=o_n < N, other=0.0)
    b_total = tl.load(joint_lse + o_row, mask=o_n < N, other=0.0)
    b_given = tl.load(grad_lse + o_row, mask=o_n < N, other=0.0)
    b_grad = b_grad.to(tl.float32)
    # The gradient at the -inf of a row that sees nothing is ignored.
    b_delta = tl.where(b_total == -float("inf"), 0.0, tl.sum(b_grad * b_joint, 1) - b_given)
    tl.store(delta + o_row, b_delta, mask=o_n < N)
    m_alone = b_lse == b_total
    b_share = tl.where(m_alone, 1.0, tl.exp2((b_lse - b_total) * LOG2E))
    b_dlse = b_share * (tl.sum(b_grad * b_kept.to(tl.float32), 1) - b_delta)
    tl.store(dlse + o_row, tl.where(m_alone, b_given, b_dlse), mask=o_n < N)
    tl.store(of_rest + o_row, tl.where(m_alone, 0.0, b_given - b_dlse), mask=o_n < N)
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, stride_qn, o_t, D, BLOCK_D, True)
    b_less = common_scores(b_q, common_key(common, i_head, D, BLOCK_D), scale)
    tl.store(low_lse + o_row, b_total - b_less, mask=o_n < N)
    dkept += i_b * stride_db + i_h * stride_dh
    store_rows(dkept, stride_dn, o_t, b_share[:, None] * b_grad, D, BLOCK_D)
