"""Rest of a plan: the blocks that it does not keep, pooled and added to attention over the others;
`Rest` says what it is, `reference` computes it by definition.

The name of the attention kernel decides what runs: see `dispatch`. The functions `plain_*` are
torch alone, with autograd.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gen_accel.kernels.base import BlockFacts, Context, Kernel
from gen_accel.kernels.dispatch import native_serves, triton_serves
from gen_accel.kernels.native import rest as native
from gen_accel.plan import CURVATURE, MOST_GAINED, Plan, Rest, Slots, pack, unpack

NUMBERS = 1 << 24  # scores, pooled keys and pooled values that are held at once
WIDE = 1 << 29  # bytes of outputs in fp32 that are held at once without a gradient; not timed


class Curve(NamedTuple):
    """Numbers of the second order: the logarithm of what query t weighs a block by gains
    rise_t sum_d weight_d var_d, at most `MOST_GAINED`. var is the variance of the block's keys
    under the softmax of the mean query.

    Args:
        rise: (B, H, N) fp32 or wider, CURVATURE a_t.
        weight: (B, H, D), w.
    """

    rise: Tensor
    weight: Tensor


def block_facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Slots | Plan,
    rest: Rest | None,
    *,
    scale: float,
    kernel: str,
) -> BlockFacts | None:
    """Compute the facts of a call before its blocks are chosen, where kernels take them; else
    None."""
    if rest is None or rest.order != "second" or torch.compiler.is_compiling():
        return None
    if not triton_serves(kernel, q, q.shape[3]) or torch.is_autocast_enabled(q.device.type):
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return None
    from gen_accel.kernels.triton import block_facts as by_triton  # imports triton

    return by_triton.facts_of(q, k, v, slots, rest, scale=scale)


def attention(
    chosen: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Compute attention over the kept keys and the rest in one softmax. Without a gradient, large
    calls are computed some heads at a time.

    Args:
        chosen: a kernel that takes no rest.
        plan: a plan with a rest.
        kernel: name that decides what adds the rest: the kernel's own, or "auto".

    Returns:
        (B, H, N, D) in q's dtype, and the log-sum-exp of kept keys and rest, (B, H, N).
    """
    native_runs = native_serves(kernel, q, k, v)
    if native_runs and native.in_one_pass(q, k, v, plan, scale=scale, kernel=kernel):
        return native.attention(q, k, v, plan, scale=scale, kernel=kernel)
    H, step = q.shape[1], _heads_at_once(q, k, v, plan)
    runs_triton, facts = triton_serves(kernel, q, q.shape[3]), plan.taken_facts(q, k, v, scale)

    def run(
        q: Tensor, k: Tensor, v: Tensor, plan: Plan, facts: BlockFacts | None
    ) -> tuple[Tensor, Tensor]:
        if runs_triton:
            from gen_accel.kernels.triton import rest as by_triton  # imports triton

            return by_triton.attention(chosen, q, k, v, plan, facts, scale=scale)
        out, lse = chosen.forward_lse(q, k, v, plan.kept, scale=scale, wide=True)
        joint, total = added(out, lse, q, k, v, plan, scale=scale, kernel=kernel)
        return joint.to(q.dtype), total

    if step == H:
        return run(q, k, v, plan, facts)
    out, totals = torch.empty_like(q), []
    for first in range(0, H, step):
        some = slice(first, first + step)
        own = None if facts is None else facts.of_heads(some)
        out[:, some], total = run(q[:, some], k[:, some], v[:, some], plan.of_heads(some), own)
        totals.append(total)
    return out, torch.cat(totals, 1)


