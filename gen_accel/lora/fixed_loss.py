"""Loss of the same clips at the same noise levels and with the same noise, at any step.

The loss of a training's step is mostly decided by the noise level that it drew. Here nothing is
drawn, so that two figures differ by what was learnt between them. Clips that are held out show
whether it holds for others too.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from gen_accel.extras import needed_for
from gen_accel.lora.batches import Batches, sigmas_of
from gen_accel.lora.caching.latents import LatentCache, hash_of_name, held_out
from gen_accel.lora.config import Stage, TrainConfig
from gen_accel.lora.model import Model
from gen_accel.lora.objective import Draw, draw, seed_of
from gen_accel.lora.sharing import Groups

with needed_for("training", extra="train"):
    from accelerate import Accelerator

CLIPS = 8  # training clips that are measured where none is held out
LEVELS = 4
DRAWS = 1000  # of the training's noise levels, whose quantiles are taken
NOT_A_STEP = -2  # in the place of a step's number, for draws of no step
DIGITS = 3  # of a noise level

Tell = Callable[[int, int], None]  # takes the number of parts done, and their total


@dataclass(frozen=True)
class Figures:
    """Losses at one step of a training.

    Args:
        after: steps done.
        mean: over clips and levels.
        levels: mean over clips for each noise level.
        clips: number of clips.
        frames: pixel frames of the longest.
        is_held_out: whether the clips are held out; else they train.
    """

    after: int
    mean: float
    levels: dict[str, float]
    clips: int
    frames: int
    is_held_out: bool


class _Part(NamedTuple):
    """One forward pass: a clip at one noise level."""

    clip: int
    stage: Stage
    level: float


class FixedLoss:
    """Measure the loss of held-out clips, or of training clips where none is held out.

    Each clip is measured at the longest stage that it fills, so that the figures mean the same in
    all stages. All processes take part and get the same figures, on any number of processes.

    Attributes:
        levels: noise levels, the middles of four equal shares of the levels that train.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        cache: LatentCache,
        batches: Batches,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.model, self.cache = config, model, cache
        self.batches, self.accelerator = batches, accelerator
        self.levels = noise_levels(config, model)
        self.clips = _clips(config, model, cache)
        self._parts = [_Part(*clip, level) for clip in self.clips for level in self.levels]

    @torch.no_grad()
    def __call__(
        self,
        after: int,
        wrapped: nn.Module,
        rule: Callable[[Stage], AbstractContextManager[None]],
        tell: Tell = lambda done, total: None,
    ) -> Figures:
        """Measure after `after` steps.

        Args:
            wrapped: the objective, as the training calls it.
            rule: applies a stage's rule on the rotary frequencies.
        """
        groups = Groups.of(self.config, self.accelerator)
        rounds = math.ceil(len(self._parts) / groups.count)
        table = torch.zeros(len(self._parts), device=self.accelerator.device)
        with evaluating(wrapped):
            for i in range(rounds):
                tell(i, rounds)
                place = i * groups.count + groups.number
                part = self._parts[min(place, len(self._parts) - 1)]  # FSDP needs all to call
                with rule(part.stage):
                    loss = wrapped(*self._batch(part))
                if place < len(self._parts) and groups.place == 0:  # the others have the same
                    table[place] = loss
        table: Any = self.accelerator.reduce(table, "sum")
        return self._figures(after, table.view(-1, len(self.levels)).T.tolist())

    def _batch(self, part: _Part) -> tuple[Any, ...]:
        latents = self.cache.latents(part.clip, self.model.frames(part.stage.frames))
        number = hash_of_name(self.cache.entries[part.clip].name)
        seed = seed_of(self.config.seed, NOT_A_STEP, number)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        drawn = Draw(noise, part.level, captioned=True, pictured=True)
        return self.batches.of([part.clip], [latents], [drawn])

    def _figures(self, after: int, losses: list[list[float]]) -> Figures:
        means = [math.fsum(of_level) / len(of_level) for of_level in losses]
        names = [f"{level:g}" for level in self.levels]
        return Figures(
            after=after,
            mean=math.fsum(means) / len(means),
            levels=dict(zip(names, means, strict=True)),
            clips=len(self.clips),
            frames=max(stage.frames for _, stage in self.clips),
            is_held_out=bool(self.config.held_out),
        )


def noise_levels(config: TrainConfig, model: Model) -> tuple[float, ...]:
    """Return `LEVELS` quantiles of the noise levels that the training draws, from low to high."""
    about = {"shift": model.shift, "sigmas": sigmas_of(config, model)}
    drawn = sorted(draw(config, NOT_A_STEP, i, (), **about).sigma for i in range(DRAWS))
    middles = [drawn[DRAWS * (2 * i + 1) // (2 * LEVELS)] for i in range(LEVELS)]
    return tuple(dict.fromkeys(round(level, DIGITS) for level in middles))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation inside the context, and each into its own mode after."""
    modes = {one: one.training for one in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for one, mode in modes.items():
            one.training = mode


def _clips(config: TrainConfig, model: Model, cache: LatentCache) -> list[tuple[int, Stage]]:
    """Choose the clips to measure, by number, each with the longest stage that it fills.

    Raises ValueError if no clip that is held out fills a stage.
    """
    held = held_out(config, cache)
    found: dict[str, tuple[int, Stage]] = {}
    # Of two stages of one length, the rule of the later stays.
    for stage in sorted(config.curriculum, key=lambda one: one.frames)[::-1]:
        buckets = cache.buckets(model.frames(stage.frames))
        fitting = [i for bucket in buckets.values() for i in bucket if i in held or not held]
        for i in sorted(fitting, key=lambda i: hash_of_name(cache.entries[i].name)):
            found.setdefault(cache.entries[i].name, (i, stage))
    if not found:
        raise ValueError(
            f"held_out {config.held_out:g}: none of the clips that are held out fills a stage of "
            f"{', '.join(config.stages)}: hold out more, or add clips"
        )
    chosen = list(found.values())
    return chosen if held else chosen[:CLIPS]
