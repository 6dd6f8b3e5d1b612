"""Tiny trainings: a Wan transformer with random weights, and clips of random latents."""

import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import (
    Accelerator,
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    PartialState,
)
from accelerate.state import AcceleratorState, GradientState
from support import wan
from torch import Tensor

from gen_accel.lora import checkpoint, trainer
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.model import ModelToTrain
from gen_accel.lora.objective import Objective
from gen_accel.lora.processes import by_main
from gen_accel.lora.state import TrainingState
from gen_accel.lora.trainer import CHECKPOINTS, Trained, accelerator_for, run
from gen_accel.pipelines.generation.quantising import load_quantised

LATENTS = (4, 8)  # height and width; 2 x 4 tokens a frame
FRAMES = 5  # latent frames of a clip
TRAINED = 5  # pixel frames
SPARSE = ("critical=0.2", "block_q=4", "block_k=4")  # of sparse_linear, so few tokens are sparse


class Clips:
    """In the place of a `LatentCache`: clip i is the same in all processes.

    Args:
        sizes: height and width of the latents of each clip.
    """

    causal = True

    def __init__(self, sizes: tuple[tuple[int, int], ...] = (LATENTS,) * 5, frames: int = FRAMES):
        self.sizes, self.frames = sizes, frames
        self.digest = f"{sizes} {frames}"
        plain = dict.fromkeys(("text_keys", "starts", "repeats", "is_picture"))
        plain["pixel_frames"] = 4 * frames - 3
        self.entries = [
            SimpleNamespace(
                name=f"{i}.mp4", latent_key=str(i), height=size[0], width=size[1], **plain
            )
            for i, size in enumerate(sizes)
        ]

    def __len__(self) -> int:
        return len(self.sizes)

    def digest_at(self, frames: int) -> str:
        return f"{self.sizes} {frames}"

    def buckets(self, frames: int) -> dict[tuple[int, int], list[int]]:
        found: dict[tuple[int, int], list[int]] = {}
        for i, size in enumerate(self.sizes):
            if frames <= self.frames:
                found.setdefault(size, []).append(i)
        return found

    def latents(self, index: int, frames: int) -> Tensor:
        g = torch.Generator().manual_seed(index)
        shape = (wan.CHANNELS, self.frames, *self.sizes[index])
        return torch.randn(shape, generator=g)[:, :frames]

    def conditions(self, index: int, text: int = 0) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(100 + index)
        return {"encoder_hidden_states": torch.randn((6, wan.TEXT_WIDTH), generator=g)}

    def teacher(self, index: int) -> dict[str, Tensor]:
        return self.conditions(1000 + index)

    @property
    def empty(self) -> dict[str, Tensor]:
        return {"encoder_hidden_states": torch.zeros(6, wan.TEXT_WIDTH)}

    def image(self, index: int) -> Tensor:
        g = torch.Generator().manual_seed(200 + index)
        return torch.rand((3, 32, 32), generator=g) * 2 - 1

    @property
    def no_image(self) -> Tensor:
        return torch.zeros(3, 32, 32)


def config(out: str | Path, **fields: Any) -> TrainConfig:
    small = {
        "out": str(out),
        "method": "sparse_linear",
        "settings": SPARSE,
        "dense_layers": 0,
        "stages": ("9:4",),
        "height": 8 * LATENTS[0],
        "width": 8 * LATENTS[1],
        "rank": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "mixed_precision": "no",
        "log_with": "none",
        "device": "cpu",
        "checkpoint_every": 1000,
    }
    if fields.get("adapter") == "image_prompt":
        del small["rank"]
    return TrainConfig(**(small | fields))


# Everything that a continuation has to bring back.
FULL: dict[str, Any] = {
    "stages": ("9:4", "17:4:position_interpolation"),
    "dense_steps": 1,
    "lora_dropout": 0.3,
    "caption_dropout": 0.3,
    "batch_size": 1,
    "gradient_accumulation": 2,
    "schedule": "cosine",
    "warmup_steps": 2,
    "ema_decay": 0.9,
    "weight_decay": 0.01,
    "checkpoint_every": 2,
    "keep_checkpoints": 2,
}


# Of image prompts.
IMAGES: dict[str, Any] = {"adapter": "image_prompt", "method": "radial", "settings": ()}
NO_DROPOUT = {"caption_dropout": 0.0, "image_dropout": 0.0}
IMAGES_FULL = IMAGES | {
    "stages": ("9:2", "17:2:position_interpolation"),
    "batch_size": 2,
    "gradient_accumulation": 2,
    "schedule": "cosine",
    "warmup_steps": 1,
    "ema_decay": 0.9,
    "image_dropout": 0.3,
    "checkpoint_every": 2,
}


