"""Batches of a training: the clips of each step, and the part of a step for each process."""

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from gen_accel.attention_processors.families import family_of
from gen_accel.extras import needed_for
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.held_out import held_out
from gen_accel.lora.latents import LatentCache
from gen_accel.lora.model import Model
from gen_accel.lora.objective import SIGMAS, Draw, draw, order, seed_of

with needed_for("training", extra="train"):
    from accelerate import Accelerator


PLAN = 2  # version of the clips' order; 1 drew a stage's clips for all of its steps at once


def plan_clips(
    config: TrainConfig, model: Model, cache: LatentCache, processes: int, version: int = PLAN
) -> list[list[list[int]]]:
    """Choose the clips of all processes, by number, for each step of each stage.

    A stage of more steps begins with the clips of fewer. Clips that are held out never train.

    Args:
        version: `PLAN`, or 1 for a run that an earlier version began.

    Raises ValueError if no clip is long enough for a stage, or all of them are held out.
    """
    held = held_out(config, cache)
    return [
        _of_stage(i, config, model, cache, processes, version, held)
        for i in range(len(config.curriculum))
    ]


class Batches:
    """Batches of one process. They depend on the step alone, so a resumed run draws the same."""

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        cache: LatentCache,
        adapter: Any,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.model, self.cache = config, model, cache
        self.adapter, self.accelerator = adapter, accelerator
        family = family_of(model.transformer)
        self._fps = (config.fps or family.fps(model.transformer)) if family.TAKES_FPS else None

    def __call__(self, step: int, clips: list[int], frames: int, micro: int) -> tuple[Any, ...]:
        """Build this process's batch of a micro-step, as the arguments of `Objective`.

        They are latents, noise, noise levels, conditions, the teacher's conditions, conditions
        of the empty caption, and the adapter's inputs.

        Args:
            clips: clips of the step, over all processes and micro-steps.
            frames: latent frames.
        """
        size, ranks = self.config.batch_size, self.accelerator.num_processes
        first = (micro * ranks + self.accelerator.process_index) * size
        numbers = clips[first : first + size]
        latents = [self.cache.latents(number, frames) for number in numbers]
        draws = [
            draw(
                self.config,
                step,
                place,
                clean.shape,
                shift=self.model.shift,
                sigmas=sigmas_of(self.config, self.model),
            )
            for place, clean in enumerate(latents, first)
        ]
        return self.of(numbers, latents, draws)

    def of(self, numbers: list[int], latents: list[Tensor], draws: list[Draw]) -> tuple[Any, ...]:
        """Build the batch of some clips with draws that are given, as `__call__` does."""
        config, size = self.config, len(numbers)
        conditions = [
            self.cache.conditions(number) if drawn.captioned else self.cache.empty
            for number, drawn in zip(numbers, draws, strict=True)
        ]
        return (
            self._put(torch.stack(latents)),
            self._put(torch.stack([drawn.noise for drawn in draws])),
            self._put(torch.tensor([drawn.sigma for drawn in draws])),
            self._together(conditions),
            self._taught(numbers, draws),
            self._together([self.cache.empty] * size) if config.teacher_guidance > 1 else None,
            *map(self._put, self.adapter.inputs(self.cache, numbers, draws)),
        )

    def _taught(self, numbers: list[int], draws: list[Draw]) -> dict[str, Tensor] | None:
        if self.config.objective == "flow":
            return None
        taught = self.adapter.taught(self.cache, numbers, draws)
        return None if taught is None else self._together(taught)

    def _together(self, each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        told = {name: self._put(torch.stack([one[name] for one in each])) for name in each[0]}
        if self._fps is not None:
            told["fps"] = self._put(torch.full((len(each),), float(self._fps)))
        return told

    def _put(self, x: Tensor) -> Tensor:
        return x.to(self.accelerator.device)


def _of_stage(
    number: int,
    config: TrainConfig,
    model: Model,
    cache: LatentCache,
    processes: int,
    version: int,
    held: Set[int],
) -> list[list[int]]:
    stage, ahead = config.curriculum[number], version == 1
    buckets = cache.buckets(model.frames(stage.frames))
    if not buckets:
        longest = max((entry.pixel_frames for entry in cache.entries), default=0)
        raise ValueError(
            f"no clip is long enough for stage {stage}: {stage.frames} frames are needed, the "
            f"longest of {len(cache)} has {longest}"
        )
    trains = [[i for i in buckets[size] if i not in held] for size in sorted(buckets)]
    trains = [bucket for bucket in trains if bucket]
    if not trains:
        raise ValueError(
            f"held_out {config.held_out:g} leaves no clip for stage {stage}: lower it, or add "
            "clips"
        )
    batch = config.batch_size * config.gradient_accumulation * processes
    seed = seed_of(config.seed, number, stage.steps if ahead else 0)
    return order(trains, stage.steps, batch, seed, ahead=ahead)


def sigmas_of(config: TrainConfig, model: Model) -> tuple[float, float]:
    """Return the lowest and highest noise level that the part trains at."""
    if model.boundary is None:
        return SIGMAS
    if config.part == "transformer":
        return model.boundary, SIGMAS[1]
    return SIGMAS[0], model.boundary
