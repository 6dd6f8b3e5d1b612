"""Numbers of blocks by which methods choose them: sums, means, spreads, masses, picked chunks.

The name of the attention kernel decides what runs, see `dispatch`; `block_mass` is torch alone.
"""

import torch
from torch import Tensor

from gen_accel.kernels.dispatch import native_serves, triton_serves
from gen_accel.kernels.native import rest as native_rest
from gen_accel.kernels.native import selection as native
from gen_accel.plan import Plan, Slots, pack

NUMBERS = 1 << 24  # scores that are held at once


def block_sums(x: Tensor, slots: Slots, block: int, kernel: str = "auto") -> Tensor:
    """Sum x (B, H, N, D) over blocks: (B, H, S / block, D) fp32, padding left out.

    Args:
        block: slots in a block.
    """
    if native_serves(kernel, x):
        return native.block_sums(x, slots.slots, block)
    if (found := _by_triton(x, slots, block, kernel, mean=False)) is not None:
        return found
    tokens = pack(x, slots).unflatten(2, (-1, block))
    if slots.tokens < len(slots.slots):
        tokens = tokens * slots.real.view(-1, block, 1)
    return tokens.sum(3, dtype=torch.float32)


def block_means(x: Tensor, slots: Slots, block: int, kernel: str = "auto") -> Tensor:
    """Average x over the tokens of each block, as `block_sums`; zero where a block holds none."""
    if (found := _by_triton(x, slots, block, kernel, mean=True)) is not None:
        return found
    sums = block_sums(x, slots, block, kernel)
    if slots.tokens == len(slots.slots):
        return sums / block
    return sums / slots.real.view(-1, block, 1).sum(1).clamp_min(1)


@torch.no_grad()
def block_deviations(x: Tensor, slots: Slots, block: int, kernel: str = "auto") -> Tensor:
    """Compute ln sqrt(mean |x_t - x_j|^2) over the tokens t of each block, x_j their mean,
    (B, H, S / block) fp32 or wider, without a gradient. Where tokens are equal up to rounding, it
    is the logarithm of a 1000th of their size.

    Args:
        x: (B, H, N, D).
        block: slots in a block.
    """
    if triton_serves(kernel, x):
        from gen_accel.kernels.triton import launch, pooling  # import triton, which may be missing

        return launch.operate(pooling.block_deviations, x, slots.slots_int32, block)
    mean = block_means(x, slots, block, kernel)
    wide = torch.promote_types(x.dtype, torch.float32)
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square()
    square = block_means(squares, slots, block, "gather")[..., 0]
    apart = (square - mean.square().sum(-1)).maximum(1e-6 * square)
    return apart.clamp_min(torch.finfo(apart.dtype).tiny).log() / 2


def _by_triton(x: Tensor, slots: Slots, block: int, kernel: str, *, mean: bool) -> Tensor | None:
    """Sum or average by Triton, which has no gradient of it; None where it does not run."""
    if not triton_serves(kernel, x) or (x.requires_grad and torch.is_grad_enabled()):
        return None
    from gen_accel.kernels.triton import launch, pooling  # import triton, which may be missing

    return launch.operate(pooling.block_sums, x, slots.slots_int32, block, mean)


