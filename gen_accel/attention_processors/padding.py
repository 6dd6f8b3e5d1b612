"""Attention to padded text, whose equal last keys are counted once.

Pipelines pad every prompt to one length, Wan's to 512 tokens of zeros, and some mask none of the
padding. Its keys are equal then, and so are its values. Softmax over n equal keys is softmax over
one of them with ln n added to its score, so that the answer is the same to rounding, for a
fraction of the work.

Nothing is assumed of a model: equal keys and values are looked for in each call.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from gen_accel.attention_processors.seam import Call
from gen_accel.kernels import as_autocast
from gen_accel.kernels.base import is_forward_mode

MOST_LEFT = 0.5  # share of the keys that may be left for the shorter form to run


def equal_tail(*tensors: Tensor) -> int:
    """Number of last tokens that are equal in all of some tensors, (B, N, H, D), in every sample
    and head. 0 for NaN. Waits for the device."""
    least = tensors[0].shape[1]
    for x in tensors:
        last = x[:, -1:]
        if not torch.equal(x[:, -2:], last.expand_as(x[:, -2:])):  # most calls end here
            return 0
        others = (x != last).flatten(2).any(2).any(0)
        least = min(least, int(others.flip(0).to(torch.int8).argmax()) if others.any() else least)
    return least


def attend_once(call: Call) -> tuple[Tensor, int] | None:
    """Compute a call with its equal last keys as one; None for a call without enough of them.

    Gradients are the ones of the whole call: each of the equal keys gets an equal share.

    Returns:
        (B, N, H, D), and the number of keys that were left.
    """
    plain = call.mask is None and not call.refused and call.parallel is None
    if not plain or call.k.device.type != "cpu":  # on a GPU each comparison would be waited for
        return None
    q, k, v = as_autocast(call.q, call.k, call.v)
    if not q.dtype == k.dtype == v.dtype:
        return None
    if type(k) is not Tensor or is_forward_mode() or peek_interpreter_stack() is not None:
        return None  # nothing to read
    count = equal_tail(k, v)
    left = k.shape[1] - count + 1
    if left > MOST_LEFT * k.shape[1]:
        return None
    # A mask may be fp32 beside halves, which would round it too coarsely.
    bias = q.new_zeros(left, dtype=torch.promote_types(q.dtype, torch.float32))
    bias[-1] = math.log(count)
    q, k, v, bias = q.transpose(1, 2), _once(k, left), _once(v, left), bias.view(1, 1, 1, left)
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q, k, v, bias, scale=call.scale)
    return out.transpose(1, 2), left


def _once(x: Tensor, left: int) -> Tensor:
    """(B, N, H, D) to (B, H, left, D), the equal last tokens as one."""
    tail = x[:, left - 1 :]
    if torch.is_grad_enabled() and x.requires_grad:
        one = tail.mean(1, keepdim=True)  # whose gradient is shared by all of them
    else:
        one = tail[:, -1:]
    return torch.cat([x[:, : left - 1], one], 1).transpose(1, 2)
