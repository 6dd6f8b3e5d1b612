"""Some rows of a kernel's answer, held to the reference on the user's own tensors."""

from itertools import product

import torch
from torch import Tensor

from gen_accel.kernels import kernel_of
from gen_accel.kernels.contract import KernelParts, parts_of
from gen_accel.plan import Plan, pack

ROWS = 64  # of the first and the last head of the first sample: a small share of one attention


class SelfCheckFailed(RuntimeError):
    """A kernel errs more than it may on this machine."""


@torch.no_grad()
def check_rows(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, out: Tensor, *, scale: float, kernel: str
) -> None:
    """Hold `out`, (B, H, N, D), to the reference on a sample of its rows. Waits for the device.

    The largest error against fp64 may be twice that of the reference in q's dtype, and one spacing
    of floats more; where a kernel has an allowance, by that more.

    Args:
        kernel: the name of the one that ran, or "auto".

    Raises:
        SelfCheckFailed: with the figures.
    """
    count = min(ROWS, plan.tokens)
    tokens = torch.linspace(0, plan.tokens - 1, count, device=q.device).long()
    for head in sorted({0, q.shape[1] - 1}):
        one = _head(q, k, v, plan, 0, head, tokens)
        rest = plan, plan.places[tokens], 0, head, scale
        exact = _weights(one, torch.float64, *rest) @ one[2].double()
        low = (_weights(one, torch.float32, *rest) @ one[2].float()).to(q.dtype)
        error = (out[0, head, tokens].double() - exact).abs().max().item()
        spacing = torch.finfo(q.dtype).eps * exact.abs().max().item()
        budget = 2 * ((low.double() - exact).abs().max().item() + spacing)
        budget += _allowance(kernel, one, *rest)
        if not error <= budget:
            raise SelfCheckFailed(
                f"kernel {kernel!r} errs by {error:.2e} on q {tuple(q.shape)} {q.dtype} on "
                f"{q.device}, allowed are {budget:.2e}: use another kernel=, or self_check=False"
            )


@torch.no_grad()
def allowance(kernel: str, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float) -> float:
    """The largest allowance of a kernel for any query of a call, in units of v: see `KernelParts`.

    Waits for the device, and holds the weights of a head in fp64: for small inputs.
    """
    if not _rounds_coarsely(kernel):
        return 0.0
    found = 0.0
    for sample, head in product(*map(range, q.shape[:2])):
        one = _head(q, k, v, plan, sample, head, torch.arange(plan.tokens, device=q.device))
        found = max(found, _allowance(kernel, one, plan, plan.places, sample, head, scale))
    return found


def _rounds_coarsely(kernel: str) -> bool:
    if kernel == "auto":  # takes none that does
        return False
    default = KernelParts._field_defaults["allowance"]
    return parts_of(kernel_of(kernel)).allowance is not default


Head = tuple[Tensor, Tensor, Tensor]  # some queries (R, D), keys and values in slot order (S, D)


def _head(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, sample: int, head: int, tokens: Tensor
) -> Head:
    keys, values = (pack(x[sample, head][None, None], plan)[0, 0] for x in (k, v))
    return q[sample, head, tokens], keys, values


def _allowance(
    kernel: str, one: Head, plan: Plan, slots: Tensor, sample: int, head: int, scale: float
) -> float:
    if not _rounds_coarsely(kernel):
        return 0.0
    weights = _weights(one, torch.float64, plan, slots, sample, head, scale)
    return parts_of(kernel_of(kernel)).allowance(*one, weights, plan=plan, scale=scale)


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
        return scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)


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
