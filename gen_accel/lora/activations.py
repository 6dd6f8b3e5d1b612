"""Gradient checkpointing, by block and by the parts of a block, also with the inputs that it keeps
in CPU memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gen_accel.lora.parts import run_in_parts


def checkpoint_activations(transformer: Any, kind: str, *, parts: bool = False) -> None:
    """Let a model of diffusers keep each block's inputs only, and compute the rest again.

    Args:
        kind: "off"; "on"; or "offload", by which the inputs wait in CPU memory, pinned where there
            is a GPU.
        parts: whether the parts of a block keep their inputs only as well.
    """
    match kind:
        case "on" if not parts:
            transformer.enable_gradient_checkpointing()
        case "on":
            transformer.enable_gradient_checkpointing(checkpoint_in_parts)
        case "offload":
            run = partial(checkpoint_offloaded, in_parts=parts)
            transformer.enable_gradient_checkpointing(run)


def checkpoint_in_parts(module: nn.Module, *args: Any) -> Any:
    """Run `module` as `torch.utils.checkpoint` does, and each of its parts likewise."""
    return checkpoint(partial(run_in_parts, module), *args, use_reentrant=False)


def checkpoint_offloaded(module: nn.Module, *args: Any, in_parts: bool = False) -> Any:
    """Run `module` as `torch.utils.checkpoint` does, with those inputs in CPU memory that carry a
    gradient. Others, such as a text that all blocks read, are the same for all blocks.

    Args:
        in_parts: whether each of its parts keeps its inputs only as well.
    """
    carrying = {(x.data_ptr(), x.shape) for x in args if isinstance(x, Tensor) and x.requires_grad}
    pack = _packer(lambda x: (x.data_ptr(), x.shape) in carrying)
    run = partial(run_in_parts, module) if in_parts else module.__call__
    # Applies to the inputs alone: inside of the checkpoint torch's own hooks are in force.
    with saved_tensors_hooks(pack, _unpack):
        return checkpoint(run, *args, use_reentrant=False)


def _packer(is_moved: Callable[[Tensor], bool]) -> Callable[[Tensor], Any]:
    def pack(x: Tensor) -> Any:
        return (x.device, to_host(x)) if is_moved(x) else x

    return pack


def to_host(x: Tensor) -> Tensor:
    """Copy a tensor into CPU memory, in the order of the device's stream."""
    pinned = x.device.type == "cuda"
    host = torch.empty_like(x, device="cpu", pin_memory=pinned)
    return host.copy_(x, non_blocking=pinned)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    return host.to(device, non_blocking=True)
