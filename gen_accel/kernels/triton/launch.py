"""The one place where a Triton kernel is launched."""

from typing import Any

import torch
from torch import Tensor

# Kernels that subtract a maximum from scaled scores. In one instruction with the product, which it
# does not round, vast scores would be off their maximum; apart they cost no more, as the maximum
# is taken of the products.
APART = ("forward_kernel", "gathered_forward_kernel")


def fuses(kernel: Any) -> bool:
    """Whether products and sums of a kernel are fused."""
    return kernel.__name__ not in APART


def device_of(x: Tensor) -> torch.accelerator.device_index:
    """A context in which the device of `x` is the current one; nothing on the CPU."""
    return torch.accelerator.device_index(None if x.device.type == "cpu" else x.device.index)


def launch(
    kernel: Any, programs: tuple[int, int], x: Tensor, *arguments: Any, **options: Any
) -> None:
    """Launch a kernel on the device of `x`, with products and sums fused, which newer versions of
    Triton do where asked alone, but of those in APART. Triton by itself launches on the current
    device, which is another one where a model lies on cuda:1."""
    with device_of(x):
        kernel[programs](*arguments, enable_fp_fusion=fuses(kernel), **options)


def rowwise(x: Tensor) -> Tensor:
    """The kernels take any strides but one: the numbers of a head lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_out(q: Tensor, wide: bool) -> Tensor:
    """A tensor laid out like q for what a kernel puts out, in fp32 where it is `wide`."""
    return torch.empty_like(q, dtype=torch.float32 if wide else None)
