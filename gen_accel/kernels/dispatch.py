"""Code that runs the parts beside attention: the choice of blocks, the rest, the linear branch.

The kernel's name decides: "auto", "native" and "int8" take C++ where it is built and serves.
"auto", "triton" and "triton_int8" take a Triton kernel on a GPU that has it, the last two under
its interpreter too. Every other name takes torch alone.
"""

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from gen_accel.kernels import native, triton
from gen_accel.kernels.base import Facts, is_forward_mode
from gen_accel.kernels.lists import has_tiles
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
    if not torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
        return False
    return build.is_built()


def triton_serves(kernel: str, x: Tensor, dim: int = 0) -> bool:
    """Whether a Triton kernel runs for this tensor, (B, H, ...).

    Args:
        dim: head dim that the kernel multiplies.
    """
    named = kernel in ("triton", "triton_int8")
    asked = named or (kernel == "auto" and x.device.type == "cuda")
    if not asked or is_forward_mode():
        return False
    if x.dtype not in triton.DTYPES or x.shape[:2].numel() > triton.MOST_HEADS:
        return False
    return dim <= triton.LARGEST_DIM and not triton.device_reasons(x.device)


def faster_than_dense(facts: Facts) -> str | None:
    """Name a kernel that is as exact as torch's own attention and faster at whole blocks of all
    pairs; None where none is known.

    `native` is, on processors that multiply bf16 without tiles (AVX512_BF16): on two cores of an
    AMD EPYC 2.1 to 2.6 times as fast in bf16 and 1.1 to 1.3 in fp32, at 2,160 to 5,070 tokens and
    6 heads of 64. Torch's own is faster with tiles (AMX), in fp32 too, since MKL is fast there,
    see docs/performance.md; and on GPUs, where it runs what their makers tuned.
    """
    there = build.is_built() and native.multiplies_bf16() and not has_tiles(facts.device)
    return "native" if there and not native.kernel.unsupported(facts) else None
