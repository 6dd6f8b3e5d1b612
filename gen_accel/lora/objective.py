"""Objective of a training step: its clips, its random draws, and the loss of a batch."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families.given import FIRST_FRAME, IS_GIVEN
from gen_accel.attention_processors.lengths import temporal_patch
from gen_accel.lora.attention_loss import AttentionLoss
from gen_accel.lora.caching.inputs import MASK
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.loss import Loss
from gen_accel.lora.noising import Noising

MOST_DRAWS = 10_000
SIGMAS = (1e-3, 1 - 1e-3)  # lowest and highest noise level; beyond, there is nothing to learn


class Draw(NamedTuple):
    """Random draws for one clip of one step.

    Args:
        noise: shaped like the latents.
        sigma: noise level, 0 to 1.
        captioned: whether its caption is shown.
        pictured: whether its image is shown.
        text: number of its text, of a clip that has several.
        framed: whether its first frame is given, under condition first_frame.
    """

    noise: Tensor
    sigma: float
    captioned: bool
    pictured: bool = True
    text: int = 0
    framed: bool = True


def draw(
    config: TrainConfig,
    step: int,
    place: int,
    shape: Sequence[int],
    *,
    shift: float,
    sigmas: tuple[float, float] = SIGMAS,
) -> Draw:
    """Draw noise, noise level and dropouts for one clip of one step.

    The draw depends only on the seed, the step and the clip's place in the global batch. It is
    the same on any number of processes and after any interruption.

    Args:
        shape: shape of the latents, (C, f, h, w).
        sigmas: lowest and highest noise level of a draw.
    """
    generator = torch.Generator().manual_seed(seed_of(config.seed, step, place))
    sigma = math.nan
    levels = levels_of(config, shift, sigmas)
    for _ in range(MOST_DRAWS):
        if levels:
            sigma = levels[int(torch.randint(len(levels), (), generator=generator))]
            break
        if config.timestep_sampling == "logit_normal":
            at = torch.randn((), generator=generator) * config.logit_std + config.logit_mean
            level = at.double().sigmoid().item()
        else:
            level = torch.rand((), generator=generator, dtype=torch.float64).item()
        sigma = shifted(level, shift)
        if sigmas[0] <= sigma <= sigmas[1]:
            break
    else:
        raise ValueError(
            f"no noise level from {sigmas[0]:g} to {sigmas[1]:g} in {MOST_DRAWS} draws: change "
            f"logit_mean {config.logit_mean:g}, logit_std {config.logit_std:g} or shift {shift:g}"
        )
    captioned = torch.rand((), generator=generator).item() >= config.caption_dropout
    noise = torch.randn(tuple(shape), generator=generator)
    if config.adapter == "lora":
        if not config.first_frame_dropout:
            return Draw(noise, sigma, captioned)
        share = torch.rand((), generator=generator, dtype=torch.float64).item()
        return Draw(noise, sigma, captioned, framed=share >= config.first_frame_dropout)
    # One number decides all dropouts, so that their shares equal the config's.
    share = torch.rand((), generator=generator, dtype=torch.float64).item()
    no_image = share < config.image_dropout
    neither = config.image_dropout <= share < config.image_dropout + config.both_dropout
    no_caption = 0 <= share - config.image_dropout - config.both_dropout < config.caption_dropout
    return Draw(noise, sigma, not (neither or no_caption), not (neither or no_image))


def levels_of(
    config: TrainConfig, shift: float, sigmas: tuple[float, float] = SIGMAS
) -> tuple[float, ...]:
    """Return the only noise levels that are trained; empty where all are.

    `sampled_steps` gives the levels of pipelines that shift n equal steps from 1 down to 1 / n.

    Args:
        shift: shift of the noise levels.
        sigmas: lowest and highest noise level of an expert; above `SIGMAS`, 1 belongs to it.

    Raises ValueError if an expert has none of them.
    """
    levels = config.noise_levels
    if config.sampled_steps is not None:
        count = config.sampled_steps
        levels = tuple(shifted(1 - i / count, shift) for i in range(count))
    low = 0.0 if sigmas[0] == SIGMAS[0] else sigmas[0]
    high = 1.0 if sigmas[1] == SIGMAS[1] else sigmas[1]
    kept = tuple(level for level in levels if low <= level <= high)
    if levels and not kept:
        shown = ", ".join(f"{level:g}" for level in levels)
        raise ValueError(
            f"no noise level of {shown} is of part {config.part}, which is for {low:g} to "
            f"{high:g}: train the other part, or give other levels"
        )
    return kept


def shifted(level: float, shift: float) -> float:
    """Shift a noise level towards 1, as FlowMatchEulerDiscreteScheduler does."""
    return shift * level / (1 + (shift - 1) * level)


def order(
    buckets: Sequence[Sequence[int]],
    steps: int,
    batch: int,
    seed: int,
    *,
    ahead: bool = False,
) -> list[list[int]]:
    """Choose the clips of each step.

    A step takes its clips from one bucket, as clips of two sizes do not fit into one batch.
    Buckets are drawn in proportion to their number of clips. Within a bucket no clip is shown
    again before all were, each as often as it is there. More steps begin with the same clips as
    fewer.

    Args:
        buckets: numbers of the clips of each size; a clip may be there several times.
        batch: clips a step, over all processes.
        ahead: draw the buckets of all steps before the first clip, as earlier versions did.

    Returns:
        `steps` lists of `batch` clips.
    """
    if not steps:
        return []
    generator = torch.Generator().manual_seed(seed_of(seed, -1, 0))
    weights = torch.tensor([float(len(bucket)) for bucket in buckets])
    at_once = steps if ahead else 1
    waiting: list[list[int]] = [[] for _ in buckets]
    plan: list[list[int]] = []
    chosen: list[int] = []
    while len(plan) < steps:
        if not chosen:
            drawn = torch.multinomial(weights, at_once, replacement=True, generator=generator)
            chosen = drawn.tolist()[::-1]
        number = chosen.pop()
        clips, queue = buckets[number], waiting[number]
        while len(queue) < batch:
            queue += [clips[i] for i in torch.randperm(len(clips), generator=generator).tolist()]
        plan.append(queue[:batch])
        del queue[:batch]
    return plan


def seed_of(seed: int, step: int, place: int) -> int:
    digest = hashlib.sha256(f"{seed} {step} {place}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Objective(nn.Module):
    """The transformer with its loss, one module for Accelerate to wrap.

    Args:
        transformer: the model with the LoRA and the processors.
        family: the model's family, which calls the model.
        kind: "flow", "distill" or "distill_attention".
        adapter: the adapter that trains; see `gen_accel.lora.adapters`.
        guidance: guidance scale of the teacher of "distill".
        schedule: config of the pipeline's scheduler; None for the published one.
        loss: error of a prediction; None for the mean squared error.
    """

    def __init__(
        self,
        transformer: nn.Module,
        family: Any,
        kind: str,
        adapter: Any,
        *,
        guidance: float = 1.0,
        schedule: Mapping[str, Any] | None = None,
        loss: Loss | None = None,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self._family, self._kind, self._adapter = family, kind, adapter
        self._guidance = guidance
        self.noising = Noising(family, schedule)
        self._error = Loss() if loss is None else loss
        self._error.check(family)
        for name, module in adapter.modules.items():
            self.add_module(name, module)
        self._of_attention = None
        if kind == "distill_attention":
            self._of_attention = AttentionLoss(transformer)
            self._patch = temporal_patch(transformer)
        # Units that FSDP gathers at a time; the transformer is one, so that it also runs alone.
        blocks = getattr(transformer, "_no_split_modules", None) or []
        self._no_split_modules = [*blocks, type(transformer).__name__]

    def forward(
        self,
        clean: Tensor,
        noise: Tensor,
        sigma: Tensor,
        conditions: dict[str, Tensor],
        taught: dict[str, Tensor] | None = None,
        untold: dict[str, Tensor] | None = None,
        *shown: Tensor,
    ) -> Tensor:
        """Compute the `Loss` of the prediction, or the `AttentionLoss`.

        The target is the family's, see `Noising`, or under "distill" the teacher's prediction.

        Args:
            clean, noise: (B, C, f, h, w).
            sigma: (B,).
            conditions: arguments of the transformer, batch first; as `MASK`, how much each latent
                counts, (B, 1, f, h, w).
            taught: conditions of the teacher; None for `conditions`.
            untold: conditions of the empty caption, if the teacher is guided.
            shown: further inputs of the adapter.
        """
        conditions = dict(conditions)
        mask = conditions.pop(MASK, None)
        taught = conditions if taught is None else taught
        noisy = self.noising.mix(clean, noise, sigma)
        if self._of_attention is not None:
            return self._of_attention(
                partial(self._student, noisy, sigma, conditions, *shown),
                partial(self._teacher, noisy[:, :, : self._patch], sigma, taught),
            )
        target = self.noising.target(clean, noise, sigma)
        if self._kind == "distill":
            target = self._teacher(noisy, sigma, taught, untold)
        predicted = self._student(noisy, sigma, conditions, *shown)
        weights = self._error.weights(sigma, self.noising)
        counts = self._counts(predicted, conditions)
        if mask is not None:
            counts = mask.expand_as(predicted) if counts is None else counts * mask
        return self._error(predicted.float(), target.float(), weights, counts)

    def _counts(self, like: Tensor, conditions: dict[str, Tensor]) -> Tensor | None:
        """Return 0 for the latents in whose place a first frame came, and 1 for all others.

        None stands for 1 everywhere.
        """
        given = 0
        if FIRST_FRAME in conditions:
            given = self._family.given_latents(self.transformer)
        if not given:
            return None
        counts = torch.ones_like(like, dtype=torch.float32)
        is_given = conditions.get(IS_GIVEN)
        counts[:, :, :given] = 0 if is_given is None else (1 - is_given).view(-1, 1, 1, 1, 1)
        return counts

    def _student(
        self, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor], *shown: Tensor
    ) -> Tensor:
        with self._adapter.showing(*shown):
            return self._family.predict(self.transformer, noisy, sigma, conditions)

    @torch.no_grad()
    def _teacher(
        self,
        noisy: Tensor,
        sigma: Tensor,
        conditions: dict[str, Tensor],
        untold: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Predict as the teacher does.

        With `untold` it is guided: v(untold) + guidance (v(conditions) - v(untold)).
        """
        predict = partial(self._family.predict, self.transformer, noisy, sigma)
        with self._adapter.teaching():
            told = predict(conditions)
            if untold is None:
                return told
            # In float32: guidance amplifies the small difference, and its rounding error.
            told, alone = told.float(), predict(untold).float()
            return alone + self._guidance * (told - alone)
