"""The rest of a plan: what it does not keep, pooled, added to the attention over what it keeps.

`plain` is torch alone, with autograd; `reference` holds the meaning. The name of the kernel for
attention decides what runs: see `helpers`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gen_accel.kernels.helpers import native_serves, triton_serves
from gen_accel.kernels.native import rest as native
from gen_accel.plan import Plan, pack, unpack

NUMBERS = 1 << 24  # of scores, pooled keys and pooled values that are made at once


def attention(
    forward_lse: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept keys and the rest in one softmax.

    Args:
        forward_lse: of a kernel, which takes no rest; see `contract.KernelParts`.
        plan: with a rest.
        kernel: the name that decides what adds the rest: that kernel's own, or "auto".

    Returns:
        (B, H, N, D) in q's dtype, and the log-sum-exp of kept keys and rest, (B, H, N).
    """
    assert plan.rest is not None
    out, lse = forward_lse(q, k, v, plan.kept, scale=scale, wide=True)
    joint, total = added(out, lse, q, k, v, plan, scale=scale, kernel=kernel)
    if plan.rest.order == "first":
        joint = joint + _first_order(lse, total, q, k, v, plan, scale)
    return joint.to(q.dtype), total


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
    """The zeroth order of the rest, merged into attention over the kept keys by log-sum-exps.

    Args:
        out, lse: (B, H, N, D) and (B, H, N), as `forward_lse` of a kernel gives them.

    Returns:
        The same of kept keys and rest, differentiable in all five tensors.
    """
    if native_serves(kernel, q, k, v):
        return native.added(out, lse, q, k, v, plan, scale=scale)
    if triton_serves(kernel, q, q.shape[3]):
        from gen_accel.kernels.triton import rest as by_triton  # imports triton

        return by_triton.added(out, lse, q, k, v, plan, scale=scale)
    return plain(out, lse, q, k, v, plan, scale=scale)


