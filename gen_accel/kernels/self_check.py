"""Self-check: compare some rows of a kernel's answer with the reference, on the user's tensors."""

from collections.abc import Hashable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from gen_accel.kernels import reference
from gen_accel.kernels.base import Kernel
from gen_accel.plan import Plan, pack

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
        rows = _HeadRows(q, k, v, plan, 0, head, tokens, scale)
        exact, weights = rows.answer(torch.float64)
        low = rows.answer(torch.float32, rounded=q.dtype)[0].to(q.dtype)
        error = (out[0, head, tokens].double() - exact).abs().max().item()
        spacing = torch.finfo(q.dtype).eps * exact.abs().max().item()
        budget = 2 * ((low.double() - exact).abs().max().item() + spacing)
        if kernel is not None:
            budget += rows.allowed(kernel, weights)
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
        rows = _HeadRows(q, k, v, plan, sample, head, tokens, scale)
        found = max(found, rows.allowed(kernel, rows.answer(torch.float64)[1]))
    return found


def _check_finite(tensors: tuple[Tensor, Tensor, Tensor], head: int) -> None:
    for name, x in zip("qkv", tensors, strict=True):
        one = x[0, head]
        if bad := int((~one.isfinite()).sum()):
            raise NotFinite(
                f"{name} of head {head}, {x.dtype} on {x.device}, holds NaN or inf in {bad:,} of "
                f"{one.numel():,} numbers before any kernel has run: the cause is the model, its "
                "weights, dtype or input, not sparse attention; check those, try another "
                "dtype, or go on with self_check=False"
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
    rows = (_HeadRows(q, k, v, plan, 0, head, tokens, scale) for head in range(q.shape[1]))
    return torch.stack([one.answer(wide)[0] for one in rows]).to(q.dtype)


class _HeadRows(NamedTuple):
    """Some queries of one head, and everything that they may see.

    Args:
        q, k, v: (B, H, N, D).
        sample, head: of the queries.
        tokens: (R,) int64, the queries.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: Plan
    sample: int
    head: int
    tokens: Tensor
    scale: float

    def of_head(self, x: Tensor) -> Tensor:
        return x[self.sample, self.head][None, None]

    def answer(
        self, dtype: torch.dtype, rounded: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the reference's outputs, (R, D), and weights of the kept keys, (R, S), in
        `dtype`; `rounded` is as in `reference.attend`."""
        q, k, v = (self.of_head(x).to(dtype) for x in (self.q, self.k, self.v))
        asked = reference.Queries(self.plan.places[self.tokens], self.sample, self.head)
        with torch.autocast(q.device.type, enabled=False):
            out, _, weights = reference.attend(
                q, k, v, self.plan, asked, scale=self.scale, rounded=rounded
            )
        return out[0, 0], weights[0, 0]

    def allowed(self, kernel: Kernel, weights: Tensor) -> float:
        """Allowance of the kernel, by the weights of `answer` in fp64."""
        k, v = (pack(self.of_head(x), self.plan)[0, 0] for x in (self.k, self.v))
        q = self.q[self.sample, self.head, self.tokens]
        return kernel.allowance(q, k, v, weights, plan=self.plan, scale=self.scale)
