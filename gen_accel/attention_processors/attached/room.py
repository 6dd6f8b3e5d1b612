"""Room for what a method remembers, asked for before it is there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_accel.method import memory_of

HOST = torch.device("cpu")
GROUP = Path("/sys/fs/cgroup")


class Needed(NamedTuple):
    """Bytes that are remembered of one pass in a step: on a model's device, and on the host where
    that is another."""

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
        memory, shape = memory_of(method), (batch, heads, tokens, dim)
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
            memory = memory_of(method)
            assert memory is not None
            each = f"{passes} x {as_gigabytes(size)}, for each call of a step"
            raise ValueError(
                f"{type(method).__name__} is to remember {each}, and {as_gigabytes(free)} are "
                f"free on {device}: {memory.for_less}"
            )


def as_gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where nobody tells. Of a GPU, with those that
    torch holds and does not use."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return _free_of_host() if device.type == "cpu" else None


def _free_of_host() -> int | None:
    """Bytes that Linux has left within the limit of the container; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        rows = dict(line.split(":", 1) for line in lines)
        free = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    limit, used = (_number_in(GROUP / f"memory.{name}") for name in ("max", "current"))
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _number_in(file: Path) -> int | None:
    """Number in a file; None where there is no such file, or no limit, which is written "max"."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Latents, which a forward pass is given first: a row for each sample, on the device that
    computes, where weights may still be elsewhere."""
    given = (*args, *kwargs.values())
    return next((x for x in given if isinstance(x, Tensor) and x.ndim), None)