@torch.no_grad()
def block_spread(
    query_means: Tensor, k: Tensor, slots: Slots, *, scale: float, kernel: str = "auto"
) -> Tensor:
    """Compute the natural log-sum-exp of scale qmean . k_t over the tokens t of each key block,
    (B, H, Kq, Kk) fp32, without a gradient; -inf where a block holds none.

    Args:
        query_means: (B, H, Kq, D) fp32.
        k: (B, H, N, D).
        slots: layout of tokens in blocks.
    """
    if native_serves(kernel, k):
        return native_rest.spread(query_means, k, slots, scale=scale)
    if triton_serves(kernel, k, k.shape[3]):
        from gen_accel.kernels.triton import rest as by_triton  # imports triton

        return by_triton.spread(query_means, k, slots, scale=scale)
    keys = pack(k, slots).unflatten(2, (-1, slots.block_k))
    real = slots.real.view(-1, slots.block_k)
    B, H, Kq, _ = query_means.shape
    step = max(1, NUMBERS // (B * H * Kq * slots.block_k))
    made = []
    for some in range(0, keys.shape[2], step):
        rows = keys[:, :, some : some + step].flatten(2, 3).float()
        scores = (query_means.float() @ rows.mT * scale).unflatten(3, (-1, slots.block_k))
        hidden = ~real[some : some + step]
        made.append(scores.masked_fill(hidden, -torch.inf).logsumexp(-1))
    return torch.cat(made, 3)


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
    """Pick among C chunks by the products of rows with the chunks' means, in one pass; None where
    no kernel serves these tensors. The method that picks does the same in torch.

    Args:
        scope: "query_head", "head_global", "overall" or "block".

    The other arguments and the results are described in `native.selection.picks`.
    """
    if not native_serves(kernel, rows):
        return None
    number = native.SCOPES.index(scope)
    return native.picks(rows, slots, home, means, block, number, topk, threshold)


def selects(kernel: str, k: Tensor, blocks: int) -> bool:
    """Whether `select` serves calls with keys k, (B, H, N, D), and so many key blocks."""
    if not triton_serves(kernel, k, k.shape[3]):
        return False
    from gen_accel.kernels.triton import selection  # imports triton

    return blocks <= selection.MOST_BLOCKS


def select(
    scores: Tensor,
    added: Tensor | None,
    kinds: Tensor,
    before: Tensor,
    wanted: Tensor | None,
    keep: Tensor,
    index: Tensor,
    counts: Tensor,
    first: int,
    count: int,
) -> None:
    """Run the operator `select` of `triton.selection`, which describes the arguments."""
    from gen_accel.kernels.triton import launch, selection  # import triton, which may be missing

    given = scores, added, kinds, before, wanted, keep, index, counts, first, count
    launch.operate(selection.select, *given)


def cuts_in_place(scores: Tensor, kernel: str = "auto") -> bool:
    """Whether `least_taken` serves scores (B, H, R, C) fp32, in their own memory."""
    return triton_serves(kernel, scores)


def least_taken(keys: Tensor, slack: Tensor, weighted: bool) -> Tensor:
    """Run the operator `least_taken` of `triton.listing` on keys of any strides."""
    from gen_accel.kernels.triton import listing  # imports triton

    return listing.least_taken(keys.contiguous(), slack, weighted)


@torch.no_grad()
def block_mass(q: Tensor, k: Tensor, slots: Plan | Slots, *, scale: float) -> Tensor:
    """Sum the weights of the keys of a block, averaged over the queries of a block.

        mass_ij = mean over t in i of sum over s in j of softmax(scale q_t K^T)_s

    Padding counts neither as query nor as key. A row of blocks sums to 1. Whole rows of scores
    are made for some query blocks at a time, so that their log-sum-exp need not be known before:
    this is one product of q and k, where another dense attention to learn it takes two more.

    Args:
        q, k: (B, H, N, D).
        slots: layout of tokens in blocks; nothing else of a plan is read.

    Returns:
        (B, H, Kq, Kk) in fp32 or wider; 0 for blocks of padding alone.
    """
    B, H = q.shape[:2]
    wide = torch.promote_types(q.dtype, torch.float32)
    block_q, block_k, S = slots.block_q, slots.block_k, len(slots.slots)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = (pack(x, slots).flatten(0, 1) for x in (q, k))  # (B H, S, D)
        queries = queries.unflatten(1, (-1, block_q))
        real_q = slots.real.view(-1, 1, block_q).to(wide)
        share = real_q / real_q.sum(-1, keepdim=True).clamp_min(1)  # (Kq, 1, block_q)
        hidden = torch.zeros(S, dtype=wide, device=q.device)
        hidden = hidden.masked_fill_(~slots.real, -torch.inf)
        mass = q.new_empty(B * H, S // block_q, S // block_k, dtype=wide)
        heads = max(1, NUMBERS // (S * S))
        blocks = max(1, NUMBERS // (heads * block_q * S))
        for i in range(0, B * H, heads):
            some_k = keys[i : i + heads].to(wide)
            for j in range(0, S // block_q, blocks):
                some_q = queries[i : i + heads, j : j + blocks].flatten(1, 2).to(wide) * scale
                weights = torch.baddbmm(hidden, some_q, some_k.mT).softmax(-1)
                rows = share[j : j + blocks] @ weights.unflatten(1, (-1, block_q))
                found = rows.view(*rows.shape[:2], -1, block_k).sum(-1)
                mass[i : i + heads, j : j + blocks] = found
        return mass.unflatten(0, (B, H))


def heaviest(mass: Tensor, counts: Tensor, always: Tensor) -> Tensor:
    """Mask of the `counts` blocks with the greatest mass in each row, (B, H, Kq, Kk) bool.

    Args:
        mass: (B, H, Kq, Kk).
        counts: (B or 1, H or 1, Kq) int64, including the blocks that are always kept.
        always: (Kq, Kk) bool, blocks that are always kept.
    """
    ranked = mass.masked_fill(always, torch.inf).sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(mass.shape[-1], device=mass.device)
    taken = (ranks < counts[..., None]).expand(mass.shape)
    return torch.zeros_like(taken).scatter_(-1, ranked.indices, taken) | always
