"""Some rows of a kernel's answer, held to the reference on the user's own tensors."""

from collections.abc import Hashable
from typing import NamedTuple

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
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, out: Tensor, scale: float, kernel: str
    ) -> None:
        """`check_rows`, the first time."""
        if kernel == "reference" or (self.about, kernel) in self.known:
            return
        try:
            check_rows(q, k, v, plan, out, scale=scale, kernel=kernel)
        except SelfCheckFailed as error:
            if self.falls_back:
                self.known[self.about, kernel] = str(error)
            raise
        self.known[self.about, kernel] = None


@torch.no_grad()
def check_rows(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, out: Tensor, *, scale: float, kernel: str
) -> None:
    """Hold `out`, (B, H, N, D), to the reference on a sample of its rows. Waits for the device.

    The largest error against fp64 may be twice the error of the reference, whose weights and
    result are rounded to q's dtype, and one spacing of floats more.

    Raises:
        SelfCheckFailed: with the figures.
        NotFinite: q, k or v is not finite, so that no kernel could be.
    """
    count = min(ROWS, plan.tokens)
    tokens = torch.linspace(0, plan.tokens - 1, count, device=q.device).long()
    for head in sorted({0, q.shape[1] - 1}):
        one = [x[:1, head : head + 1] for x in (q, k, v)]
        _check_finite(one, head)
        allowed = _seen(plan, plan.places[tokens], head)
        rest = tokens, allowed, _gains(plan, plan.places[tokens], head), scale
        exact = _rows(one, torch.float64, plan, *rest, rounded=torch.float64)
        low = _rows(one, torch.float32, plan, *rest, rounded=q.dtype).to(q.dtype)
        error = (out[0, head, tokens].double() - exact).abs().max().item()
        spacing = torch.finfo(q.dtype).eps * exact.abs().max().item()
        budget = 2 * ((low.double() - exact).abs().max().item() + spacing)
        if not error <= budget:
            raise SelfCheckFailed(
                f"kernel {kernel!r} errs by {error:.2e} on q {tuple(q.shape)} {q.dtype} on "
                f"{q.device}, allowed are {budget:.2e}: use another kernel=, or self_check=False"
            )


def _check_finite(one: list[Tensor], head: int) -> None:
    for name, x in zip("qkv", one, strict=True):
        if bad := int((~x.isfinite()).sum()):
            raise NotFinite(
                f"{name} of head {head}, {x.dtype} on {x.device}, holds NaN or inf in {bad:,} of "
                f"{x.numel():,} numbers before any kernel has run: it is the model, its weights, "
                "dtype or input, and would be so without sparse attention; look there, try "
                "another torch_dtype, or go on with self_check=False"
            )


def _seen(plan: Plan, slots: Tensor, head: int) -> Tensor:
    """(rows, S) bool: what the queries in `slots` see, in one head of the first sample."""
    keep = plan.keep[0, head if plan.keep.shape[1] > 1 else 0]
    seen = keep[slots // plan.block_q].repeat_interleave(plan.block_k, -1) & plan.real
    if plan.partial is None:
        return seen
    keys = torch.arange(len(plan.slots), device=slots.device)
    allowed = plan.partial.allows(slots[:, None], keys)
    if allowed.ndim == 4:
        allowed = allowed[0, head if allowed.shape[1] > 1 else 0]
    return seen & allowed


def _gains(plan: Plan, slots: Tensor, head: int) -> Tensor | None:
    """(rows, S): the gains of the queries in `slots`, in one head of the first sample."""
    if plan.gain is None:
        return None
    gain = plan.gain[0, head if plan.gain.shape[1] > 1 else 0]
    return gain[slots // plan.block_q].repeat_interleave(plan.block_k, -1)


def _rows(
    one: list[Tensor],
    dtype: torch.dtype,
    plan: Plan,
    tokens: Tensor,
    allowed: Tensor,
    gains: Tensor | None,
    scale: float,
    *,
    rounded: torch.dtype,
) -> Tensor:
    """Attention in `dtype`, with weights that are `rounded` as tensor cores take them."""
    q, k, v = (x.to(dtype) for x in one)
    with torch.autocast(q.device.type, enabled=False):
        scores = q[0, 0, tokens] @ pack(k, plan)[0, 0].T * scale
        if gains is not None:
            scores = torch.where(scores > 0, scores * gains, scores)
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        weights = weights.where(allowed.any(-1, keepdim=True), 0.0)
        return weights.to(rounded).to(dtype) @ pack(v, plan)[0, 0]
