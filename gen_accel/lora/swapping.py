"""Blocks of a model whose frozen weights wait in CPU memory while a LoRA on it trains.

A block's weights come to the device for its forward pass, and again for the recomputation from
which its backward pass runs, so that gradient checkpointing is needed. Weights never change: they
are copied to the device, and the copy is dropped. Whatever trains stays on the device.

diffusers' group offloading is not used. It takes a block off the device at the end of the block's
forward pass, which a recomputation never reaches: torch ends it early, and after the backward pass
all blocks are on the device. It also moves a LoRA's parameters away from their gradients.
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gen_accel.lora.base import block_names

RESIDENT = 2  # most waiting blocks on the device: one at work, and the next


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """List the blocks with video attention, in the order in which they run."""
    return [transformer.get_submodule(name) for name in block_names(transformer)]


def check_blocks(count: int, transformer: nn.Module) -> None:
    """Raise ValueError for more blocks to swap than the model has."""
    have = len(blocks_of(transformer))
    if count > have:
        raise ValueError(
            f"blocks_to_swap must be at most {have}, the blocks of {type(transformer).__name__}, "
            f"got {count}"
        )


class Swapper:
    """Holder of the blocks that wait, evenly spread over the model.

    Args:
        module: what trains, with the model in it. It is moved to the device, but for the frozen
            weights of the blocks that wait.
        transformer: the model.
        count: number of blocks that wait, at least 1.

    Attributes:
        resident: numbers of those among them that are on the device now.
    """

    def __init__(
        self, module: nn.Module, transformer: nn.Module, count: int, device: torch.device
    ) -> None:
        check_blocks(count, transformer)
        blocks = blocks_of(transformer)
        self.device = device
        self.blocks = [blocks[(i + 1) * len(blocks) // count - 1] for i in range(count)]
        self._side = torch.Stream(device) if device.type == "cuda" else None
        self._waiting = [_frozen(block) for block in self.blocks]
        self._here: dict[int, _Copies] = {}
        with _without(self._waiting):
            module.to(device)
        for held in self._waiting:
            for place, parameter in held.items():
                scales = getattr(parameter, "quant_state", None)
                if scales is not None:  # of bitsandbytes, which stay on the device
                    scales.to(device)
                held[place] = _mapped(parameter, _to_host)
        self._put_back(range(count))
        for i, block in enumerate(self.blocks):
            block.register_forward_pre_hook(partial(self._before, i))

    @property
    def resident(self) -> tuple[int, ...]:
        return tuple(sorted(self._here))

    def _before(self, number: int, block: nn.Module, args: Any) -> None:
        """Bring a block's weights before it runs, let the earlier ones go, and fetch the next."""
        self._release(keep=number)
        self._fetch(number)
        self._here[number].arrive()
        # Backward passes come through the blocks from the last to the first.
        ahead = number - 1 if torch._C._current_graph_task_id() != -1 else number + 1
        if self._side is not None and 0 <= ahead < len(self.blocks):
            self._fetch(ahead)

    def _fetch(self, number: int) -> None:
        if number in self._here:
            return
        copies = self._here[number] = _Copies(self._waiting[number], self.device, self._side)
        for (module, name), parameter in copies.parameters.items():
            module._parameters[name] = parameter

    def _release(self, keep: int) -> None:
        gone = [number for number in self._here if number != keep]
        for number in gone:
            self._here.pop(number).arrive()  # nobody may take the memory that is still written
        self._put_back(gone)

    def _put_back(self, numbers: Any) -> None:
        for number in numbers:
            for (module, name), parameter in self._waiting[number].items():
                module._parameters[name] = parameter


Place = tuple[nn.Module, str]  # of a parameter: its module, and its name there


class _Copies:
    """Copies of a block's weights on the device, which a side stream may still be writing."""

    def __init__(
        self, waiting: dict[Place, nn.Parameter], device: torch.device, side: Any | None
    ) -> None:
        self._ready = None
        if side is None:
            self.parameters = copied(waiting, device)
            return
        # Memory comes from the stream that computes, which is to wait for the copies: so it may
        # be given back there at any time after `arrive`.
        pairs: list[tuple[Tensor, Tensor]] = []

        def room(t: Tensor) -> Tensor:
            pairs.append((torch.empty_like(t, device=device), t))
            return pairs[-1][0]

        self.parameters = {place: _mapped(x, room) for place, x in waiting.items()}
        side.wait_stream(torch.accelerator.current_stream(device))
        with side:
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        self._ready = side.record_event()

    def arrive(self) -> None:
        """Let the stream that computes wait until the copies are whole."""
        if self._ready is not None:
            torch.accelerator.current_stream().wait_event(self._ready)
            self._ready = None


def copied(waiting: dict[Place, nn.Parameter], device: torch.device) -> dict[Place, Any]:
    """Copy weights to a device, at once."""

    def copy_of(t: Tensor) -> Tensor:
        return torch.empty_like(t, device=device).copy_(t)

    return {place: _mapped(x, copy_of) for place, x in waiting.items()}


class _without:
    """A context in which modules lack the parameters given."""

    def __init__(self, held: list[dict[Place, nn.Parameter]]) -> None:
        self._held = held

    def __enter__(self) -> None:
        for parameters in self._held:
            for module, name in parameters:
                module._parameters[name] = None

    def __exit__(self, *raised: object) -> None:
        for parameters in self._held:
            for (module, name), parameter in parameters.items():
                module._parameters[name] = parameter


def _frozen(block: nn.Module) -> dict[Place, nn.Parameter]:
    return {
        (module, name): parameter
        for module in block.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.requires_grad
    }


def _mapped(parameter: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the plain tensors that a frozen parameter consists of, in a copy.

    What bitsandbytes keeps beside its weights, a few percent of them, stays on the device.
    """
    if is_traceable_wrapper_subclass(parameter):
        names, context = parameter.__tensor_flatten__()
        inner = {name: _mapped(getattr(parameter, name), change) for name in names}
        made = type(parameter).__tensor_unflatten__(
            inner, context, parameter.size(), parameter.stride()
        )
        return nn.Parameter(made, requires_grad=False)
    if type(parameter) is Tensor:
        return change(parameter)
    if type(parameter) is nn.Parameter:
        return nn.Parameter(change(parameter.data), requires_grad=False)
    made = copy(parameter)
    made.data = change(parameter.data)
    return made


def _to_host(x: Tensor) -> Tensor:
    host = x.cpu()
    return host.pin_memory() if torch.cuda.is_available() else host