def plain(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float
) -> tuple[Tensor, Tensor]:
    """`added` in torch, query blocks in groups. The backward pass makes each group anew, so that
    nothing of the size of the scores is kept."""
    assert plan.rest is not None
    wide = torch.promote_types(lse.dtype, torch.float32)
    q, k, v, out = (pack(x, plan).to(wide) for x in (q, k, v, out))
    B, H, _, D = q.shape
    Kk = plan.keep.shape[3]
    if plan.rest.centre == "key":
        given, run, numbers = means(k, v, plan), _around_keys, plan.block_q * Kk
    else:
        given, run, numbers = (k, v), _around_queries, 2 * Kk * D  # of one query block
    row = pack(lse[..., None], plan)[..., 0].to(wide)
    rows = (x.unflatten(2, (-1, plan.block_q)) for x in (q, out, row))
    step = max(1, NUMBERS // (B * H * numbers))
    joint, total = _InGroups.apply(partial(run, plan, scale), step, *rows, *given)
    joint, total = joint.flatten(2, 3), total.flatten(2, 3)
    return unpack(joint, plan), unpack(total[..., None], plan)[..., 0]


def means(k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Mean key and value of each block, (B, H, Kk, D) of slots."""
    real = plan.real.view(-1, plan.block_k, 1)
    count = real.sum(1).clamp_min(1)
    key, value = ((x.unflatten(2, (-1, plan.block_k)) * real).sum(3) / count for x in (k, v))
    return key, value


def _around_keys(
    plan: Plan,
    scale: float,
    some: slice,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor]:
    """Some query blocks, q (B, H, n, block_q, D), against the mean keys (B, H, Kk, D)."""
    count = plan.real.view(-1, plan.block_k).sum(1)
    scores = q @ key.mT[:, :, None] * scale + count.to(q.dtype).log()
    return merged(out, lse, scores, value[:, :, None], _left_out(plan, some, count))


def _around_queries(
    plan: Plan,
    scale: float,
    some: slice,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    """Some query blocks against keys and values of slots, (B, H, S, D), pooled for them."""
    real_q, real_k = plan.real.view(-1, plan.block_q, 1)[some], plan.real.view(-1, plan.block_k)
    query = (q * real_q).sum(3) / real_q.sum(1).clamp_min(1)
    score = (query @ k.mT * scale).unflatten(3, (-1, plan.block_k))
    lowest = torch.finfo(score.dtype).min
    score = score.masked_fill(~real_k, lowest)
    total, weight = score.logsumexp(-1), score.softmax(-1).transpose(2, 3)
    # (B, H, Kk, n, D), a product for each key block
    key, value = (weight @ x.unflatten(2, (-1, plan.block_k)) for x in (k, v))
    key, value = key.transpose(2, 3), value.transpose(2, 3)
    scores = (q - query[:, :, :, None]) @ key.mT * scale + total[:, :, :, None]
    return merged(out, lse, scores, value, _left_out(plan, some, real_k.sum(1)))


def _left_out(plan: Plan, some: slice, count: Tensor) -> Tensor:
    """(B', H', n, 1, Kk) bool: blocks that hold tokens and are not kept."""
    return (~plan.keep[:, :, some] & (count > 0))[:, :, :, None]


def merged(
    out: Tensor, lse: Tensor, scores: Tensor, values: Tensor, left_out: Tensor
) -> tuple[Tensor, Tensor]:
    """`out` and `lse` of some query blocks with what they leave out: (B, H, n, block_q, D) and
    (B, H, n, block_q).

    Args:
        scores: (B, H, n, block_q, Kk) of pooled keys.
        values: (B, H, n or 1, Kk, D), pooled.
        left_out: (B, H, n, 1, Kk) bool.
    """
    scores = scores.masked_fill(~left_out, -torch.inf)
    any_left = left_out.any(-1, keepdim=True)
    total = scores.logsumexp(-1)
    weights = scores.softmax(-1).where(any_left, 0.0)
    joint = torch.logaddexp(lse, total)
    # Where nothing is left out the answer is as it was, bit for bit, and has no gradient here.
    # Not exp(total - joint), which is as wrong as these are large.
    share = torch.sigmoid(total - lse).where(any_left[..., 0], 0.0)[..., None]
    merged = torch.lerp(out, weights @ values, share)
    return merged.where(any_left, out), joint.where(any_left[..., 0], lse)


class _InGroups(torch.autograd.Function):
    """Rows of tensors in groups of query blocks; each is made again for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable,
        step: int,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.run, ctx.step = run, step
        ctx.save_for_backward(q, out, lse, key, value)
        made = [
            run(some, q[:, :, some], out[:, :, some], lse[:, :, some], key, value)
            for some in _groups(q.shape[2], step)
        ]
        return torch.cat([one for one, _ in made], 2), torch.cat([one for _, one in made], 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, out, lse, *given = ctx.saved_tensors
        of_rows: list[tuple[Tensor, ...]] = []
        of_given = [torch.zeros_like(x) for x in given]
        for some in _groups(q.shape[2], ctx.step):
            rows = [x[:, :, some].detach().requires_grad_() for x in (q, out, lse)]
            leaves = [x.detach().requires_grad_() for x in given]
            # `backward` may be called inside of autocast.
            with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
                made = ctx.run(some, *rows, *leaves)
                grads = grad[:, :, some], grad_lse[:, :, some]
                *own, key, value = torch.autograd.grad(made, [*rows, *leaves], grads)
            of_rows.append(tuple(own))
            for target, part in zip(of_given, (key, value), strict=True):
                target += part
        return None, None, *(torch.cat(x, 2) for x in zip(*of_rows, strict=True)), *of_given


def _groups(blocks: int, step: int) -> list[slice]:
    return [slice(i, i + step) for i in range(0, blocks, step)]


def _first_order(
    lse: Tensor, total: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float
) -> Tensor:
    """The slope of `Rest`, (B, H, N, D).

    Args:
        lse, total: log-sum-exps of the kept keys, and of these and the rest.
    """
    q, k, v = (x.to(total.dtype) for x in (q, k, v))
    k, v = (_Packed.apply(x, plan) for x in (k, v))
    key, _ = means(k, v, plan)
    real = plan.real.view(-1, plan.block_k, 1)
    centred = (k.unflatten(2, (-1, plan.block_k)) - key[:, :, :, None]) * real
    slope = centred.flatten(2, 3).mT @ v
    share = -torch.expm1(lse - total)
    return (share * (scale / plan.tokens))[..., None] * (q @ slope)


class _Packed(torch.autograd.Function):
    """`pack`, for what leaves padding out. Its gradient adds up nothing, and so is the same from
    run to run on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return pack(x, plan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return unpack(grad, ctx.plan), None
