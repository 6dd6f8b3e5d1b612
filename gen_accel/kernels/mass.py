"""Mass of dense attention by blocks, for methods that choose blocks after seeing it.

Torch alone, on any device.
"""

import torch
from torch import Tensor

from gen_accel.plan import Plan, Slots, pack

NUMBERS = 1 << 24  # scores that are held at once


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
