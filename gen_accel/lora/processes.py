"""The processes of a training: its Accelerator, work of the main one alone, context parallelism.

Processes of a context-parallel group share a clip, each with some of its tokens. All of a group
take the same clip, noise and noise level. diffusers gathers the prediction, so that each computes
the loss of the whole clip. Backwards, each follows its own tokens through the layers and its own
heads through attention. The gradient of a clip is therefore the sum over its group:

    dL/dp = sum over processes r of the group of (dL/dp through the tokens and heads of r)

Over groups it is the mean, as without context parallelism. Accelerate averages over all
processes, which is a factor of 1 / size too little, and the loss is multiplied by the size of a
group before its backward pass.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.context_parallel import context_parallel_plan
from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.io import clear_partial
from gen_accel.lora.config import LOGS, TrainConfig
from gen_accel.process import locked, unwinding
from gen_accel.registry import needed_for

with needed_for("training", extra="train"):
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import (
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
        broadcast_object_list,
    )

if TYPE_CHECKING:
    from diffusers import ModelMixin

CONFIG = "configs/accelerate/context_parallel.yaml"


def accelerator_for(config: TrainConfig) -> Accelerator:
    """Build the Accelerator of a run. Raises ValueError for options that do not go with the way
    in which the processes were launched."""
    if not torch.distributed.is_initialized():  # else a second run keeps the first one's precision
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        # As a plugin: a plain number would be replaced by the launcher's.
        gradient_accumulation_plugin=GradientAccumulationPlugin(config.gradient_accumulation),
        log_with=config.tracker,
        project_dir=str(Path(config.out) / LOGS),
        # Stated here, as a launcher of several processes does not pass it on.
        cpu=config.device == "cpu" or not torch.accelerator.is_available(),
        step_scheduler_with_optimizer=False,
        # The others wait while one process encodes the clips.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    check_processes(config, accelerator.distributed_type.value)
    check_groups(config, accelerator.num_processes)
    if config.tracker is None and config.log_with != "none" and accelerator.is_main_process:
        warnings.warn(
            f"{config.log_with} is not installed: curves are in {config.out}/metrics.jsonl alone",
            stacklevel=2,
        )
    on_cpu = accelerator.device.type == "cpu"
    if config.mixed_precision == "fp16" and on_cpu:
        raise ValueError("mixed_precision fp16 needs a GPU: take bf16 or no")
    # AVX2 alone does not multiply in bfloat16.
    is_slow = on_cpu and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if config.mixed_precision == "bf16" and is_slow and accelerator.is_main_process:
        warnings.warn(
            "this CPU has no AVX-512, and multiplies in bfloat16 some ten times slower than in "
            "float32: take mixed_precision no",
            stacklevel=2,
        )
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation,
            "gradient_clipping": config.max_grad_norm,
        }
    return accelerator


def check_processes(config: TrainConfig, kind: str) -> None:
    """Refuse, by a ValueError, options that do not go with a kind of Accelerate's, as FSDP."""
    if kind not in ("FSDP", "DEEPSPEED"):
        return
    if config.adapter == "image_prompt" and kind == "FSDP":
        raise ValueError(
            "adapter image_prompt needs the model whole in each process, FSDP cuts it into parts: "
            "launch with configs/accelerate/ddp.yaml"
        )
    own = "which places the model's weights itself"
    refused = {}
    if config.blocks_to_swap:
        refused["blocks_to_swap"] = own
    if config.casts_base:
        refused["base"] = own
    if config.base == "int8":
        refused["base"] = "which cannot take torchao's tensors apart, or move them"
    if kind == "FSDP" and config.optimizer.startswith(("adamw8bit", "bitsandbytes.")):
        refused["optimizer"] = "of whose parts of parameters bitsandbytes knows nothing"
    for name, why in refused.items():
        raise ValueError(
            f"{name} {getattr(config, name)} does not go with {kind}, {why}: leave one of them "
            "out, or launch with configs/accelerate/ddp.yaml"
        )


def by_main(processes: Accelerator | PartialState, work: Callable[[], object]) -> None:
    """Let the main process `work`, and the others wait for its end.

    If it raises, the others raise a ValueError of the same text: none of them waits forever.
    """
    failed: Exception | None = None
    if processes.is_main_process:
        try:
            work()
        except Exception as error:
            failed = error
    [told] = broadcast_object_list([None if failed is None else str(failed)])
    if failed is not None:
        raise failed
    if told is not None:
        raise ValueError(told)


@contextmanager
def alone_in(folder: Path, accelerator: Accelerator, *, own: Path) -> Iterator[None]:
    """Lock `folder` against other runs, by the main process for all processes.

    Half-written files that killed runs left in the folder are removed. BlockingIOError if another
    run holds the folder.

    Args:
        own: subfolder that no other program writes to.
    """
    with unwinding(), ExitStack() as stack:

        def take() -> None:
            stack.enter_context(locked(folder))
            for one in (folder, own):
                clear_partial(one)

        by_main(accelerator, take)
        yield


@dataclass(frozen=True)
class ProcessGroups:
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
    def of(cls, config: TrainConfig, accelerator: Accelerator) -> "ProcessGroups":
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


def check_shareable(config: TrainConfig, transformer: nn.Module) -> None:
    """Refuse, by a ValueError, a model, maybe without values, or a method that cannot be split."""
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
    """Refuse, by a ValueError, a clip of some frames, height and width whose tokens do not split
    evenly."""
    size = config.context_parallel
    if tokens % size:
        raise ValueError(
            f"context_parallel {size} does not divide the {tokens} tokens of {frames} frames of "
            f"{pixels[0]} x {pixels[1]}: change the size or the frames"
        )


def share(transformer: "ModelMixin", groups: ProcessGroups, device: torch.device) -> None:
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
        processor: object = getattr(module, "processor", None)
        if id(module) not in own and getattr(processor, "_parallel_config", None) is not None:
            setattr(processor, "_parallel_config", None)  # noqa: B010


@contextmanager
def _devices_counted() -> Iterator[None]:
    """Let a machine without an accelerator count one: diffusers divides by the number."""
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: max(count(), 1)
    try:
        yield
    finally:
        torch.accelerator.device_count = count
