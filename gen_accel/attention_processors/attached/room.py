"""Memory that a method will need from step to step, checked before it is allocated."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_accel.room import free_bytes, in_words

HOST = torch.device("cpu")


class Needed(NamedTuple):
    """Bytes remembered from one pass of a step: on the model's device, and on the host if that is
    another one."""

    device: int
    host: int


# The method of a layer, its heads and the dim of one.
Sites = Sequence[tuple[Any, int, int]]


def needed_by(sites: Sites, batch: int, tokens: int, itemsize: int) -> Needed:
    """Bytes that all layers remember of one pass.

    Args:
        itemsize: bytes of a number of their outputs.
    """
    device = host = 0
    for method, heads, dim in sites:
        memory, shape = method.step_state(), (batch, heads, tokens, dim)
        if memory is not None:
            device += memory.size(shape, itemsize)
            host += memory.host_size(shape, itemsize)
    return Needed(device, host)


def check_room(
    one: Needed, where: torch.device, *, method: Any, passes: int, learned: int
) -> None:
    """Raise ValueError, in one line, for more than is free.

    Args:
        one: for one pass.
        where: the model runs.
        passes: how many there are in a step; of them, `learned` are in memory already.
    """
    wanted = {where: one.device}
    wanted[HOST] = wanted.get(HOST, 0) + one.host
    for device, size in wanted.items():
        free = free_bytes(device) if size else None
        if free is not None and (passes - learned) * size > free:
            memory = method.step_state()
            assert memory is not None
            each = f"{passes} x {in_words(size)}, for each call of a step"
            raise ValueError(
                f"{type(method).__name__} has to remember {each}, and only {in_words(free)} are "
                f"free on {device}: {memory.for_less}"
            )


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the latents, the first tensor that a forward pass is given. They have a row for each
    sample, and lie on the device that computes even where weights are still offloaded."""
    given = (*args, *kwargs.values())
    return next((x for x in given if isinstance(x, Tensor) and x.ndim), None)
