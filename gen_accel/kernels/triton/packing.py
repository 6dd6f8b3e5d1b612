"""Operands in slot order, for the kernels that load tiles by tensor descriptor: whether copying
them pays, and the copies."""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gen_accel.kernels.triton import configs
from gen_accel.kernels.triton.launch import launch, rows
from gen_accel.kernels.triton.tiles import LOG2E, load_rows, of_head

TILE = 64  # slots that a program copies; not timed
ALIGNED = 16  # bytes, for the start and for each stride of a descriptor


class PackingRates(NamedTuple):
    """Numbers of a card by which the choice is made.

    Args:
        multiprocessors, clock: their number, and their cycles a second under load.
        bandwidth: bytes a second from and to memory, four fifths of the data sheet.
        saved: for "forward" and "backward", instructions that a warp saves for each key of its
            16 rows: by compile_matrix, the least over rules and blocks of 64 and of 128 at head
            dim 128.
    """

    multiprocessors: int
    clock: float
    bandwidth: float
    saved: dict[str, float]


# H100 and B200 by NVIDIA's data sheets; other cards of their families are closer to them than to
# the point where the choice turns.
CARDS = {
    "sm_90": PackingRates(132, 1.7e9, 0.8 * 3.35e12, {"forward": 2.0, "backward": 6.4}),
    "sm_100": PackingRates(148, 1.85e9, 0.8 * 8.0e12, {"forward": 1.8, "backward": 3.0}),
}
ISSUED = 4  # instructions of different warps in a cycle of a multiprocessor
WARP_ROWS = 16  # rows of a tile that a warp holds
START = 5e-6  # seconds until a further kernel runs and the next one follows

# Slots of a head, in tensors of q's size, that are read and written for packing alone: keys and
# values; in the backward pass queries too, and their gradients, which are read anyway.
TRAFFIC = {"forward": 4, "backward": 7}


def seconds_saved(direction: str, arch: str) -> float:
    """Seconds that packing saves for each pair of a query and a key: `saved / 16` instructions of
    a warp; a card issues four in each cycle of each multiprocessor."""
    card = CARDS[arch]
    rate = ISSUED * card.multiprocessors * card.clock
    return card.saved[direction] / WARP_ROWS / rate


def even_queries(direction: str, arch: str, D: int, size: int) -> float:
    """Number of queries that must read each key until packing has saved what it costs, which is
    `D size TRAFFIC` bytes moved for a slot.

    On an H100 some 2,700 at head dim 128 forward: a plan of N tokens pays from the density
    2,700 / N on, which is 0.08 at 33k tokens.
    """
    moved = D * size * TRAFFIC[direction] / CARDS[arch].bandwidth
    return moved / seconds_saved(direction, arch)


def pays(
    direction: str, arch: str, heads: int, S: int, D: int, size: int, pairs: int, ready: bool
) -> bool:
    """Whether packing costs less than it saves, in seconds by a model of the card.

    Args:
        direction: "forward" or "backward".
        heads: heads of all samples.
        size: bytes of a number.
        pairs: upper bound on the pairs of slots that one head computes.
        ready: whether the operands are in slot order already, and need no copy.
    """
    if arch not in CARDS:
        return False
    gained = pairs - S * even_queries(direction, arch, D, size)
    return ready or heads * gained * seconds_saved(direction, arch) > START


def in_place(x: Tensor) -> bool:
    """Whether a descriptor can read (B, H, N, D) in place; its last stride is 1."""
    starts = x.data_ptr() % ALIGNED == 0
    return starts and all(
        step > 0 and step * x.element_size() % ALIGNED == 0 for step in x.stride()[:3]
    )


