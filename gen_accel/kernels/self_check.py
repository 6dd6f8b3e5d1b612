"""Self-check: compare some rows of a kernel's answer with the reference, on the user's tensors."""

from collections.abc import Hashable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from gen_accel.kernels import reference
from gen_accel.kernels.base import Kernel
from gen_accel.plan import CURVATURE, MOST_GAINED, Plan, pack

ROWS = 64  # rows of the first and the last head of the first sample: a small part of one attention


class SelfCheckFailed(RuntimeError):
    """Error of a kernel that errs more than it may on this machine."""


class NotFinite(ValueError):
    """Error for NaN or inf in q, k or v before any kernel has run."""


class SelfCheck(NamedTuple):
    """Self-check of one call, with the results of earlier ones.

    Args:
        known: results of earlier checks, by `about` and the name of the kernel: None where it
            passed, else the words of its failure. Written into.
        about: everything that an answer depends on, except the kernel and the numbers.
        falls_back: whether a kernel that fails is passed over, with a warning.
    """

    known: dict[tuple[Hashable, str], str | None]
    about: Hashable
    falls_back: bool

    def distrusts(self, kernel: str) -> list[str]:
        """List the reasons why an earlier check speaks against a kernel; empty where none does."""
        words = self.known.get((self.about, kernel))
        return [] if words is None or not self.falls_back else [words]

    def check(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        out: Tensor,
        *,
        scale: float,
        name: str,
        kernel: Kernel,
    ) -> None:
        """Run `check_rows`, the first time."""
        if name == "reference" or (self.about, name) in self.known:
            return
        try:
            check_rows(q, k, v, plan, out, scale=scale, name=name, kernel=kernel)
        except SelfCheckFailed as error:
            if self.falls_back:
                self.known[self.about, name] = str(error)
            raise
        self.known[self.about, name] = None


@torch.no_grad()
def check_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    out: Tensor,
    *,
    scale: float,
    name: str,
    kernel: Kernel | None = None,
) -> None:
    """Compare `out`, (B, H, N, D), with the reference on a sample of its rows. Waits for the
    device.

    The largest error against fp64 may be twice the error of the reference plus one spacing of
    floats. The weights, the result, and the keys and values of the rest of that reference are
    rounded to q's dtype. An allowance of the kernel is added.

    Args:
        name: name of the kernel that ran.
        kernel: that kernel, for its allowance.

    Raises:
        SelfCheckFailed: the kernel errs more than that; with the figures.
        NotFinite: q, k or v is not finite, so that no kernel's answer could be.
    """
    count = min(ROWS, plan.tokens)
    tokens = torch.linspace(0, plan.tokens - 1, count, device=q.device).long()
    for head in sorted({0, q.shape[1] - 1}):
        _check_finite((q, k, v), head)
        rows = _rows(q, k, v, plan, 0, head, tokens, scale)
        exact = _answer(rows, torch.float64)
        low = _answer(rows, torch.float32, rounded=q.dtype).to(q.dtype)
        error = (out[0, head, tokens].double() - exact).abs().max().item()
        spacing = torch.finfo(q.dtype).eps * exact.abs().max().item()
        budget = 2 * ((low.double() - exact).abs().max().item() + spacing)
        if kernel is not None and kernel.has_allowance():
            budget += _allowed(kernel, rows)
        if not error <= budget:
            raise SelfCheckFailed(
                f"kernel {name!r} errs by {error:.2e} on q {tuple(q.shape)} {q.dtype} on "
                f"{q.device}, allowed are {budget:.2e}: use another kernel=, or self_check=False"
            )


@torch.no_grad()
def most_allowed(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
) -> float:
    """Largest allowance of a kernel for any query of a call, in units of v.

    Waits for the device, and holds the weights of a head in fp64: for small inputs.
    """
    found, tokens = 0.0, torch.arange(plan.tokens, device=q.device)
    for sample, head in product(*map(range, q.shape[:2])):
        rows = _rows(q, k, v, plan, sample, head, tokens, scale)
        found = max(found, _allowed(kernel, rows))
    return found


