"""Batches of a training: the clips of each step, and the part of a step for each process."""

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.families.given import IS_GIVEN
from gen_accel.extras import needed_for
from gen_accel.lora.caching.inputs import MASK, TEXT
from gen_accel.lora.caching.latents import LatentCache, held_out
from gen_accel.lora.config import Stage, TrainConfig
from gen_accel.lora.model import Model
from gen_accel.lora.objective import SIGMAS, Draw, draw, order, seed_of
from gen_accel.lora.sharing import Groups

with needed_for("training", extra="train"):
    from accelerate import Accelerator


PLAN = 2  # version of the clips' order; 1 drew a stage's clips for all of its steps at once
TEXTS, PICTURES = 10**8, 2 * 10**8  # places of other draws than the clips' in a step


def plan_clips(
    config: TrainConfig, model: Model, cache: LatentCache, processes: int, version: int = PLAN
) -> list[list[list[int]]]:
    """Choose the clips of all processes, by number, for each step of each stage.

    A stage of more steps begins with the clips of fewer. Clips that are held out never train.

    Args:
        processes: number of them; those that share their clips count as one.
        version: `PLAN`, or 1 for a run that an earlier version began.

    Raises ValueError if no clip is long enough for a stage, all of them are held out, or pictures
    are asked for and there are none.
    """
    held = held_out(config, cache)
    return [
        _of_stage(i, config, model, cache, processes, version, held)
        for i in range(len(config.curriculum))
    ]


class Batches:
    """Batches of one process, or of the processes that share its clips.

    They depend on the step alone, so a resumed run draws the same.
    """

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

    def frames_of(self, stage: Stage, clips: list[int]) -> int:
        """Return the pixel frames of a step, which is one where its clips are pictures."""
        return 1 if self.cache.entries[clips[0]].is_picture else stage.frames

    def __call__(self, step: int, clips: list[int], frames: int, micro: int) -> tuple[Any, ...]:
        """Build this process's batch of a micro-step, as the arguments of `Objective`.

        They are latents, noise, noise levels, conditions, the teacher's conditions, conditions
        of the empty caption, and the adapter's inputs.

        Args:
            clips: clips of the step, over all processes and micro-steps.
            frames: latent frames.
        """
        size, groups = self.config.batch_size, self._groups
        first = (micro * groups.count + groups.number) * size
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
            )._replace(text=self._text(clips[place], step, place))
            for place, clean in enumerate(latents, first)
        ]
        return self.of(numbers, latents, draws)

    def of(self, numbers: list[int], latents: list[Tensor], draws: list[Draw]) -> tuple[Any, ...]:
        """Build the batch of some clips with draws that are given, as `__call__` does."""
        config, size = self.config, len(numbers)
        conditions = [
            self.cache.conditions(clip, drawn.text) if drawn.captioned else self.cache.empty
            for clip, drawn in zip(numbers, draws, strict=True)
        ]
        frame = self._first_frames(numbers, draws, latents[0].shape[1])
        return (
            self._put(torch.stack(latents)),
            self._put(torch.stack([drawn.noise for drawn in draws])),
            self._put(torch.tensor([drawn.sigma for drawn in draws])),
            self._together(conditions) | frame | self._masks(numbers, latents[0].shape[1]),
            self._taught(numbers, draws),
            self._untold(size, frame) if config.teacher_guidance > 1 else None,
            *map(self._put, self.adapter.inputs(self.cache, numbers, draws)),
        )

    def _first_frames(self, clips: list[int], draws: list[Draw], frames: int) -> dict[str, Tensor]:
        """Return the conditions that the clips' first frames give; none under condition text."""
        if self.model.condition == TEXT:
            return {}
        found = self._together([self.cache.first_frame(clip, frames) for clip in clips])
        if self.config.first_frame_dropout:
            is_given = torch.tensor([float(drawn.framed) for drawn in draws])
            found[IS_GIVEN] = self._put(is_given)
        return found

    def _masks(self, clips: list[int], frames: int) -> dict[str, Tensor]:
        """Return how much each latent of the clips counts, (B, 1, f, h, w); nothing without
        masks."""
        if not self.config.masks:
            return {}
        shown = torch.stack([self.cache.mask(clip, frames) for clip in clips])
        floor = self.config.mask_floor
        return {MASK: self._put(floor + (1 - floor) * shown)}

    def _untold(self, size: int, frame: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the conditions of the empty caption, with the same first frames."""
        return self._together([self.cache.empty] * size) | frame

    def _text(self, clip: int, step: int, place: int) -> int:
        """Draw which of a clip's texts is shown, by the seed, the step and the place alone."""
        keys = self.cache.entries[clip].text_keys
        return 0 if keys is None else seed_of(self.config.seed, step, TEXTS + place) % len(keys)

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
    trains = _without(buckets, held)
    if not trains:
        raise ValueError(
            f"held_out {config.held_out:g} leaves no clip for stage {stage}: lower it, or add "
            "clips"
        )
    batch = config.batch_size * config.gradient_accumulation * processes
    seed = seed_of(config.seed, number, stage.steps if ahead else 0)
    shown = [step for step in range(stage.steps) if _shows_pictures(config, seed, step)]
    plan = order(_counted(cache, trains), stage.steps - len(shown), batch, seed, ahead=ahead)
    if shown:
        pictures = _counted(cache, _without(_pictures(cache), held))
        if not pictures:
            raise ValueError(f"images is {config.images:g}, and the cache holds no pictures")
        of_pictures = seed_of(seed, PICTURES, 0)
        added = order(pictures, len(shown), batch, of_pictures, ahead=ahead)
        for step, clips in zip(shown, added, strict=True):
            plan.insert(step, clips)
    return plan


def _without(
    buckets: dict[tuple[int, int], list[int]], held: Set[int]
) -> dict[tuple[int, int], list[int]]:
    """Leave the clips out that are held out, and buckets without others."""
    trains = {size: [i for i in bucket if i not in held] for size, bucket in buckets.items()}
    return {size: bucket for size, bucket in trains.items() if bucket}


def _shows_pictures(config: TrainConfig, seed: int, step: int) -> bool:
    """Draw whether a step of a stage shows pictures."""
    return seed_of(seed, step, PICTURES) < config.images * 2**63


def _pictures(cache: LatentCache) -> dict[tuple[int, int], list[int]]:
    """Group the numbers of the pictures by (height, width) of the latents."""
    found: dict[tuple[int, int], list[int]] = {}
    for i, entry in enumerate(cache.entries):
        if entry.is_picture:
            found.setdefault((entry.height, entry.width), []).append(i)
    return found


def _counted(cache: LatentCache, buckets: dict[tuple[int, int], list[int]]) -> list[list[int]]:
    """List each bucket's clips, sorted by size, each as often as it repeats."""
    return [
        [i for i in buckets[size] for _ in range(cache.entries[i].repeats or 1)]
        for size in sorted(buckets)
    ]


def sigmas_of(config: TrainConfig, model: Model) -> tuple[float, float]:
    """Return the lowest and highest noise level that the part trains at."""
    if model.boundary is None:
        return SIGMAS
    if config.part == "transformer":
        return model.boundary, SIGMAS[1]
    return SIGMAS[0], model.boundary
