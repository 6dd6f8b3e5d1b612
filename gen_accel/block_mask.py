"""FlexAttention's `BlockMask` as plans, which any kernel runs without compilation.

Compiled FlexAttention computes whole blocks without a rule and asks the mask function in the
others; uncompiled, it asks the mask function alone and makes the matrix of all scores. Here the
lists of blocks are read as the compiled one reads them, and the mask function is asked once, in
the blocks that it cuts. What it keeps there becomes, whatever is found first,

    windows     each query sees one run of keys: causal, sliding, prefix and packed documents; or
                a box of the grid of frames, rows and columns that the runs of a query betray
    classes     tokens that see alike and are seen alike share blocks: causal by chunk, by frame
    neither     each query block attends to its own keys, under its part of the mask

Letters as in `gen_accel.plan`; Nq and Nk are the tokens of queries and of keys, P pairs of blocks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask, noop_mask
from torch.utils.checkpoint import checkpoint

from gen_accel import kernels
from gen_accel.plan import Plan, Windows

PAIRS = 1 << 22  # token pairs that the mask function is asked for at once
CLASSES = 2048  # most kinds of tokens that are told apart
BLOCKS = 128, 64, 32, 16  # of tokens that see alike, by falling size
WASTE = 0.25  # padding, as a share of the tokens, for which a larger block is taken


class Part(NamedTuple):
    """One pattern of a mask.

    Args:
        rows: samples x heads that have it, counted sample by sample; () for all.
        plan: over max(Nq, Nk) tokens; None for a pattern that no plan holds.
        pattern: the pattern itself.
    """

    rows: tuple[int, ...]
    plan: Plan | None
    pattern: "Pattern | None"


@torch.compiler.disable(reason="a kernel runs between two graphs: compile without fullgraph")
def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    kernel: str = "auto",
    report: Callable[[kernels.Choice], None] | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the pairs that `block_mask` keeps, as compiled FlexAttention
    computes it, by a kernel of ours. A query that sees nothing gets zeros. Differentiable.

        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 4096, 4096)
        out = gen_accel.flex_attention(q, k, v, mask)

    Args:
        q: (B, H, Nq, D).
        k, v: (B, H, Nk, D).
        block_mask: for at least Nq and Nk tokens. What is read off it is remembered as long as it
            lives.
        scale: 1 / sqrt(D) by default.
        kernel: "auto" or a name of `gen_accel.kernels.KERNELS`, which then never falls back.
        report: receives the kernel that ran, for each pattern.

    Raises:
        ValueError: a mask for other samples, heads or fewer tokens; a named kernel that cannot
            run it.
    """
    kernels.check_name(kernel)
    _check(q, k, v, block_mask)
    (B, H, Nq, _), Nk = q.shape, k.shape[2]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    N = max(Nq, Nk)
    q, k, v = (F.pad(x, (0, 0, 0, N - x.shape[2])) for x in (q, k, v))
    outs, order = [], []
    for part in plans(block_mask, B, H, Nq, Nk):
        own = q, k, v
        if part.rows:
            rows = torch.tensor(part.rows, device=q.device)
            one, two, three = (x.flatten(0, 1)[rows, None] for x in own)
            own = one, two, three
        if part.plan is not None:
            out = kernels.run(*own, part.plan, scale=factor, kernel=kernel, report=report)
        else:
            if kernel != "auto":
                raise ValueError(
                    f"kernel {kernel!r} cannot run this BlockMask: its mask function keeps "
                    "neither runs of keys, nor boxes of a grid, nor tokens that see alike; "
                    'kernel="auto" runs it'
                )
            assert part.pattern is not None
            out = part.pattern.attend(*own, scale=factor)
        if not part.rows:
            return out[:, :, :Nq]
        outs.append(out)
        order += part.rows
    back = torch.tensor(order, device=q.device).argsort()
    return torch.cat(outs)[back, 0, :Nq].unflatten(0, (B, H))