def _heads_at_once(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> int:
    """Number of heads whose outputs fit into WIDE, the same in each turn but the last. All with a
    gradient, and of plans whose lists are kept, which each part of them would make again."""
    H = q.shape[1]
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if grad or not (plan.dynamic or plan.patterns[1] == 1):
        return H
    most = max(1, WIDE * H // (4 * q.numel()))
    return math.ceil(H / math.ceil(H / most))


def added(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Merge the rest into attention over the kept keys, by log-sum-exps.

    Args:
        out, lse: (B, H, N, D) and (B, H, N), as `forward_lse` of a kernel returns them. Without a
            gradient, `out` may be written over.

    Returns:
        Output and log-sum-exp over kept keys and rest, differentiable in all five tensors; the
        output is in q's dtype or a wider one.
    """
    if triton_serves(kernel, q, q.shape[3]):
        from gen_accel.kernels.triton import rest as by_triton  # imports triton

        return by_triton.added(out, lse, q, k, v, plan, scale=scale)
    curve = curve_of(q, k, plan, scale, kernel)
    if native_serves(kernel, q, k, v):
        return native.added(out, lse, q, k, v, plan, curve, scale=scale)
    joint, total = plain(out, lse, q, k, v, plan, curve, scale=scale)
    assert plan.rest is not None
    if plan.rest.order != "zeroth":
        joint = plain_slope(joint, lse, total, q, k, v, plan, scale=scale)
    return joint, total


def plain(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    curve: Curve | None = None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run `added` in torch, without a slope and with query blocks in groups. The backward pass
    computes each group again, so that nothing of the size of the scores is kept."""
    assert plan.rest is not None
    wide = torch.promote_types(lse.dtype, torch.float32)
    q, k, v, out = (pack(x, plan).to(wide) for x in (q, k, v, out))
    B, H, _, D = q.shape
    Kk = plan.keep.shape[3]
    if plan.rest.centre == "key":
        given, run, numbers = means(k, v, plan), _around_keys, plan.block_q * Kk
    else:
        given, run, numbers = (k, v), _around_queries, 2 * Kk * D  # of one query block
    rows = [q, out, pack(lse[..., None], plan)[..., 0].to(wide)]
    if curve is not None:
        rows.append(pack(curve.rise[..., None], plan)[..., 0])
        given = *given, curve.weight
    rows = [x.unflatten(2, (-1, plan.block_q)) for x in rows]
    step = max(1, NUMBERS // (B * H * numbers))
    make = partial(run, plan, scale)
    joint, total = _InGroups.apply(make, step, len(rows), *rows, *given)
    joint, total = joint.flatten(2, 3), total.flatten(2, 3)
    return unpack(joint, plan), unpack(total[..., None], plan)[..., 0]


def means(k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Mean key and value of each block, (B, H, Kk, D) of slots."""
    real = plan.real.view(-1, plan.block_k, 1)
    count = real.sum(1).clamp_min(1)
    key, value = ((x.unflatten(2, (-1, plan.block_k)) * real).sum(3) / count for x in (k, v))
    return key, value


Tensors = tuple[Tensor, ...]


def _around_keys(
    plan: Plan, scale: float, some: slice, rows: Tensors, given: Tensors
) -> tuple[Tensor, Tensor]:
    """Merge all mean keys into some query blocks.

    Args:
        rows: of these blocks, q (B, H, n, block_q, D), and output and log-sum-exp so far.
        given: mean keys and values, (B, H, Kk, D).
    """
    (q, out, lse), (key, value) = rows, given
    count = plan.real.view(-1, plan.block_k).sum(1)
    scores = q @ key.mT[:, :, None] * scale + count.to(q.dtype).log()
    return merged(out, lse, scores, value[:, :, None], _left_out(plan, some, count))


def _around_queries(
    plan: Plan, scale: float, some: slice, rows: Tensors, given: Tensors
) -> tuple[Tensor, Tensor]:
    """Merge keys and values that are pooled for them into some query blocks.

    Args:
        rows: as above, then the rise of a curve, (B, H, n, block_q), if the call has one.
        given: keys and values of slots, (B, H, S, D), then the weight of a curve, (B, H, D).
    """
    (q, out, lse, *rise), (k, v, *weight) = rows, given
    real_k = plan.real.view(-1, plan.block_k)
    scores, shares = _pooled(plan, scale, some, q, k, *rise, *weight)
    values = shares @ v.unflatten(2, (-1, plan.block_k))
    return merged(out, lse, scores, values.transpose(2, 3), _left_out(plan, some, real_k.sum(1)))


def _pooled(
    plan: Plan,
    scale: float,
    some: slice,
    q: Tensor,
    k: Tensor,
    rise: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the scores of the pooled keys of all blocks for some query blocks, (B, H, n,
    block_q, Kk), and what each key has in them, (B, H, Kk, n, block_k); arguments as above."""
    real_q, real_k = plan.real.view(-1, plan.block_q, 1)[some], plan.real.view(-1, plan.block_k)
    query = (q * real_q).sum(3) / real_q.sum(1).clamp_min(1)
    score = (query @ k.mT * scale).unflatten(3, (-1, plan.block_k))
    lowest = torch.finfo(score.dtype).min
    score = score.masked_fill(~real_k, lowest)
    total, shares = score.logsumexp(-1), score.softmax(-1).transpose(2, 3)
    keys = k.unflatten(2, (-1, plan.block_k))
    key = shares @ keys  # (B, H, Kk, n, D), a product for each key block
    scores = (q - query[:, :, :, None]) @ key.permute(0, 1, 3, 4, 2) * scale
    scores = scores + total[:, :, :, None]
    if rise is not None and weight is not None:
        spans = _variances(shares, keys, key, weight, real_k).transpose(2, 3)
        gained = rise[..., None] * spans[:, :, :, None]
        # At the bound clamp_max still has a gradient; `Rest` has none.
        scores = scores + gained.masked_fill(gained >= MOST_GAINED, MOST_GAINED)
    return scores, shares


@torch.no_grad()
def pooled_shares(
    q: Tensor, k: Tensor, plan: Plan, *, scale: float, kernel: str = "auto"
) -> Tensor:
    """Compute the logarithm of each key block's share of the attention of a query block, the mean
    over its queries, with the keys of all blocks pooled: (B, H, Kq, Kk) fp32 or wider, without a
    gradient; -inf for blocks without tokens.

    Args:
        plan: a plan with a rest around mean queries; what it keeps is not read.
    """
    if native_serves(kernel, q, k) and native.chooses(plan, scale):
        return native.shares(q, k, plan, scale=scale)
    curve = curve_of(q, k, plan, scale, kernel)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = (pack(x, plan).to(wide) for x in (q, k))
    B, H, _, D = q.shape
    rows = q.unflatten(2, (-1, plan.block_q))
    real_q, empty = plan.real.view(-1, plan.block_q), ~plan.real.view(-1, plan.block_k).any(-1)
    more = []
    if curve is not None:
        rise = pack(curve.rise[..., None], plan)[..., 0].unflatten(2, (-1, plan.block_q))
        more = [rise, curve.weight]
    made = []
    step = max(1, NUMBERS // (B * H * len(empty) * (plan.block_q + D)))
    for some in _groups(rows, step):
        own = [more[0][:, :, some], more[1]] if more else []
        scores, _ = _pooled(plan, scale, some, rows[:, :, some], k, *own)
        shares = scores.masked_fill(empty, -torch.inf).softmax(-1)
        held = real_q[some, :, None]
        made.append(((shares * held).sum(3) / held.sum(1).clamp_min(1)).log())
    return torch.cat(made, 2)


def _variances(shares: Tensor, keys: Tensor, key: Tensor, weight: Tensor, real: Tensor) -> Tensor:
    """Variance of each block's keys for each query block, weighed and summed over the channels,
    (B, H, Kk, n).

    Args:
        shares: (B, H, Kk, n, block_k), the weights of the keys in the pooled key.
        keys: (B, H, Kk, block_k, D) of slots.
        key: (B, H, Kk, n, D), pooled keys.
        weight: (B, H, D).
        real: (Kk, block_k) bool, the slots that hold tokens.
    """
    # Offsets from the mean of a block; otherwise most digits would cancel.
    held = real.sum(1)[:, None, None].clamp_min(1)
    mean = ((keys * real[..., None]).sum(3, keepdim=True) / held).detach()
    weight = weight[:, :, None, None]
    squares = ((keys - mean).square() * weight).sum(-1, keepdim=True)
    return (shares @ squares)[..., 0] - ((key - mean).square() * weight).sum(-1)


def _left_out(plan: Plan, some: slice, count: Tensor) -> Tensor:
    """Mask of blocks that hold tokens but are not kept, (B', H', n, 1, Kk) bool."""
    return (~plan.keep[:, :, some] & (count > 0))[:, :, :, None]


def merged(
    out: Tensor, lse: Tensor, scores: Tensor, values: Tensor, left_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the left-out blocks to `out` and `lse` of some query blocks: (B, H, n, block_q, D) and
    (B, H, n, block_q).

    Args:
        scores: (B, H, n, block_q, Kk), scores of pooled keys.
        values: (B, H, n or 1, Kk, D), pooled values.
        left_out: (B, H, n, 1, Kk) bool.
    """
    scores = scores.masked_fill(~left_out, -torch.inf)
    any_left = left_out.any(-1, keepdim=True)
    total = scores.logsumexp(-1)
    weights = scores.softmax(-1).where(any_left, 0.0)
    joint = torch.logaddexp(lse, total)
    # Where nothing is left out the answer is unchanged, bit for bit, and has no gradient here.
    # Not exp(total - joint), whose error grows with the size of these.
    share = torch.sigmoid(total - lse).where(any_left[..., 0], 0.0)[..., None]
    mixed = torch.lerp(out, weights @ values, share)
    return mixed.where(any_left, out), joint.where(any_left[..., 0], lse)


class _InGroups(torch.autograd.Function):
    """Rows of tensors in groups of query blocks; the backward pass computes each group again."""

    @staticmethod
    def forward(
        ctx: Context, run: Callable, step: int, count: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run it on the first `count` tensors in groups of rows, and on the others whole."""
        ctx.run, ctx.step, ctx.count = run, step, count
        ctx.save_for_backward(*tensors)
        rows, given = tensors[:count], tensors[count:]
        made = [
            run(some, tuple(x[:, :, some] for x in rows), given) for some in _groups(rows[0], step)
        ]
        return torch.cat([one for one, _ in made], 2), torch.cat([one for _, one in made], 2)

    @staticmethod
    def backward(ctx: Context, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors  # read once: a checkpoint gives them once
        rows, given = saved[: ctx.count], saved[ctx.count :]
        of_rows: list[Tensors] = []
        of_given = [torch.zeros_like(x) for x in given]
        for some in _groups(rows[0], ctx.step):
            own = tuple(x[:, :, some].detach().requires_grad_() for x in rows)
            leaves = tuple(x.detach().requires_grad_() for x in given)
            # `backward` may be called inside autocast.
            with torch.enable_grad(), torch.autocast(rows[0].device.type, enabled=False):
                made = ctx.run(some, own, leaves)
                grads = grad[:, :, some], grad_lse[:, :, some]
                found = torch.autograd.grad(made, [*own, *leaves], grads)
            of_rows.append(found[: ctx.count])
            for target, part in zip(of_given, found[ctx.count :], strict=True):
                target += part
        return None, None, None, *(torch.cat(x, 2) for x in zip(*of_rows, strict=True)), *of_given


def _groups(x: Tensor, step: int) -> list[slice]:
    return [slice(i, i + step) for i in range(0, x.shape[2], step)]


def curve_of(q: Tensor, k: Tensor, plan: Plan, scale: float, kernel: str = "auto") -> Curve | None:
    """Compute the curve of a call, differentiable in q and k; None without a second order.

    Args:
        q, k: (B, H, N, D).
        scale: factor of q k^T.
        kernel: name of the attention kernel, which decides what runs.
    """
    if plan.rest is None or plan.rest.order != "second":
        return None
    if native_serves(kernel, q, k):
        return Curve(*native.curve_of(q, k, plan, scale))
    if triton_serves(kernel, q, q.shape[3]):
        from gen_accel.kernels.triton import curve as by_triton  # imports triton

        return Curve(*by_triton.curve_of(q, k, plan, scale))
    return plain_curve(q, k, plan, scale)


def plain_curve(q: Tensor, k: Tensor, plan: Plan, scale: float) -> Curve:
    """Compute the curve in torch."""
    held_q, held_k = (held[:, 0] for held in plan.held)
    of_q, of_k = plan.counted_blocks()
    query = _squares_off_means(q, plan, plan.block_q)
    key = _squares_off_means(k, plan, plan.block_k)
    weight = _mean_square(query, of_q, held_q)
    by = _mean_square(key, of_k, held_k)
    both = (weight * by).sum(-1)
    some = both > 0
    factor = (CURVATURE * scale**2 / both.where(some, 1.0)).where(some, 0.0)
    # Product and sum, which no autocast rounds, not even in the backward pass.
    rise = (query * (by * factor[..., None])[:, :, None, None]).sum(-1)
    return Curve(unpack(rise.flatten(2)[..., None], plan)[..., 0], weight)


def _squares_off_means(x: Tensor, plan: Plan, block: int) -> Tensor:
    """Squared offsets of tokens from the mean of their block, (B, H, blocks, block, D) of slots; 0
    for padding."""
    packed = Packed.apply(x.to(torch.promote_types(x.dtype, torch.float32)), plan)
    return _off_means(packed, plan, block).unflatten(2, (-1, block)).square()


def _mean_square(squares: Tensor, counts: Tensor, held: Tensor) -> Tensor:
    """Mean of `_squares_off_means`, (B, H, D), over the tokens `held` by all blocks, each block
    counted `counts` times, (blocks,) both."""
    counts = counts.to(squares.dtype)
    total = (counts * held.to(squares.dtype)).sum(-1, keepdim=True)
    return (squares.sum(3) * counts[..., None]).sum(2) / total.clamp_min(1)


def plain_slope(
    joint: Tensor,
    lse: Tensor,
    total: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
) -> Tensor:
    """Add the slope of the rest's values to attention over kept keys and rest, in the dtype of
    `joint`, differentiable in all six tensors.

    Args:
        joint: (B, H, N, D) fp32 or wider, without the slope.
        lse, total: (B, H, N), log-sum-exps over the kept keys, and over kept keys and rest.
    """
    assert plan.rest is not None
    q, k, v = (x.to(total.dtype) for x in (q, k, v))
    k, v = (Packed.apply(x, plan) for x in (k, v))
    if plan.rest.centre == "query":
        q = unpack(_off_means(Packed.apply(q, plan), plan, plan.block_q), plan)
    # Where nothing is left out there is no gradient either.
    share = -torch.expm1((lse - total).where(total > lse, 0.0))
    made = _Products.apply(q, _off_means(k, plan, plan.block_k), v)
    return joint + (share * (scale / plan.tokens))[..., None] * made


def _off_means(x: Tensor, plan: Plan, block: int) -> Tensor:
    """Subtract the mean of each block from x, (B, H, S, D) of slots; padding is 0."""
    real = plan.real.view(-1, block, 1)
    x = x.unflatten(2, (-1, block)) * real
    mean = x.sum(3, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    return ((x - mean) * real).flatten(2, 3)


class _Products(torch.autograd.Function):
    """q (k^T v), both passes in the dtype of the tensors: `backward` may be called inside
    autocast."""

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            slope = k.mT @ v
            ctx.save_for_backward(q, k, v, slope)
            return q @ slope

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, slope = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            back = q.mT @ grad
            return grad @ slope.mT, v @ back.mT, k @ back


class Packed(torch.autograd.Function):
    """`pack`, for callers that leave padding out. Its gradient adds up nothing, so that it is the
    same from run to run on a GPU."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, plan: Plan | Slots) -> Tensor:
        ctx.plan = plan
        return pack(x, plan)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return unpack(grad, ctx.plan), None
