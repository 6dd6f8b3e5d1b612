"""Context parallelism in training: processes that share a clip, each with some of its tokens.

All processes of a group take the same clip, noise and noise level. diffusers gathers the
prediction, so that each computes the loss of the whole clip. Backwards, each follows its own
tokens through the layers and its own heads through attention. The gradient of a clip is therefore
the sum over its group:

    dL/dp = sum over processes r of the group of (dL/dp through the tokens and heads of r)

Over groups it is the mean, as without context parallelism. Accelerate averages over all
processes, which is a factor of 1 / size too little, and the loss is multiplied by the size of a
group before its backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.context_parallel_plans import context_parallel_plan
from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.lora.config import TrainConfig

CONFIG = "configs/accelerate/context_parallel.yaml"


@dataclass(frozen=True)
class Groups:
    """Groups of processes, of which each takes clips of its own.

    Args:
        count: number of groups.
        number: this process's group.
        place: this process's place in its group, from 0.
        size: processes of a group.
    """

    count: int
    number: int
    place: int
    size: int

    @classmethod
    def of(cls, config: TrainConfig, accelerator: Any) -> "Groups":
        size = config.context_parallel
        number, place = divmod(accelerator.process_index, size)
        return cls(accelerator.num_processes // size, number, place, size)

    def summed(self, loss: Tensor) -> Tensor:
        """Scale a loss so that the mean of its gradients over all processes is the sum over each
        group, averaged over groups."""
        return loss if self.size == 1 else loss * self.size


def check_groups(config: TrainConfig, processes: int) -> None:
    """Refuse, by a ValueError, a number of processes that does not make up groups."""
    size = config.context_parallel
    if processes % size:
        raise ValueError(
            f"context_parallel {size} takes a multiple of {size} processes, got {processes}: "
            f"start them by accelerate launch --config_file {CONFIG} --num_processes {size}"
        )


def check_model(config: TrainConfig, transformer: nn.Module) -> None:
    """Refuse, by a ValueError, a model or method that cannot be split over processes.

    Args:
        transformer: may be on the meta device.
    """
    size = config.context_parallel
    if size == 1:
        return
    context_parallel_plan(transformer)
    heads = {site.heads for site in family_of(transformer).self_attentions(transformer)}
    uneven = [count for count in sorted(heads) if count % size]
    if uneven:
        raise ValueError(
            f"context_parallel {size} does not divide the {uneven[0]} heads of "
            f"{type(transformer).__name__}: take a divisor of them"
        )
    alone = method_from(config.method, config.settings).needs_all_heads
    if alone:
        raise ValueError(f"context_parallel does not take {alone}")


def check_tokens(config: TrainConfig, frames: int, pixels: tuple[int, int], tokens: int) -> None:
    """Refuse, by a ValueError, a clip whose tokens do not split evenly.

    Args:
        frames: pixel frames of the clip.
        pixels: its height and width.
        tokens: tokens of its grid.
    """
    size = config.context_parallel
    if tokens % size:
        raise ValueError(
            f"context_parallel {size} does not divide the {tokens} tokens of {frames} frames of "
            f"{pixels[0]} x {pixels[1]}: change the size or the frames"
        )


def share(transformer: Any, groups: Groups, device: torch.device) -> None:
    """Split a model's tokens over the processes of each group.

    Attention to texts stays within each process, which has the whole text: diffusers would
    exchange it in some models, and lose its gradient.
    """
    if groups.size == 1:
        return
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    names = ("group", "ring", "ulysses")
    mesh = init_device_mesh(device.type, (groups.count, 1, groups.size), mesh_dim_names=names)
    config = ContextParallelConfig(ulysses_degree=groups.size, mesh=mesh)
    plan = context_parallel_plan(transformer)
    with _devices_counted():
        transformer.enable_parallelism(config=config, cp_plan=plan)
    own = {id(site.module) for site in family_of(transformer).self_attentions(transformer)}
    for module in transformer.modules():
        processor = getattr(module, "processor", None)
        if id(module) not in own and getattr(processor, "_parallel_config", None) is not None:
            module.processor._parallel_config = None


@contextmanager
def _devices_counted() -> Iterator[None]:
    """Let a machine without an accelerator count one: diffusers divides by the number."""
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: max(count(), 1)
    try:
        yield
    finally:
        torch.accelerator.device_count = count
