"""Train a LoRA or an image prompt through sparse attention, on videos of any length."""

import warnings
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import torch

from gen_accel.extras import needed_for
from gen_accel.lora import checkpoint
from gen_accel.lora.caching.latents import LatentCache
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.experts import check_launch
from gen_accel.lora.memory import check_installed, check_processes
from gen_accel.lora.model import Model
from gen_accel.lora.pair import run_of
from gen_accel.lora.processes import alone_in
from gen_accel.lora.report import LOGS
from gen_accel.lora.sharing import check_groups
from gen_accel.lora.training_run import CHECKPOINTS, Trained

with needed_for("training", extra="train"):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs


def train(config: TrainConfig, *, resume: bool = False) -> Trained:
    """Cache the missing clips, train, and write a LoRA to `config.out/lora`, or an image prompt to
    `config.out/image_prompt`.

    Runs by itself or under `accelerate launch`. An interruption (Ctrl-C, SIGTERM, a closed
    terminal) writes a checkpoint after the step under way; a second one ends the run at once.
    A second run in the same `config.out` is refused while the first one lasts.

    Args:
        resume: go on from the newest whole checkpoint in `config.out`, bit by bit as if nothing
            had happened.

    Raises:
        ValueError: before the first step, a config that does not fit the model, the clips or an
            earlier run; during the training, a loss, a gradient or parameters that are not
            finite. Such a gradient is not applied, and such parameters are not written.
        OSError: a missing model, folder or file, a full disk, or an `out` that another run uses.
    """
    from gen_accel.lora.prepare import prepare

    check_out(config, resume)
    accelerator = accelerator_for(config)
    with _alone(config, accelerator):
        check_out(config, resume)  # another run may have ended since
        model, cache = prepare(config, accelerator)
        return run_of(config, accelerator, model, cache).go(resume)


def accelerator_for(config: TrainConfig) -> Accelerator:
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
    if config.adapter == "image_prompt" and accelerator.distributed_type.value == "FSDP":
        raise ValueError(
            "adapter image_prompt needs the model whole in each process, FSDP cuts it into parts: "
            "launch with configs/accelerate/ddp.yaml"
        )
    check_processes(config, accelerator.distributed_type.value)
    check_launch(config, accelerator.distributed_type.value)
    check_groups(config, accelerator.num_processes)
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU: take bf16 or no")
    on_cpu = accelerator.is_main_process and accelerator.device.type == "cpu"
    if config.mixed_precision == "bf16" and on_cpu and not computes_bfloat16():
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


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 about as fast as in float32. AVX2 alone does not."""
    return torch.backends.cpu.get_cpu_capability() != "AVX2"


def check_out(config: TrainConfig, resume: bool) -> None:
    """Refuse to mix two runs, before anything is loaded."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, but {out} is a file")
    earlier = checkpoint.found(out / CHECKPOINTS)
    if resume and not earlier:
        raise ValueError(f"nothing to resume: {out / CHECKPOINTS} holds no checkpoint")
    if not resume and earlier:
        raise ValueError(
            f"{out} holds a run of {earlier[-1].name}: go on with --resume, or give another --out"
        )


def run(
    config: TrainConfig,
    accelerator: Accelerator,
    model: Model,
    cache: LatentCache,
    *,
    resume: bool = False,
) -> Trained:
    """Run `train` with a model and latents that are loaded already."""
    with _alone(config, accelerator):
        return run_of(config, accelerator, model, cache).go(resume)


def _alone(config: TrainConfig, accelerator: Accelerator) -> AbstractContextManager[None]:
    out = Path(config.out)
    return alone_in(out, accelerator, own=[out / CHECKPOINTS])