def create_block_mask(
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: "torch.device | str" = "cpu",
    BLOCK_SIZE: int = 128,
    _compile: bool = False,
) -> BlockMask:
    """Make a `BlockMask` as torch's function of this name does, without the mask of all token
    pairs: `PAIRS` of them are asked for at once, and nothing is compiled. The arguments are
    torch's; `_compile` says nothing."""
    rows, columns = -(-Q_LEN // BLOCK_SIZE), -(-KV_LEN // BLOCK_SIZE)
    every = torch.ones(rows, columns, dtype=torch.bool, device=device)
    about: Any = {"BLOCK_SIZE": BLOCK_SIZE, "mask_mod": mask_mod, "seq_lengths": (Q_LEN, KV_LEN)}
    mask = BlockMask.from_kv_blocks(*_listed(every[None, None]), **about)
    some, full = [], []
    for b in range(B or 1):
        for h in range(H or 1):
            one = Pattern(mask, every, torch.zeros_like(every), b, h, Q_LEN, KV_LEN, sums=False)
            # A block that sticks out of the tokens is never whole to FlexAttention.
            inside = one.whole.clone()
            inside[Q_LEN // BLOCK_SIZE :] = False
            inside[:, KV_LEN // BLOCK_SIZE :] = False
            some.append(one.kept & ~inside)
            full.append(inside)
    lists = [_listed(torch.stack(x).unflatten(0, (B or 1, H or 1))) for x in (some, full)]
    return BlockMask.from_kv_blocks(*lists[0], *lists[1], **about)


def _listed(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Lists of a mask of blocks, (..., Kq) and (..., Kq, Kk) int32: `BlockMask` has them."""
    order = keep.int().argsort(dim=-1, descending=True, stable=True)
    return keep.sum(-1).int(), order.int()


def _check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> None:
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2]:
        raise ValueError(
            "q, k and v must be (B, H, N, D) with k and v alike, got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    sizes = zip(("samples", "heads"), mask.kv_num_blocks.shape[:2], q.shape[:2], strict=True)
    for what, has, given in sizes:
        if has not in (1, given):
            raise ValueError(f"block_mask is for {has} {what}, q has {given}; make it for {given}")
    for what, has, x in zip(("q", "k"), mask.seq_lengths, (q, k), strict=True):
        if x.shape[2] > has:
            raise ValueError(
                f"block_mask is for {has} tokens of {what}, which has {x.shape[2]}; make it longer"
            )


# By the mask, as long as it lives.
_known: "WeakKeyDictionary[BlockMask, dict[tuple[int, ...], list[Part]]]" = WeakKeyDictionary()


def plans(mask: BlockMask, B: int, H: int, Nq: int, Nk: int) -> Sequence[Part]:
    """Return the patterns of a mask as plans. A mask of whole blocks is read without waiting for
    the device."""
    found = _known.setdefault(mask, {})
    if (B, H, Nq, Nk) not in found:
        with torch.inference_mode(False), torch.no_grad():
            found[B, H, Nq, Nk] = _plans(mask, B, H, Nq, Nk)
    return found[B, H, Nq, Nk]


def _plans(mask: BlockMask, B: int, H: int, Nq: int, Nk: int) -> list[Part]:
    cut, whole = _lists(mask)
    block_q, block_k = mask.BLOCK_SIZE
    if mask.mask_mod is noop_mask and (Nk >= Nq or Nk % block_k == 0):
        plan = _of_blocks(cut | whole, block_q, block_k, max(Nq, Nk), dynamic=True)
        return [Part((), plan, None)]
    samples, heads = cut.shape[:2]
    patterns = [
        Pattern(mask, cut[b, h], whole[b, h], b, h, Nq, Nk)
        for b in range(samples)
        for h in range(heads)
    ]
    if not any(len(one.cut) for one in patterns):
        keep = torch.stack([one.whole for one in patterns]).unflatten(0, (samples, heads))
        return [Part((), _of_blocks(keep, block_q, block_k, max(Nq, Nk), dynamic=False), None)]
    alike: list[tuple[Pattern, list[int]]] = []
    for row in range(B * H):
        b, h = row // H % samples, row % H % heads
        one = patterns[b * heads + h]
        for other, rows in alike:
            if one is other or one.equals(other):
                rows.append(row)
                break
        else:
            alike.append((one, [row]))
    parts = [Part(tuple(rows), one.plan(), one) for one, rows in alike]
    return [parts[0]._replace(rows=())] if len(parts) == 1 else parts


def _lists(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Blocks that are kept under the mask function, and whole: (B, H, Kq, Kk) bool each."""
    lists = [(mask.kv_num_blocks, mask.kv_indices)]
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        lists.append((mask.full_kv_num_blocks, mask.full_kv_indices))
    columns = -(-mask.seq_lengths[1] // mask.BLOCK_SIZE[1])
    made = []
    for count, index in lists:
        place = torch.arange(index.shape[-1], device=index.device)
        held = (place < count[..., None]).to(torch.uint8)
        # Past its end a list may name a block again.
        kept = held.new_zeros(*index.shape[:-1], columns)
        made.append(kept.scatter_reduce_(-1, index.long(), held, "amax").bool())
    return made[0], made[1] if len(made) > 1 else torch.zeros_like(made[0])


def _of_blocks(keep: Tensor, block_q: int, block_k: int, N: int, *, dynamic: bool) -> Plan:
    """Plan of whole blocks in the order of the tokens."""
    slots = _raster(N, math.lcm(block_q, block_k), keep.device)
    rows, columns = len(slots) // block_q, len(slots) // block_k
    keep = F.pad(keep, (0, columns - keep.shape[3], 0, rows - keep.shape[2]))
    return Plan(slots, keep, block_q, block_k, dynamic=dynamic)


def _raster(N: int, multiple: int, device: torch.device) -> Tensor:
    slots = torch.arange(-(-N // multiple) * multiple, device=device)
    return slots.masked_fill(slots >= N, -1)


class Pattern:
    """One pattern of a mask, for one sample and head.

    Args:
        cut, whole: (Kq, Kk) bool, as the lists have them.
        sample, head: numbers that the mask function is asked with.
        sums: whether `plan` and `equals` are to be asked.

    Attributes:
        cut: (P, 2) int64, the pairs of blocks in which some tokens see and some do not.
        whole: (Kq, Kk) bool, the pairs of blocks in which all do.
    """

    def __init__(
        self,
        mask: BlockMask,
        cut: Tensor,
        whole: Tensor,
        sample: int,
        head: int,
        Nq: int,
        Nk: int,
        *,
        sums: bool = True,
    ) -> None:
        self.block_q, self.block_k = mask.BLOCK_SIZE
        self.Nq, self.Nk, self.device = Nq, Nk, cut.device
        self._mod = mask.mask_mod
        self._about = [torch.tensor(x, device=cut.device) for x in (sample, head)]
        self._listed_whole = whole
        # Blocks that stick out of the tokens: keys past the last one may be padding of ours.
        over = torch.zeros_like(whole)
        over[:, Nk // self.block_k :] = True
        self.whole = whole & ~over
        some, asked = [], (cut & ~whole) | (whole & over)
        self.cut = asked.nonzero()
        for pairs, seen in self._asked():
            real = self._real(pairs)
            every, any_seen = (seen | ~real).flatten(1).all(1), seen.flatten(1).any(1)
            stays = any_seen & ~(every & ~(over[pairs[:, 0], pairs[:, 1]] & (Nq > Nk)))
            done = pairs[any_seen & ~stays]
            self.whole[done[:, 0], done[:, 1]] = True
            some.append(pairs[stays])
        self.cut = torch.cat(some) if some else self.cut
        if sums:
            self._sums()

    @property
    def kept(self) -> Tensor:
        """Mask of the pairs of blocks in which some tokens see, (Kq, Kk) bool."""
        keep = self.whole.clone()
        keep[self.cut[:, 0], self.cut[:, 1]] = True
        return keep

    def _real(self, pairs: Tensor) -> Tensor:
        """Mask of the real token pairs in some pairs of blocks, (P, block_q, block_k)."""
        q, k = self._tokens(pairs)
        return (q < self.Nq)[:, :, None] & (k < self.Nk)[:, None]

    def _tokens(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens in the query and in the key block of some pairs, (P, block_q), (P, block_k)."""
        q, k = (torch.arange(block, device=self.device) for block in (self.block_q, self.block_k))
        return pairs[:, :1] * self.block_q + q, pairs[:, 1:] * self.block_k + k

    def _sees(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether token q sees token k by the mask function: (P, R) and (P, C) to (P, R, C)."""
        b, h = self._about
        q, k = q.clamp_max(self.Nq - 1), k.clamp_max(self.Nk - 1)

        def rule(p: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return self._mod(b, h, q[p, i], k[p, j])

        seen = create_mask(rule, len(q), None, q.shape[1], k.shape[1], device=self.device)
        return seen.expand(len(q), 1, q.shape[1], k.shape[1])[:, 0]

    def _seen(self, pairs: Tensor) -> Tensor:
        """Mask of the token pairs that see in some kept pairs of blocks, (P, block_q, block_k)."""
        whole = (self.whole | self._listed_whole)[pairs[:, 0], pairs[:, 1]][:, None, None]
        return (self._sees(*self._tokens(pairs)) | whole) & self._real(pairs)

    def _among(self, q: Tensor, k: Tensor) -> Tensor:
        """Mask of the pairs that see among some tokens, (R,) and (C,) to (R, C)."""
        place = q[:, None] // self.block_q, k // self.block_k
        seen = self._sees(q[None], k[None])[0] | self._listed_whole[place]
        return self.whole[place] | (self.kept[place] & seen)

    def _asked(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pairs of blocks in `cut`, some at a time, with the token pairs that see."""
        step = max(1, PAIRS // (self.block_q * self.block_k))
        for pairs in self.cut.split(step) if len(self.cut) else ():
            yield pairs, self._seen(pairs)

    def _sums(self) -> None:
        """Count the keys of each query, and add up random numbers of them, by which equal rows
        and equal columns are told."""
        g = torch.Generator().manual_seed(0)
        sizes = len(self.whole) * self.block_q, self.whole.shape[1] * self.block_k
        weights = []
        for size, held in zip(sizes, (self.Nq, self.Nk), strict=True):
            drawn = torch.randint(-(1 << 62), 1 << 62, (size,), generator=g).to(self.device)
            drawn[held:] = 0
            weights.append(drawn)
        by_q, by_k = weights
        one_q, one_k = (
            (torch.arange(size, device=self.device) < held).long()
            for size, held in zip(sizes, (self.Nq, self.Nk), strict=True)
        )
        held_k = (self.whole * x.view(-1, self.block_k).sum(1) for x in (one_k, by_k))
        held_q = (self.whole.mT * x.view(-1, self.block_q).sum(1) for x in (one_q, by_q))
        self.counts, self.rows = (x.sum(1).repeat_interleave(self.block_q) for x in held_k)
        self.counted, self.columns = (x.sum(1).repeat_interleave(self.block_k) for x in held_q)
        for pairs, seen in self._asked():
            q, k = self._tokens(pairs)
            for total, of in ((self.counts, one_k), (self.rows, by_k)):
                total.index_add_(0, q.flatten(), (seen * of[k][:, None]).sum(2).flatten())
            for total, of in ((self.counted, one_q), (self.columns, by_q)):
                total.index_add_(0, k.flatten(), (seen * of[q][:, :, None]).sum(1).flatten())
        for total in (self.counts, self.rows):
            total[self.Nq :] = 0
        for total in (self.counted, self.columns):
            total[self.Nk :] = 0

    def equals(self, other: "Pattern") -> bool:
        """Whether another pattern of the same mask keeps the same token pairs."""
        return torch.equal(self.rows, other.rows) and torch.equal(self.columns, other.columns)

    def plan(self) -> Plan | None:
        """Return the plan that keeps exactly these token pairs; None if none does."""
        live = self.counted[: self.Nk] > 0
        rank = (live.cumsum(0) - 1).masked_fill(~live, -1)
        found = self._windows([rank]) or self._classes()
        if found is None:
            for axes in self._grids():
                if (found := self._windows(axes)) is not None:
                    break
        return found

    def _windows(self, axes: Sequence[Tensor]) -> Plan | None:
        """Plan of windows along axes on which each key has a place, (Nk,); None if what a query
        sees is not all that lies within its own bounds."""
        far = self.Nk + 1
        K, sizes = self.whole.shape, self.whole.shape[0] * self.block_q
        places, firsts, lasts = [], [], []
        volume = torch.ones(sizes, dtype=torch.int64, device=self.device)
        for place in axes:
            held = F.pad(place, (0, K[1] * self.block_k - self.Nk), value=-1)
            keys = held.view(-1, self.block_k)
            low = keys.masked_fill(keys < 0, far).amin(1)
            first = torch.where(self.whole, low, far).amin(1).repeat_interleave(self.block_q)
            last = torch.where(self.whole, keys.amax(1), -1).amax(1)
            last = last.repeat_interleave(self.block_q)
            for pairs, seen in self._asked():
                q, k = self._tokens(pairs)
                own = held[k][:, None]
                least = torch.where(seen, own, far).amin(2).flatten()
                most = torch.where(seen, own, -1).amax(2).flatten()
                first.scatter_reduce_(0, q.flatten(), least, "amin")
                last.scatter_reduce_(0, q.flatten(), most, "amax")
            volume *= last - first + 1
            places.append(held)
            firsts.append(first)
            lasts.append(last)
        sees = self.counts > 0
        if not torch.equal(volume[sees], self.counts[sees]):
            return None
        N = max(self.Nq, self.Nk)
        slots = _raster(N, math.lcm(self.block_q, self.block_k), self.device)

        def over_slots(x: Tensor, empty: int) -> Tensor:
            return F.pad(x, (0, len(slots) - len(x)), value=empty).int()

        rule = Windows(
            torch.stack([over_slots(x.masked_fill(~sees, 1), 1) for x in firsts]),
            torch.stack([over_slots(x.masked_fill(~sees, 0), 0) for x in lasts]),
            torch.stack([over_slots(x, -1) for x in places]),
            torch.zeros_like(slots, dtype=torch.bool),
            over_slots(self.counts, 0).long(),
        )
        plan = _of_blocks(self.kept[None, None], self.block_q, self.block_k, N, dynamic=False)
        return Plan(slots, plan.keep, self.block_q, self.block_k, rule)

    def _classes(self) -> Plan | None:
        """Plan of whole blocks in which tokens that see alike and are seen alike lie together;
        None where these are too many, or too few of each."""
        N = max(self.Nq, self.Nk)
        both = torch.stack([F.pad(x, (0, N - len(x))) for x in (self.rows, self.columns)], 1)
        kinds, kind = both.unique(dim=0, return_inverse=True)
        if len(kinds) > CLASSES:
            return None
        sizes = kind.bincount(minlength=len(kinds))
        waste = {block: int((-sizes % block).sum()) for block in BLOCKS}
        block = next((one for one in BLOCKS if waste[one] <= WASTE * N), BLOCKS[-1])
        if waste[block] > max(N, CLASSES):
            return None
        order = kind.argsort(stable=True)
        blocks = -(-sizes // block)
        begins = (blocks.cumsum(0) - blocks) * block
        rank = torch.arange(N, device=self.device) - (sizes.cumsum(0) - sizes)[kind[order]]
        slots = torch.full((int(blocks.sum()) * block,), -1, device=self.device)
        slots[begins[kind[order]] + rank] = order
        token = order[sizes.cumsum(0) - sizes]  # one of each kind
        seen = self._among(token.clamp_max(self.Nq - 1), token.clamp_max(self.Nk - 1))
        seen &= (token < self.Nq)[:, None] & (token < self.Nk)
        of = torch.arange(len(kinds), device=self.device).repeat_interleave(blocks)
        return Plan(slots, seen[of][:, of][None, None], block, block)

    def _grids(self) -> Iterator[list[Tensor]]:
        """Yield the places of the keys on grids of two and three axes whose lengths the runs of
        keys of the first query betray."""
        seeing = (self.counts[: self.Nq] > 0).nonzero()
        if not len(seeing):
            return
        key = torch.arange(self.Nk, device=self.device)
        seen = self._among(seeing[:1, 0], key)[0]
        runs = (F.pad(seen.int(), (1, 0)).diff() == 1).nonzero()[:, 0]
        steps = runs.diff().unique()
        lengths = [n for n in steps.tolist() if self.Nk % n == 0]
        first = steps[:1].tolist()
        if not lengths or first != lengths[:1]:
            return
        W = lengths[0]
        yield [key // W, key % W]
        # The step from the last row of a frame to the first of the next: H W less what was walked.
        jumps = (runs.diff() != W).nonzero()[:, 0]
        if len(jumps):
            frame = int(runs[jumps[0] + 1] - runs[0])
            if frame % W == 0 and self.Nk % frame == 0:
                yield [key // frame, key // W % (frame // W), key % W]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """Attend query block by query block, each to its own keys under its part of the mask;
        (B, H, N, D) in and out. The backward pass computes each block again."""
        outs = []
        for block, kept in enumerate(self.kept):
            pairs = F.pad(kept.nonzero(), (1, 0), value=block)
            rows = slice(block * self.block_q, (block + 1) * self.block_q)
            if not len(pairs) or rows.start >= self.Nq:
                outs.append(torch.zeros_like(q[:, :, rows]))
                continue
            seen = self._seen(pairs).transpose(0, 1).flatten(1)[: q[:, :, rows].shape[2]]
            keys = self._tokens(pairs)[1].flatten().clamp_max(self.Nk - 1)
            given = q[:, :, rows], k[:, :, keys], v[:, :, keys], seen, scale
            outs.append(checkpoint(_attended, *given, use_reentrant=False))
        out = torch.cat(outs, 2)
        return F.pad(out, (0, 0, 0, q.shape[2] - out.shape[2]))


def _attended(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention of some queries under a mask, (R, C) bool, in fp32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).mT * scale).masked_fill(~seen, -torch.inf)
    some = seen.any(1, keepdim=True)
    weights = scores.masked_fill(~some, 0.0).softmax(-1).where(some, 0.0)
    return (weights @ v.to(wide)).to(q.dtype)