def _check_finite(tensors: tuple[Tensor, Tensor, Tensor], head: int) -> None:
    for name, x in zip("qkv", tensors, strict=True):
        one = x[0, head]
        if bad := int((~one.isfinite()).sum()):
            raise NotFinite(
                f"{name} of head {head}, {x.dtype} on {x.device}, holds NaN or inf in {bad:,} of "
                f"{one.numel():,} numbers before any kernel has run: the cause is the model, its "
                "weights, dtype or input, not sparse attention; check those, try another "
                "torch_dtype, or go on with self_check=False"
            )


@torch.no_grad()
def answer_of_rows(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, tokens: Tensor, *, scale: float
) -> Tensor:
    """Compute the reference's answer for some tokens of the first sample, (H, R, D) in q's dtype,
    in fp32 or wider.

    Args:
        tokens: (R,) int64.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = (_rows(q, k, v, plan, 0, head, tokens, scale) for head in range(q.shape[1]))
    return torch.stack([_answer(one, wide) for one in rows]).to(q.dtype)


class _Rows(NamedTuple):
    """Some queries of one head of a sample, and everything that they may see.

    Args:
        q: (R, D), and `slots` (R,), the slots of these queries.
        queries, keys, values: (S, D), of the whole head in slot order.
    """

    q: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    plan: Plan
    slots: Tensor
    sample: int
    head: int
    scale: float


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    sample: int,
    head: int,
    tokens: Tensor,
    scale: float,
) -> _Rows:
    queries, keys, values = (pack(x[sample, head][None, None], plan)[0, 0] for x in (q, k, v))
    whole, slots = (queries, keys, values), plan.places[tokens]
    return _Rows(q[sample, head, tokens], *whole, plan, slots, sample, head, scale)


def _allowed(kernel: Kernel, rows: _Rows) -> float:
    """Allowance by the weights of the kept keys, which sum to less than 1 beside a
    rest."""
    with torch.autocast(rows.q.device.type, enabled=False):
        weights = _weights(rows, torch.float64, _pooled(rows, torch.float64))
    kept = weights[:, : len(rows.keys)]
    return kernel.allowance(rows.q, rows.keys, rows.values, kept, plan=rows.plan, scale=rows.scale)


def _answer(rows: _Rows, dtype: torch.dtype, rounded: torch.dtype | None = None) -> Tensor:
    """Compute the answer of the rows, (R, D), in `dtype`.

    Args:
        rounded: dtype to which weights, and keys and values of the rest, are rounded, as tensor
            cores take them.
    """
    with torch.autocast(rows.q.device.type, enabled=False):
        rest = _pooled(rows, dtype)
        if rest is not None and rounded is not None:
            rest = rest._replace(
                keys=rest.keys.to(rounded).to(dtype), values=rest.values.to(rounded).to(dtype)
            )
        weights = _weights(rows, dtype, rest)
        if rounded is not None:
            weights = weights.to(rounded).to(dtype)
        kept, of_rest = weights[:, : len(rows.keys)], weights[:, len(rows.keys) :]
        out = kept @ rows.values.to(dtype)
        if rest is None:
            return out
        out = out + (of_rest[:, None] @ rest.values)[:, 0]
        if rest.slope is None:
            return out
        slope = rest.queries @ rest.slope * (rows.scale / rows.plan.tokens)
        return out + of_rest.sum(-1, keepdim=True) * slope


class _Pooled(NamedTuple):
    """Rest of a plan for some queries, see `Rest`; `reference.pooled` is for all of them.

    Args:
        queries: (R, D), the offset x of each query in `Rest`, which weighs the keys.
        keys, values: (R or 1, Kk, D).
        more: (R or 1, Kk), added to the scores; -inf for blocks that are kept or empty.
        slope: (D, D), H of `Rest`; None in zeroth order.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    more: Tensor
    slope: Tensor | None = None


