"""Tokens in the order of slots, with a gradient that is the same from run to run on a GPU."""

from typing import Any

import torch
from torch import Tensor

from gen_accel.plan import Plan, pack, unpack


class Packed(torch.autograd.Function):
    """`pack`, for callers that leave padding out: its gradient adds up nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return pack(x, plan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return unpack(grad, ctx.plan), None