def model(pipe: Any = None, transformer: Any = None, **fields: Any) -> ModelToTrain:
    if transformer is None:
        transformer = wan.transformer() if pipe is None else pipe.transformer
    made = ModelToTrain(transformer, pipe, lambda n: (n - 1) // 4 + 1, TRAINED, 3.0)
    return made._replace(**fields)


def train(given: TrainConfig, clips: Any = None, resume: bool = False, **options: Any) -> Trained:
    """`gen_accel.lora.train` with the tiny model."""
    made = options.pop("model", None) or model(**options)
    return run(given, accelerator_for(given), made, clips or Clips(), resume=resume)


def stall(marker: Path, at: str) -> None:
    """Stop for good, after saying so, "step:N" in loss N of this process or in "writing:N"."""
    place, count = at.split(":")
    calls = 0

    def halt() -> None:
        nonlocal calls
        calls += 1
        if calls == int(count):
            marker.touch()
            time.sleep(600)

    if place == "step":
        forward = Objective.forward

        def slow_forward(*args: Any) -> Tensor:
            halt()
            return forward(*args)

        Objective.forward = slow_forward
    else:
        save_tensors = checkpoint.save_tensors

        def slow_save(tensors: dict[str, Tensor], path: Path) -> None:
            save_tensors(tensors, path)
            path.write_bytes(path.read_bytes()[:1000])
            halt()
            save_tensors(tensors, path)

        checkpoint.save_tensors = slow_save


def poison(step: int, rank: int | None = None) -> None:
    """One entry of the gradient becomes NaN in a step, counted from here, of one process or of
    all."""
    clip, calls = TrainingState.clip, 0

    def poisoned(state: TrainingState) -> float | None:
        nonlocal calls
        if calls == step and rank in (None, state.accelerator.process_index):
            grad: Any = state.parameters()[0].grad
            grad.view(-1)[0] = torch.nan
        calls += 1
        return clip(state)

    TrainingState.clip = poisoned


def sharded(given: TrainConfig) -> Accelerator:
    """FSDP2 on the CPU, which `accelerate launch` has for accelerators alone."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    )
    made = Accelerator(
        cpu=True,
        gradient_accumulation_steps=given.gradient_accumulation,
        step_scheduler_with_optimizer=False,
    )
    made.state.fsdp_plugin = plugin
    for state in (made.state, PartialState()):
        state.distributed_type = DistributedType.FSDP
    return made


def zero2(given: TrainConfig) -> Accelerator:
    """ZeRO-2 of DeepSpeed on the CPU, which Accelerate has for accelerators alone."""
    from deepspeed import comm

    def made(**options: Any) -> Accelerator:
        options["cpu"] = True
        accelerator = Accelerator(**options)
        plugin = DeepSpeedPlugin(
            zero_stage=2,
            offload_optimizer_device="none",
            offload_param_device="none",
            zero3_init_flag=False,
        )
        accelerator.state.deepspeed_plugins = {"default": plugin}
        accelerator.deepspeed_engine_wrapped = None
        for state in (accelerator.state, PartialState()):
            state.distributed_type = DistributedType.DEEPSPEED
        plugin.select(_from_accelerator_state=True)
        comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        return accelerator

    before, trainer.Accelerator = trainer.Accelerator, made
    try:
        return accelerator_for(given)
    finally:
        trainer.Accelerator = before


def half(out: str, source: str, step: int) -> None:
    """Copy a run as it was before its checkpoint of `step`."""
    shutil.copytree(source, out)
    shutil.rmtree(Path(out) / CHECKPOINTS / f"step-{step:06d}")


def _subject(job: dict[str, Any], given: TrainConfig, pipe: Any) -> tuple[ModelToTrain, Any]:
    if "family" not in job:
        made = model(pipe)
        return made, Clips()
    from support.families_to_train import FAMILIES

    made, clips = FAMILIES[job["family"]]
    transformer = loaded(made(), given, cut=job.get("sharded", False))
    return model(transformer=transformer), clips()


def loaded(transformer: Any, given: TrainConfig, *, cut: bool = False) -> Any:
    """The model as `base` says, loaded again where it is quantised."""
    if not given.is_quantised:
        return transformer
    with TemporaryDirectory() as folder:
        transformer.save_pretrained(Path(folder) / given.part)
        kept = type(transformer), folder, given.part, str(given.base)
        return load_quantised(*kept, torch.float32, torch.device("cpu"), cut=cut)


def start(job: dict[str, Any]) -> None:
    """One training.

    Args:
        job: `out`, `fields` of the config, and what else there is of `stall`, `sharded`,
            `zero2`, `resume`, the arguments of `poison`, and
            `refused`, so that an error is printed; `family` of `support.families_to_train`;
            `half`, a run and a step, whose checkpoints before that step are what is resumed from.
    """
    if "stall" in job:
        stall(Path(job["out"]) / "stalled", job["stall"])
    given = config(job["out"], **job["fields"])
    pipe = wan.pipeline() if given.validate_every else None
    kind = sharded if job.get("sharded") else zero2 if job.get("zero2") else accelerator_for
    accelerator = kind(given)
    clip = TrainingState.clip
    if "half" in job:
        by_main(accelerator, partial(half, job["out"], *job["half"]))
    if "poison" in job:
        poison(*job["poison"])
    try:
        run(given, accelerator, *_subject(job, given, pipe), resume=job.get("resume", False))
    except (OSError, ValueError) as error:
        if "refused" not in job:
            raise
        print(f"{accelerator.process_index}: {error}")
    TrainingState.clip = clip


if __name__ == "__main__":
    jobs = json.loads(sys.argv[1])
    torch.set_num_threads(jobs[0].get("threads", 1))
    # Two processes that part cannot always meet again.
    leave = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *args, **kwargs: None
    for job in jobs:
        start(job)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if torch.distributed.is_initialized():
        leave()
    if any(job.get("sharded") for job in jobs):
        # Torch keeps the mesh, and with it the threads of gloo, until the interpreter ends. Now
        # and then these threads abort it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