def _pooled(rows: _Rows, dtype: torch.dtype) -> _Pooled | None:
    plan = rows.plan
    if plan.rest is None:
        return None
    q, keys, values = (x.to(dtype) for x in (rows.q, rows.keys, rows.values))
    keys, values = (x.unflatten(0, (-1, plan.block_k)) for x in (keys, values))
    real = plan.real.view(-1, plan.block_k, 1)
    count = real.sum(1)[:, 0]
    left_out = ~plan.keep_of(rows.sample, rows.head, rows.slots // plan.block_q) & (count > 0)
    key, value = ((x * real).sum(1) / count.clamp_min(1)[:, None] for x in (keys, values))
    slope = None
    if plan.rest.order != "zeroth":
        slope = ((keys - key[:, None]) * real).flatten(0, 1).T @ values.flatten(0, 1)
    if plan.rest.centre == "key":
        more = count.to(dtype).log().where(left_out, -torch.inf)
        return _Pooled(q, key[None], value[None], more, slope)
    blocks, row = (rows.slots // plan.block_q).unique(return_inverse=True)
    real_q = plan.real.view(-1, plan.block_q, 1)[blocks]
    query = rows.queries.unflatten(0, (-1, plan.block_q))[blocks].to(dtype)
    query = (query * real_q).sum(1) / real_q.sum(1)
    score = (query @ keys.flatten(0, 1).T * rows.scale).unflatten(1, (-1, plan.block_k))
    score = score.masked_fill(~real[..., 0], -torch.inf)
    weight = score.softmax(-1).where(real[..., 0], 0.0).transpose(0, 1)
    key, value = ((weight @ x).transpose(0, 1)[row] for x in (keys, values))
    more = score.logsumexp(-1)[row]
    if plan.rest.order == "second":
        more = more + _bent(rows, dtype, weight.transpose(0, 1)[row], key)
    return _Pooled(q - query[row], key, value, more.where(left_out, -torch.inf), slope)


def _bent(rows: _Rows, dtype: torch.dtype, shares: Tensor, key: Tensor) -> Tensor:
    """Compute the second order of `Rest`, (R, Kk).

    Args:
        shares: (R, Kk, block_k), the weights of the keys in the pooled key.
        key: (R, Kk, D), the pooled key.
    """
    plan = rows.plan
    queries = rows.queries.to(dtype).unflatten(0, (-1, plan.block_q))
    keys = rows.keys.to(dtype).unflatten(0, (-1, plan.block_k))
    held_q, held_k = (plan.real.view(-1, size).any(1) for size in (plan.block_q, plan.block_k))
    left_out = ~_pattern(plan.keep, rows.sample, rows.head) & held_q[:, None] & held_k
    a, w = reference.bend(queries, keys, left_out, plan, rows.scale)
    # Offsets from a number near to both; otherwise most digits would cancel.
    centre = keys.mean(1)
    squares = ((keys - centre[:, None]).square() * w).sum(-1)
    s = (shares * squares).sum(-1) - ((key - centre).square() * w).sum(-1)
    return (CURVATURE * a.flatten()[rows.slots, None] * s).clamp_max(MOST_GAINED)


def _weights(rows: _Rows, dtype: torch.dtype, rest: _Pooled | None) -> Tensor:
    """Softmax weights of the queries over the keys, (R, S), or (R, S + Kk) with those over the
    rest."""
    plan = rows.plan
    scores = rows.q.to(dtype) @ rows.keys.to(dtype).T * rows.scale
    if plan.gain is not None:
        gain = _pattern(plan.gain, rows.sample, rows.head)[rows.slots // plan.block_q]
        gain = gain.repeat_interleave(plan.block_k, -1)
        scores = torch.where(scores > 0, scores * gain, scores)
    allowed = _seen(rows)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if rest is not None:
        more = (rest.keys @ rest.queries[..., None])[..., 0] * rows.scale + rest.more
        scores = torch.cat([scores, more], -1)
        allowed = torch.cat([allowed, ~rest.more.isneginf()], -1)
    return scores.softmax(-1).where(allowed.any(-1, keepdim=True), 0.0)


def _pattern(x: Tensor, sample: int, head: int) -> Tensor:
    """Select one of B' x H' patterns, where 1 stands for all."""
    return x[sample if len(x) > 1 else 0, head if x.shape[1] > 1 else 0]


def _seen(rows: _Rows) -> Tensor:
    """Mask of the slots that each query sees, (R, S) bool."""
    plan, slots = rows.plan, rows.slots
    keep = plan.keep_of(rows.sample, rows.head, slots // plan.block_q)
    seen = keep.repeat_interleave(plan.block_k, -1) & plan.real
    if plan.partial is None:
        return seen
    keys = torch.arange(len(plan.slots), device=slots.device)
    allowed = plan.partial.allows(slots[:, None], keys)
    return seen & (_pattern(allowed, rows.sample, rows.head) if allowed.ndim == 4 else allowed)
