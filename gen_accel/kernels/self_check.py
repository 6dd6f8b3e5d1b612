"""Some rows of a kernel's answer, held to the reference on the user's own tensors."""

from collections.abc import Callable, Hashable
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_accel.plan import Plan, pack

ROWS = 64  # of the first and the last head of the first sample: a small share of one attention


class SelfCheckFailed(RuntimeError):
    """A kernel errs more than it may on this machine."""


class NotFinite(ValueError):
    """q, k or v holds NaN or inf before any kernel has run."""


class SelfCheck(NamedTuple):
    """The self-check of one call, and what it knows from others.

    Args:
        known: what came of earlier checks, by `about` and the name of the kernel: None where it
            passed, else the words of what it failed by. Written into.
        about: all that an answer depends on, but for the kernel and the numbers.
        falls_back: a kernel that fails is passed over, with a warning.
    """

    known: dict[tuple[Hashable, str], str | None]
    about: Hashable
    falls_back: bool

    def distrusts(self, kernel: str) -> list[str]:
        """Why an earlier check speaks against running a kernel; empty where none does."""
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
        kernel: str,
        allowance: Callable[..., float],
    ) -> None:
        """`check_rows`, the first time."""
        if kernel == "reference" or (self.about, kernel) in self.known:
            return
        try:
            facts: dict[str, Any] = {"scale": scale, "kernel": kernel, "allowance": allowance}
            check_rows(q, k, v, plan, out, **facts)
        except SelfCheckFailed as error:
            if self.falls_back:
                self.known[self.about, kernel] = str(error)
            raise
        self.known[self.about, kernel] = None


@torch.no_grad()
def check_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    out: Tensor,
    *,
    scale: float,
    kernel: str,
    allowance: Callable[..., float] | None = None,
) -> None:
    """Hold `out`, (B, H, N, D), to the reference on a sample of its rows. Waits for the device.

    The largest error against fp64 may be twice the error of the reference, whose weights and
    result are rounded to q's dtype, and one spacing of floats more; where a kernel has an
    allowance, by that more.

    Args:
        kernel: the name of the one that ran.
        allowance: of that kernel, where it has one: see `contract.KernelParts`.

    Raises:
        SelfCheckFailed: with the figures.
        NotFinite: q, k or v is not finite, so that no kernel could be.
    """
    count = min(ROWS, plan.tokens)
    tokens = torch.linspace(0, plan.tokens - 1, count, device=q.device).long()
    for head in sorted({0, q.shape[1] - 1}):
        _check_finite((q, k, v), head)
        one = _head(q, k, v, plan, 0, head, tokens)
        rest = plan, plan.places[tokens], 0, head, scale
        exact = _weights(one, torch.float64, *rest) @ one[2].double()
        rounded = _weights(one, torch.float32, *rest).to(q.dtype)  # as tensor cores take them
        low = (rounded.float() @ one[2].float()).to(q.dtype)
        error = (out[0, head, tokens].double() - exact).abs().max().item()
        spacing = torch.finfo(q.dtype).eps * exact.abs().max().item()
        budget = 2 * ((low.double() - exact).abs().max().item() + spacing)
        if allowance is not None:
            budget += _allowed(allowance, one, *rest)
        if not error <= budget:
            raise SelfCheckFailed(
                f"kernel {kernel!r} errs by {error:.2e} on q {tuple(q.shape)} {q.dtype} on "
                f"{q.device}, allowed are {budget:.2e}: use another kernel=, or self_check=False"
            )


@torch.no_grad()
def most_allowed(
    allowance: Callable[..., float],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
) -> float:
    """The largest allowance of a kernel for any query of a call, in units of v.

    Waits for the device, and holds the weights of a head in fp64: for small inputs.

    Args:
        allowance: of the kernel, see `contract.KernelParts`.
    """
    found = 0.0
    for sample, head in product(*map(range, q.shape[:2])):
        one = _head(q, k, v, plan, sample, head, torch.arange(plan.tokens, device=q.device))
        rest = plan, plan.places, sample, head, scale
        found = max(found, _allowed(allowance, one, *rest))
    return found


def _check_finite(tensors: tuple[Tensor, Tensor, Tensor], head: int) -> None:
    for name, x in zip("qkv", tensors, strict=True):
        one = x[0, head]
        if bad := int((~one.isfinite()).sum()):
            raise NotFinite(
                f"{name} of head {head}, {x.dtype} on {x.device}, holds NaN or inf in {bad:,} of "
                f"{one.numel():,} numbers before any kernel has run: it is the model, its "
                "weights, dtype or input, and would be so without sparse attention; look there, "
                "try another torch_dtype, or go on with self_check=False"
            )


Head = tuple[Tensor, Tensor, Tensor]  # some queries (R, D), keys and values in slot order (S, D)


def _head(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, sample: int, head: int, tokens: Tensor
) -> Head:
    keys, values = (pack(x[sample, head][None, None], plan)[0, 0] for x in (k, v))
    return q[sample, head, tokens], keys, values


def _allowed(
    allowance: Callable[..., float],
    one: Head,
    plan: Plan,
    slots: Tensor,
    sample: int,
    head: int,
    scale: float,
) -> float:
    weights = _weights(one, torch.float64, plan, slots, sample, head, scale)
    return allowance(*one, weights, plan=plan, scale=scale)


def _weights(
    one: Head,
    dtype: torch.dtype,
    plan: Plan,
    slots: Tensor,
    sample: int,
    head: int,
    scale: float,
) -> Tensor:
    """(R, S), what the queries in `slots` weigh the keys by."""
    q, keys = (x.to(dtype) for x in one[:2])
    with torch.autocast(q.device.type, enabled=False):
        scores = q @ keys.T * scale
        if plan.gain is not None:
            gain = _pattern(plan.gain, sample, head)[slots // plan.block_q]
            gain = gain.repeat_interleave(plan.block_k, -1)
            scores = torch.where(scores > 0, scores * gain, scores)
        allowed = _seen(plan, slots, sample, head)
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return weights.where(allowed.any(-1, keepdim=True), 0.0)


def _pattern(x: Tensor, sample: int, head: int) -> Tensor:
    """One of B' x H' patterns, of which 1 stands for all."""
    return x[sample if len(x) > 1 else 0, head if x.shape[1] > 1 else 0]


def _seen(plan: Plan, slots: Tensor, sample: int, head: int) -> Tensor:
    """(R, S) bool: what the queries in `slots` see, in one head of a sample."""
    keep = _pattern(plan.keep, sample, head)
    seen = keep[slots // plan.block_q].repeat_interleave(plan.block_k, -1) & plan.real
    if plan.partial is None:
        return seen
    keys = torch.arange(len(plan.slots), device=slots.device)
    allowed = plan.partial.allows(slots[:, None], keys)
    return seen & (_pattern(allowed, sample, head) if allowed.ndim == 4 else allowed)
