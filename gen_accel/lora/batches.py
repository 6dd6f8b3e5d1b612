"""Batches of a training: the clips of each step, and the part of a step for each process."""

from typing import Any

import torch
from torch import Tensor

from gen_accel.attention_processors.families import family_of
from gen_accel.extras import needed_for
from gen_accel.lora.config import Stage, TrainConfig
from gen_accel.lora.latents import LatentCache
from gen_accel.lora.model import Model
from gen_accel.lora.objective import SIGMAS, Draw, draw, order, seed_of
from gen_accel.lora.sharing import Groups

with needed_for("training", extra="train"):
    from accelerate import Accelerator


def plan_clips(
    config: TrainConfig, model: Model, cache: LatentCache, processes: int
) -> list[list[list[int]]]:
    """Choose the clips of all processes, by number, for each step of each stage.

    Args:
        processes: number of them; those that share their clips count as one.

    Raises ValueError if no clip is long enough for a stage.
    """
    return [
        _of_stage(stage, config, model, cache, processes, seed_of(config.seed, i, stage.steps))
        for i, stage in enumerate(config.curriculum)
    ]


class Batches:
    """Batches of one process, or of one group that shares them. They depend on the step alone, so a resumed run draws the same."""

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
        self._groups = Groups.of(config, accelerator)
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
        config = self.config
        size, groups = config.batch_size, self._groups
        first = (micro * groups.count + groups.number) * size
        places = range(first, first + size)
        numbers = clips[first : first + size]
        latents = [self.cache.latents(clips[place], frames) for place in places]
        draws = [
            draw(
                config,
                step,
                place,
                clean.shape,
                shift=self.model.shift,
                sigmas=_sigmas(config, self.model),
            )
            for place, clean in zip(places, latents, strict=True)
        ]
        conditions = [
            self.cache.conditions(clips[place]) if drawn.captioned else self.cache.empty
            for place, drawn in zip(places, draws, strict=True)
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
    stage: Stage, config: TrainConfig, model: Model, cache: LatentCache, processes: int, seed: int
) -> list[list[int]]:
    buckets = cache.buckets(model.frames(stage.frames))
    if not buckets:
        longest = max((entry.pixel_frames for entry in cache.entries), default=0)
        raise ValueError(
            f"no clip is long enough for stage {stage}: {stage.frames} frames are needed, the "
            f"longest of {len(cache)} has {longest}"
        )
    batch = config.batch_size * config.gradient_accumulation * processes
    return order([buckets[size] for size in sorted(buckets)], stage.steps, batch, seed)


def _sigmas(config: TrainConfig, model: Model) -> tuple[float, float]:
    if model.boundary is None:
        return SIGMAS
    if config.part == "transformer":
        return model.boundary, SIGMAS[1]
    return SIGMAS[0], model.boundary
