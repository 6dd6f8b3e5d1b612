"""Bytes of a model's frozen weights, by the options that hold them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from gen_accel.lora.base import block_names, linear_names
from gen_accel.lora.step_trace import Casting
from gen_accel.lora.swapping import RESIDENT
from gen_accel.lora.training_plan import Setting

# Bytes of a weight, with its share of the scales: in nf4 a byte for 64 weights.
BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 1 / 64}
# torch keeps the cast weights of a layer until its gradient is there; bitsandbytes casts again.
CASTING: dict[str, Casting] = {"bf16": "kept", "fp8": "kept", "int8": "kept", "nf4": "again"}


class Block(NamedTuple):
    """Weights of a block: elements of the linear layers that `base` applies to, of the largest of
    them, and the bytes of everything else."""

    linear: int
    largest: int
    rest: int


class Weights:
    """Bytes of a model's frozen weights, by the options that hold them.

    Args:
        model: on the meta device, in the dtype that it computes in.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.itemsize = dtype.itemsize
        self.whole = size_of(model)
        held = linear_names(model)
        self.blocks = [_block_of(model, name, held) for name in block_names(model)]

    def __call__(self, setting: Setting, *, shared: bool = False) -> int:
        """Bytes on the device.

        Args:
            shared: the device's memory is the host's, where nothing is fetched ahead.
        """
        loaded = sum(block.linear * self.itemsize + block.rest for block in self.blocks)
        held = sum(self._held(block, setting.base) for block in self.blocks)
        largest = max(self._waiting(setting), default=0)
        resident = min(setting.swap, 1 if shared else RESIDENT)
        return self.whole - loaded + held - self.waiting(setting) + resident * largest

    def waiting(self, setting: Setting) -> int:
        """Bytes that wait in the host's memory."""
        return sum(self._waiting(setting))

    def casting(self, base: str | None) -> Casting:
        """How weights are cast to compute with."""
        return "none" if self._bytes(base) == self.itemsize else CASTING[base or ""]

    @property
    def most_swapped(self) -> int:
        return len(self.blocks)

    def _held(self, block: Block, base: str | None) -> int:
        return round(block.linear * self._bytes(base)) + block.rest

    def _waiting(self, setting: Setting) -> list[int]:
        sizes = [self._held(block, setting.base) for block in self.blocks]
        count = setting.swap
        return [sizes[(i + 1) * len(sizes) // count - 1] for i in range(count)]

    def _bytes(self, base: str | None) -> float:
        """Bytes of a weight that `base` applies to."""
        return BYTES.get(base or "", float(self.itemsize))


def _block_of(model: nn.Module, name: str, held: Sequence[str]) -> Block:
    block = model.get_submodule(name)
    layers = [model.get_submodule(one) for one in held if one.startswith(f"{name}.")]
    linear: list[Any] = [layer.weight for layer in layers]
    sizes = [weight.numel() for weight in linear]
    rest = size_of(block) - sum(weight.numel() * weight.itemsize for weight in linear)
    return Block(sum(sizes), max(sizes), rest)


def size_of(model: nn.Module) -> int:
    values = [*model.parameters(), *model.buffers()]
    return sum(value.numel() * value.itemsize for value in values)
