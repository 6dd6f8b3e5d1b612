"""How far attention errs that multiplies rounded numbers.

A number that is rounded at a step of h errs by h / sqrt(12), and independently of the others. Each
kernel that rounds knows its steps; here is what they do to an output.
"""

import torch
from torch import Tensor

STEPS = 127  # from 0 to the largest of some numbers in 8 bits
# Standard deviations of the error: the largest of 1e8 numbers from a normal distribution.
DEVIATIONS = 6
HELD = 1 << 24  # numbers that `_moments` holds at once


def of_scores(q: Tensor, keys: Tensor, v: Tensor, w: Tensor, *, scale: float) -> Tensor:
    """Twelve times the variance of each output, (R, D), since queries and keys are rounded to
    STEPS.

    To first order, an error e of a score moves the output o = sum w v by w e (v - o), so that

        12 var o = h_q^2 scale^2 |sum w (v - o) k'|^2 + sum h_k^2 scale^2 |q|^2 w^2 (v - o)^2

    with k' the keys off what is added back exactly. Beyond first order a weight is off by the
    factor exp(e), so that with x = var e both terms grow by (exp(2x) - 2 exp(x / 2) + 1) / x, here
    at the largest x of a query.

    Args:
        q: (R, D) in fp64, some queries of one head.
        keys, v: (S, D) in fp64, in the order of the slots; zero for padding.
        w: (R, S) in fp64, the softmax weights of the queries.
    """
    out = w @ v
    h_q, h_k = (x.abs().amax(-1) / STEPS for x in (q, keys))
    moved = _moments(w, v, keys) - out[..., None] * (w @ keys)[:, None]
    of_q = (h_q * scale)[:, None].square() * moved.square().sum(-1)
    far = (w * h_k).square()
    of_k = far @ v.square() - 2 * out * (far @ v) + out.square() * far.sum(-1, keepdim=True)
    of_k = of_k.clamp_min(0) * scale**2 * q.square().sum(-1, keepdim=True)
    x = h_k.square() * q.square().sum(-1, keepdim=True)
    x = x + h_q[:, None].square() * keys.square().sum(-1)
    x = (x * (w > 0)).amax(-1, keepdim=True) * scale**2 / 12
    x = x.clamp(1e-6, 100)  # where too near to 0 to divide by, or past all bounds
    growth = ((2 * x).exp() - 2 * (x / 2).exp() + 1) / x
    return (of_q + of_k) * growth


def largest(deviations: Tensor, v: Tensor) -> float:
    """Bound the error of outputs with these standard deviations, (R, D): at most the range of a
    channel of the values, (S, D), since an output is a mean of them."""
    span = v.amax(0) - v.amin(0)
    return torch.minimum(DEVIATIONS * deviations, span.double()).max().item()


def _moments(w: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """Sum w v k' over the keys, (R, D, D)."""
    some = max(1, HELD // max(1, v.numel()))
    return torch.cat([(rows[:, None] * v.T) @ keys for rows in w.split(some)])
