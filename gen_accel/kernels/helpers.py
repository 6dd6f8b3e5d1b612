"""Code that runs the parts beside attention, the choice of blocks and the linear branch.

The kernel's name decides: "auto", "native" and "int8" take C++ where it is built and serves.
"auto" and "triton" take a Triton kernel on a GPU that has it, "triton" under its interpreter too.
Every other name takes torch alone.
"""

from typing import Any

import torch
from torch import Tensor

from gen_accel.kernels import triton
from gen_accel.kernels.base import is_forward_mode
from gen_accel.kernels.native import build
from gen_accel.kernels.native.arguments import DTYPES


def native_serves(kernel: str, *tensors: Tensor) -> bool:
    """Whether C++ runs for these tensors. Not under `torch.func` and forward-mode differentiation,
    which C++ does not support."""
    if kernel not in ("auto", "native", "int8"):
        return False
    dtype = tensors[0].dtype
    if dtype not in DTYPES or is_forward_mode():
        return False
    for x in tensors:
        if x.dtype != dtype or x.device.type != "cpu":
            return False
    if not torch.compiler.is_compiling():
        functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
        if functorch.peek_interpreter_stack() is not None:
            return False
    return build.is_built()


def triton_serves(kernel: str, x: Tensor, dim: int = 0) -> bool:
    """Whether a Triton kernel runs for this tensor, (B, H, ...).

    Args:
        dim: head dim that the kernel multiplies.
    """
    asked = kernel == "triton" or (kernel == "auto" and x.device.type == "cuda")
    if not asked or is_forward_mode():
        return False
    if x.dtype not in triton.DTYPES or x.shape[:2].numel() > triton.MOST_HEADS:
        return False
    if dim > triton.LARGEST_DIM:
        return False
    return not triton.device_reasons(x.device)
