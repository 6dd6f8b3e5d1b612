"""The processes of a training: its Accelerator, and work of the main process alone."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from gen_accel.io import clear_partial
from gen_accel.lora.config import TrainConfig, check_installed
from gen_accel.lora.report import LOGS
from gen_accel.lora.sharing import check_groups
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


def accelerator_for(config: TrainConfig) -> Accelerator:
    """Build the Accelerator of a run. Raises ValueError for options that do not go with the way
    in which the processes were launched."""
    check_installed(vars(config))
    if not torch.distributed.is_initialized():  # else a second run keeps the first one's precision
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        # As a plugin: a plain number would be replaced by the launcher's.
        gradient_accumulation_plugin=GradientAccumulationPlugin(config.gradient_accumulation),
        log_with=None if config.log_with == "none" else config.log_with,
        project_dir=str(Path(config.out) / LOGS),
        # Stated here, as a launcher of several processes does not pass it on.
        cpu=config.device == "cpu" or not torch.accelerator.is_available(),
        step_scheduler_with_optimizer=False,
        # The others wait while one process encodes the clips.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    kind = accelerator.distributed_type.value
    if config.adapter == "image_prompt" and kind == "FSDP":
        raise ValueError(
            "adapter image_prompt needs the model whole in each process, FSDP cuts it into parts: "
            "launch with configs/accelerate/ddp.yaml"
        )
    check_processes(config, kind)
    check_groups(config, accelerator.num_processes)
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
    """Refuse, by a ValueError, options that do not go with a way of running several processes.

    Args:
        kind: Accelerate's name of it, such as FSDP.
    """
    if kind not in ("FSDP", "DEEPSPEED"):
        return
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


def by_main(processes: Accelerator | PartialState, work: Callable[[], Any]) -> None:
    """Let the main process `work`, and the others wait for its end.

    Raises:
        Exception: whatever `work` raises, in the main process. The others then raise a ValueError
            of the same text, so that none of them waits forever.
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

    Half-written files that killed runs left in the folder are removed.

    Args:
        own: subfolder that no other program writes to.

    Raises:
        BlockingIOError: another run holds the folder; a ValueError in the other processes.
        OSError: the folder cannot be made or written to.
    """
    with unwinding(), ExitStack() as stack:

        def take() -> None:
            stack.enter_context(locked(folder))
            for one in (folder, own):
                clear_partial(one)

        by_main(accelerator, take)
        yield