def described(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe tiles of `rows` rows of one head of (B, H, S, D)."""
    block = [1, 1, rows, configs.padded_dim(x.shape[3])]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


@triton.jit
def _store_slots(packed, i_head, o_s, b_x, S, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store rows of slots o_s of one head in a contiguous (heads, S, D)."""
    o_d = tl.arange(0, BLOCK_D)
    p_x = packed + (i_head.to(tl.int64) * S + o_s)[:, None] * D + o_d[None, :]
    tl.store(p_x, b_x, mask=(o_s < S)[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=("H", "S"))
def pack_kernel(
    x,
    y,
    packed_x,
    packed_y,
    slots,
    H,
    S,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Copy two tensors into slot order, padding as zeros."""
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    o_s = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_t = tl.load(slots + o_s, mask=o_s < S, other=-1)
    b_x = load_rows(of_head(x, i_b, i_h), o_t, D, BLOCK_D, True)
    _store_slots(packed_x, tl.program_id(1), o_s, b_x, S, D, BLOCK_D)
    b_y = load_rows(of_head(y, i_b, i_h), o_t, D, BLOCK_D, True)
    _store_slots(packed_y, tl.program_id(1), o_s, b_y, S, D, BLOCK_D)


@triton.jit(do_not_specialize=("H", "N", "S"))
def pack_queries_kernel(
    q,
    out,
    grad,
    lse,
    grad_lse,
    packed_q,
    packed_grad,
    base2,
    delta,
    slots,
    H,
    N,
    S,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    COPY: tl.constexpr,
):
    """Copy queries and gradients of outputs into slot order if COPY, and write two statistics of
    each row: its base-2 log-sum-exp, and delta as in `sparse_backward`. They are +inf and 0 where
    a row sees nothing or is padding, which makes its weights zero."""
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    i_head = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_t = tl.load(slots + o_s, mask=o_s < S, other=-1)
    b_out = load_rows(of_head(out, i_b, i_h), o_t, D, BLOCK_D, True)
    b_grad = load_rows(of_head(grad, i_b, i_h), o_t, D, BLOCK_D, True)
    o_row = i_head * N + o_t
    b_lse = tl.load(lse + o_row, mask=o_t >= 0, other=-float("inf"))
    m_seen = b_lse != -float("inf")
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    b_delta -= tl.load(grad_lse + o_row, mask=o_t >= 0, other=0.0)
    o_row = i_head * S + o_s
    tl.store(base2 + o_row, tl.where(m_seen, b_lse * LOG2E, float("inf")), mask=o_s < S)
    # The gradient at the -inf of a row that sees nothing is ignored.
    tl.store(delta + o_row, tl.where(m_seen, b_delta, 0.0), mask=o_s < S)
    if COPY:
        _store_slots(packed_grad, i_head, o_s, b_grad, S, D, BLOCK_D)
        b_q = load_rows(of_head(q, i_b, i_h), o_t, D, BLOCK_D, True)
        _store_slots(packed_q, i_head, o_s, b_q, S, D, BLOCK_D)


def _programs(slots: Tensor, x: Tensor) -> tuple[int, int]:
    return triton.cdiv(slots.numel(), TILE), x.shape[0] * x.shape[1]


def pack(x: Tensor, y: Tensor, slots: Tensor, raster: bool) -> tuple[Tensor, Tensor]:
    """Copy two tensors (B, H, N, D) into slot order, (B, H, S, D); no copy if they are in it."""
    if raster and in_place(x) and in_place(y):
        return x, y
    B, H, _, D = x.shape
    made = x.new_empty(2, B, H, slots.numel(), D).unbind()
    launch(
        pack_kernel,
        _programs(slots, x),
        x,
        *(*rows(x, y), *made, slots, H, slots.numel()),
        **configs.dims(D),
        TILE=TILE,
    )
    return made[0], made[1]


def pack_queries(
    q: Tensor,
    out: Tensor,
    grad: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    slots: Tensor,
    raster: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack queries and gradients as by `pack`, with two statistics of their rows, (B, H, S)
    fp32."""
    B, H, N, D = q.shape
    S = slots.numel()
    copy = not (raster and in_place(q) and in_place(grad))
    packed = q.new_empty(2, B, H, S, D).unbind() if copy else (q, grad)
    base2, delta = lse.new_empty(2, B, H, S).unbind()
    launch(
        pack_queries_kernel,
        _programs(slots, q),
        q,
        *rows(q, out, grad),
        *(lse, grad_lse.contiguous(), *packed, base2, delta, slots, H, N, S),
        **configs.dims(D),
        TILE=TILE,
        COPY=copy,
    )
    return packed[0], packed[1], base2, delta
