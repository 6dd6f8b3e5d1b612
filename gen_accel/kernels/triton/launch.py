"""Launch of Triton kernels, in one place."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.library import CustomOpDef

from gen_accel.kernels.base import is_forward_mode
from gen_accel.kernels.triton import configs

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

# Kernels that subtract a maximum from scaled scores. Fused with the product, which is then not
# rounded, vast scores would not match their maximum. Unfused costs no more, as the maximum is
# taken of the products.
APART = ("forward_kernel", "gathered_forward_kernel", "int8_forward_kernel")
PLAIN = Tensor, nn.Parameter  # no DTensor, nor another class of its own ways


def fuses(kernel: "JITFunction", constants: Mapping[str, object]) -> bool:
    """Whether products and sums of a kernel are fused. Over packed operands they are, where the
    maximum is taken before the scale."""
    return kernel.__name__ not in APART or bool(constants.get("PACKED"))


def operate(operator: CustomOpDef, *given: Any, **options: Any) -> Any:
    """Run an operator of this package: by its body alone where no graph, gradient, mode or
    transformation of torch is to see an operator, which saves the host a tenth of a millisecond.
    """
    if not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()):
        grad = torch.is_grad_enabled()
        is_plain = not is_forward_mode() and peek_interpreter_stack() is None
        for x in given:
            if isinstance(x, Tensor):
                is_plain &= type(x) in PLAIN and not (grad and x.requires_grad)
        if is_plain:
            return operator._init_fn(*given, **options)
    return operator(*given, **options)


def device_of(x: Tensor) -> torch.accelerator.device_index:
    """Make the device of `x` the current one; do nothing on the CPU."""
    return torch.accelerator.device_index(None if x.device.type == "cpu" else x.device.index)


def launch(
    kernel: "JITFunction",
    programs: tuple[int, int],
    x: Tensor,
    *arguments: object,
    **options: object,
) -> "CompiledKernel | None":
    """Launch a kernel on the device of `x`, with products and sums fused except in APART; newer
    versions of Triton fuse on request only. Triton by itself launches on the current device, which
    is another one where a model is on cuda:1.

    Returns:
        What ran; None under the interpreter.
    """
    with device_of(x):
        return kernel[programs](*arguments, enable_fp_fusion=fuses(kernel, options), **options)


class Repeated:
    """Kernel that is launched many times, with arguments that stay the same but for a few numbers
    on which Triton does not specialise.

    After the first time the compiled kernel is launched at once, without a look at the arguments,
    which costs the host more than short kernels take.

    Args:
        x, arguments, options: as in `launch`; numbers that change hold anything.
    """

    def __init__(
        self, kernel: "JITFunction", x: Tensor, *arguments: object, **options: object
    ) -> None:
        self._kernel, self._x, self._options = kernel, x, options
        self._arguments = list(arguments)
        self._compiled: CompiledKernel | None = None

    def __call__(self, programs: tuple[int, int], **numbers: int) -> None:
        """Launch it with these numbers, by the names of the kernel's arguments."""
        names = self._kernel.arg_names
        for name, number in numbers.items():
            self._arguments[names.index(name)] = number
        if self._compiled is None:
            given = self._x, *self._arguments
            self._compiled = launch(self._kernel, programs, *given, **self._options)
            if self._compiled is not None:
                self._arguments += [self._options[name] for name in names[len(self._arguments) :]]
            return
        with device_of(self._x):
            self._compiled[(*programs, 1)](*self._arguments)


TILE, WARPS = 32, 4  # rows that a program over whole rows holds at a time, and its warps


def launch_blocks(
    kernel: "JITFunction",
    x: Tensor,
    slots: Tensor,
    block: int,
    tensors: Sequence[Tensor | tuple[Tensor | int, ...]],
    *numbers: float,
    config: configs.LinearConfig | None = None,
    programs: int | None = None,
    **flags: int,
) -> None:
    """Launch a program for each block of each head, and with a config for each chunk of columns.

    Args:
        x: (B, H, N, D), of the sizes and the device of the call.
        slots: (S,) int32, the token of each slot, -1 for padding.
        block: slots in a block.
        tensors: arguments of the kernel before `slots`.
        numbers: its arguments after `slots`.
        programs: number of programs of a head and chunk, by default of blocks.
    """
    B, H, _, D = x.shape
    count = programs or len(slots) // block
    sizes = {"TILE": TILE, "num_warps": WARPS}
    if config is not None:
        chunk = min(config.chunk, configs.padded_dim(D))
        count *= -(-D // chunk)
        sizes = {"TILE": configs.tile(block, config.tile), "CHUNK": chunk}
        sizes |= {"num_warps": config.num_warps, "num_stages": 1}
    sizes |= {**configs.dims(D), "BLOCK": block, **flags}
    launch(kernel, (count, B * H), x, *tensors, slots, *numbers, **sizes)


def rows(*tensors: Tensor) -> Iterator[tuple[Tensor | int, ...]]:
    """Pass (B, H, N, D) tensors to a kernel with their strides but the last, which is 1."""
    return ((x, *x.stride()[:3]) for x in tensors)


def rowwise(x: Tensor) -> Tensor:
    """Make the numbers of a head contiguous; the kernels take all other strides as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def laid_out_alike(first: int, count: int = 3) -> Callable[..., tuple[Tensor, ...]]:
    """Make the fake of `base.alike`, whose results keep the strides of rows."""
    return lambda *given: tuple(map(torch.empty_like, map(rowwise, given[first : first + count])))


def results(q: Tensor, *_: object, wide: bool = False) -> tuple[Tensor, Tensor]:
    """Allocate a kernel's output, laid out like rows of q, in fp32 where `wide`, and a number for
    each row, (B, H, N) fp32. The fake of an operator that returns these."""
    out = torch.empty_like(rowwise(q), dtype=torch.float32 if wide else None)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)
