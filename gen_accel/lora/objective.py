"""Objective of a training step: noise, the loss of a batch, and its targets."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor, nn

from gen_accel.attention_processors.families import Family, family_for
from gen_accel.attention_processors.families.latents import FIRST_FRAME, IS_GIVEN
from gen_accel.lora.batches import Adapter, Batch
from gen_accel.lora.causal import CausalChunks
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.student_steps import StudentSteps
from gen_accel.pipelines.long_video.chunks import ChunkedAttention, Clip
from gen_accel.pipelines.sampler import own_shift, shifted, unshifted
from gen_accel.video import temporal_patch

if TYPE_CHECKING:
    from diffusers import ModelMixin


class Noising:
    """Mixing of clean latents and noise, as a family's models were trained.

        noisy = a clean + s noise,    target = noise - clean, or for v-prediction a noise - s clean

    Flow matching has a = 1 - sigma and s = sigma.

    Args:
        family: the model's family, whose `scales` are a and s and whose PREDICTS is the target.
        schedule: config of the pipeline's scheduler; None for the published one.

    Raises:
        ValueError: a schedule that the family's models were not trained with.
    """

    def __init__(self, family: Family, schedule: Mapping[str, object] | None = None) -> None:
        self._family = family
        self._schedule = dict(schedule or {})
        family.scales(self._schedule, torch.zeros(1))  # refuses a wrong schedule before training

    def mix(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Mix clean latents and noise, each (B, ...), at noise levels (B,) in [0, 1]."""
        keep, add = self._scales(sigma, clean)
        return keep * clean + add * noise

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return what the model should predict of `mix`, (B, ...)."""
        if self._family.training.predicts == "flow":
            return noise - clean
        keep, add = self._scales(sigma, clean)
        return keep * noise - add * clean

    def snr(self, sigma: Tensor) -> Tensor:
        """Return the signal-to-noise ratios (a / s)^2, (B,), by which losses are weighted."""
        keep, add = self._family.scales(self._schedule, sigma)
        return (keep / add) ** 2

    def _scales(self, sigma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        keep, add = self._family.scales(self._schedule, sigma)
        return _beside(keep, like), _beside(add, like)


def _beside(x: Tensor, like: Tensor) -> Tensor:
    """Give values of samples, (B,), as many axes as `like` has."""
    return x.view(-1, *(1,) * (like.ndim - 1))


def shift_of(schedule: Mapping[str, Any], tokens: int) -> float:
    """Return the shift of noise levels that a pipeline samples with.

    Args:
        schedule: config of its scheduler. If this shifts by the number of tokens, the shift is
            the one that diffusers' flow-matching pipelines make of it.
        tokens: of the video.
    """
    if schedule.get("use_dynamic_shifting") and schedule.get("base_shift") is not None:
        few, many = (schedule.get(f"{end}_image_seq_len", n) for end, n in _LENGTHS)
        low, high = schedule["base_shift"], schedule["max_shift"]
        mu = low + (high - low) * (tokens - few) / (many - few)
        return mu if schedule.get("time_shift_type") == "linear" else math.exp(mu)
    return own_shift(schedule)


# Ends of the line between shifts, in tokens, as FlowMatchEulerDiscreteScheduler has them.
_LENGTHS = (("base", 256), ("max", 4096))
LEAST = 1e-6  # sum of counts; below, as under a black mask, there is nothing to learn
OBJECTIVES = {"cosmap": "flow", "min_snr": "v"}  # what a model predicts, for each weighting


@dataclass(frozen=True)
class Loss:
    """Mean error of predictions.

    An error e counts as e^2, or with a width c of the pseudo-Huber loss as 2 c (sqrt(e^2 + c^2) -
    c), which is e^2 for small errors and 2 c |e| for large ones.

    Weightings of a noise level sigma:
        "cosmap": 2 / (pi (1 - 2 sigma + 2 sigma^2)) (Esser et al., 2024,
            https://arxiv.org/abs/2403.03206).
        "min_snr": min(snr, gamma) / (snr + 1) of v-prediction (Hang et al., 2023,
            https://arxiv.org/abs/2303.09556).

    Args:
        huber: c; None for squared errors.
        weighting: "none", "cosmap" or "min_snr".
        min_snr: gamma.
    """

    huber: float | None = None
    weighting: str = "none"
    min_snr: float = 5.0

    def check(self, family: Family) -> None:
        """Refuse, by a ValueError, a weighting that is made for another prediction."""
        wanted = OBJECTIVES.get(self.weighting)
        if wanted is not None and wanted != family.training.predicts:
            fits = [name for name, kind in OBJECTIVES.items() if kind == family.training.predicts]
            raise ValueError(
                f"weighting {self.weighting} is for models that predict {wanted!r}, and "
                f"{family.models} predicts {family.training.predicts!r}: take "
                f"{', '.join(fits)} or none"
            )

    def weights(self, sigma: Tensor, noising: Noising) -> Tensor | None:
        """Return the weights of noise levels, (B,); None if all are 1."""
        if self.weighting == "none":
            return None
        if self.weighting == "cosmap":
            return compute_loss_weighting_for_sd3("cosmap", sigma)
        # Written so that an infinite ratio, without any noise, gives 0.
        ratio = noising.snr(sigma)
        return ratio.clamp(max=self.min_snr) / (ratio + 1)

    def __call__(
        self,
        predicted: Tensor,
        target: Tensor,
        weights: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean error.

        Args:
            predicted, target: (B, ...) float32.
            weights: of each sample, (B,).
            counts: how much each value counts in the mean, shaped like `predicted`.
        """
        if self.huber is None and weights is None and counts is None:
            return F.mse_loss(predicted, target)
        errors = (predicted - target).square()
        if self.huber is not None:
            # sqrt(e^2 + c^2) - c without the cancellation where e is small.
            errors = 2 * self.huber * errors / ((errors + self.huber**2).sqrt() + self.huber)
        if weights is not None:
            errors = errors * _beside(weights, errors)
        if counts is None:
            return errors.mean()
        return (errors * counts).sum() / counts.sum().clamp_min(LEAST)


TEXT = "encoder_hidden_states"  # name of the text among an attention's arguments


def text_attentions(transformer: nn.Module) -> Sequence[nn.Module]:
    """Return the model's attentions to the text.

    Raises ValueError if video and text attend jointly, as the text then has no separate output.
    """
    order = family_for(transformer, "training").order
    if order != "video":
        raise ValueError(
            "objective distill_attention compares attentions to the text alone, and those of "
            f"{type(transformer).__name__} are over {order}: take objective distill"
        )
    family = family_for(transformer, "image prompts")
    return [site.module for site in family.image_attentions(transformer)]


def attention_loss(
    attentions: Sequence[nn.Module], student: Callable[[], object], teacher: Callable[[], object]
) -> Tensor:
    """Compute the relative squared error of attentions' outputs, averaged over attentions.

    Error and target are both summed over the batch before the division.

    Args:
        student: runs the model on the caption and the image.
        teacher: runs the model without gradients and without the image, on the caption that
            describes the image. Any video will do, as the text's tokens do not depend on it.
    """
    calls: dict[nn.Module, inspect.BoundArguments] = {}
    given: dict[nn.Module, Tensor] = {}
    wanted: dict[nn.Module, Tensor] = {}

    def bound(module: nn.Module, args: tuple, kwargs: dict) -> inspect.BoundArguments:
        return inspect.signature(module.forward).bind(*args, **kwargs)

    def keep(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
        calls[module], given[module] = bound(module, args, kwargs), out
        return out.detach()

    def compare(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
        call = calls[module]
        call.arguments[TEXT] = bound(module, args, kwargs).arguments[TEXT]
        wanted[module] = module.forward(*call.args, **call.kwargs)

    for hook, run in ((keep, student), (compare, teacher)):
        with ExitStack() as stack:
            for one in attentions:
                stack.callback(one.register_forward_hook(hook, with_kwargs=True).remove)
            run()
    errors = [
        F.mse_loss(given[one].float(), out.float()) / out.float().square().mean()
        for one, out in wanted.items()
    ]
    return sum(errors[1:], errors[0]) / len(errors)


class Objective(nn.Module):
    """The transformer with its loss, one module for Accelerate to wrap.

    Args:
        transformer: the model with the LoRA and the processors.
        family: the model's family, which calls the model.
        kind: "flow", "distill", "distill_attention" or "causal".
        adapter: the adapter that trains; see `Adapter`.
        guidance: guidance scale of the teacher of "distill".
        schedule: config of the pipeline's scheduler; None for the published one.
        loss: error of a prediction; None for the mean squared error.
        steps: of a student of "distill"; None: it is taught each noise level by itself.
        shifts: of the noise levels that are trained, and of those of the sound; None: the levels
            of the sound are the video's.
        chunks: of "causal".
    """

    def __init__(
        self,
        transformer: "ModelMixin",
        family: Family,
        kind: str,
        adapter: Adapter,
        *,
        guidance: float = 1.0,
        schedule: Mapping[str, object] | None = None,
        loss: Loss | None = None,
        steps: StudentSteps | None = None,
        shifts: tuple[float, float] | None = None,
        chunks: CausalChunks | None = None,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self._family, self._kind, self._adapter = family, kind, adapter
        self._guidance, self._steps, self._shifts = guidance, steps, shifts
        self._chunks = chunks
        self.chunked = None if chunks is None else ChunkedAttention(transformer, chunks.zones)
        self.noising = Noising(family, schedule)
        self._error = Loss() if loss is None else loss
        self._error.check(family)
        for name, module in adapter.modules.items():
            self.add_module(name, module)
        self._attentions = text_attentions(transformer) if kind == "distill_attention" else []
        # Units that FSDP gathers at a time; the transformer is one, so that it also runs alone.
        blocks = getattr(transformer, "_no_split_modules", None) or []
        self._no_split_modules = [*blocks, type(transformer).__name__]

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        transformer: "ModelMixin",
        adapter: Adapter,
        schedule: Mapping[str, object] | None = None,
        shift: float = 1.0,
        sound_shift: float | None = None,
    ) -> "Objective":
        """Take it from a config.

        Args:
            shift: of the noise levels that are trained.
            sound_shift: of those of the sound, if it is another.
        """
        loss = Loss(config.huber, config.weighting, config.min_snr)
        return cls(
            transformer,
            family_for(transformer, "training"),
            config.objective,
            adapter,
            guidance=config.teacher_guidance,
            schedule=schedule,
            loss=loss,
            steps=StudentSteps.of(config, shift),
            shifts=None if sound_shift is None else (shift, sound_shift),
            chunks=CausalChunks.of(config, transformer, shift),
        )

    def forward(self, *fields: Any) -> Tensor:
        """Compute the `Loss` of the prediction, or the `attention_loss`.

        With sound it is the sum of both predictions' losses, as in Lightricks' trainer. The target
        is the family's, see `Noising`, or under "distill" the teacher's prediction, of one noise
        level or of a step of `StudentSteps`. Sound is as noisy as in the pipelines, which step it
        beside the video.

        Args:
            fields: of a `Batch`, one by one, as wrappers of modules look into tuples at most.
        """
        batch = Batch(*fields)
        sigma, conditions = batch.sigma, batch.conditions
        taught = conditions if batch.teacher_conditions is None else batch.teacher_conditions
        if self._steps is not None:
            return self._loss_of_step(self._steps, batch, taught)
        if self._chunks is not None:
            return self._loss_of_chunks(self._chunks, batch, taught)
        noisy = self.noising.mix(batch.clean, batch.noise, sigma)
        if self._kind == "distill_attention":
            least = temporal_patch(self.transformer)
            return attention_loss(
                self._attentions,
                partial(self._student, noisy, sigma, conditions, *batch.shown),
                partial(self._teacher, noisy[:, :, :least], sigma, taught),
            )
        if batch.sound is not None and batch.sound_noise is not None:
            return self._loss_with_sound(noisy, batch, taught)
        target = self.noising.target(batch.clean, batch.noise, sigma)
        if self._kind == "distill":
            target = self._teacher(noisy, sigma, taught, batch.uncond_conditions)
        pred = self._student(noisy, sigma, conditions, *batch.shown)
        return self._video_error(pred, target, batch)

    def _loss_with_sound(self, noisy: Tensor, batch: Batch, taught: dict[str, Tensor]) -> Tensor:
        """Compute the loss of video and sound."""
        sound, noise, sigma, level = batch.sound, batch.sound_noise, batch.sigma, batch.sigma
        assert sound is not None
        assert noise is not None
        if self._shifts is not None:
            own, other = self._shifts
            level = shifted(unshifted(sigma, own), other)
        heard = self.noising.mix(sound, noise, level)
        predict = partial(self._family.predict_heard, self.transformer, noisy, heard, sigma, level)
        if self._kind == "distill":
            with torch.no_grad(), self._adapter.teaching():
                targets = predict(taught)
        else:
            clean = (batch.clean, batch.noise, sigma), (sound, noise, level)
            targets = tuple(self.noising.target(*one) for one in clean)
        video, told = predict(batch.conditions)
        weights = self._error.weights(level, self.noising)
        of_sound = self._error(told.float(), targets[1].float(), weights)
        return self._video_error(video, targets[0], batch) + of_sound

    def _video_error(self, pred: Tensor, target: Tensor, batch: Batch) -> Tensor:
        weights = self._error.weights(batch.sigma, self.noising)
        return self._error(pred.float(), target.float(), weights, self._counts(pred, batch))

    def _loss_of_step(
        self, steps: StudentSteps, batch: Batch, taught: dict[str, Tensor]
    ) -> Tensor:
        """Compute the loss of the student's step that begins at the batch's noise level."""

        def student(x: Tensor, sigma: Tensor) -> Tensor:
            return self._student(x, sigma, batch.conditions, *batch.shown)

        def teacher(x: Tensor, sigma: Tensor) -> Tensor:
            return self._teacher(x, sigma, taught, batch.uncond_conditions)

        step = steps.nearest(batch.sigma[0].item())
        sigma = torch.full_like(batch.sigma, steps.levels[step])
        if steps.starts == "data":
            x = self.noising.mix(batch.clean, batch.noise, sigma).float()
        else:
            x = steps.start(step, batch.noise, student, teacher, batch.fresh_noise())
        target = steps.target(step, x, teacher)
        pred = student(x, sigma).float()
        weights = torch.full_like(sigma, steps.weight(step))
        return self._error(pred, target, weights, self._counts(pred, batch))

    def _loss_of_chunks(
        self, chunks: CausalChunks, batch: Batch, taught: dict[str, Tensor]
    ) -> Tensor:
        """Compute the loss of all chunks of the clips, each after those before it. The target is
        the model's own, or with guidance the prediction of the teacher's own chunks."""
        assert self.chunked is not None
        seeds = None if batch.chunks is None else batch.chunks.tolist()
        drawn = chunks.draw(seeds, batch.sigma, batch.clean)
        clean, noise, context = map(chunks.split, (batch.clean, batch.noise, drawn.noise))

        def by_chunk(made: Callable[..., Tensor], noise: Tensor, levels: Tensor) -> Tensor:
            flat = [x.flatten(0, 1) for x in (clean, noise, levels)]
            return made(*flat).unflatten(0, levels.shape)

        # Both stay until the next step, as checkpointed blocks run once more in the backward pass.
        fps = batch.conditions.get("fps")
        self.chunked.fps = None if fps is None else fps[:, 0].cpu()
        clip = self.chunked.now = Clip(len(clean), clean.shape[1], drawn.zones)
        mix, own = self.noising.mix, (noise, drawn.levels)
        rows = clip.rows(by_chunk(mix, context, drawn.context), by_chunk(mix, *own))
        levels = clip.rows(drawn.context, drawn.levels)

        def told(conditions: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: clip.rows(x, x) for name, x in conditions.items()}

        pred = clip.noisy(self._student(rows, levels, told(batch.conditions)))
        if batch.uncond_conditions is None:
            target = by_chunk(self.noising.target, *own)
        else:
            uncond = told(batch.uncond_conditions)
            target = clip.noisy(self._teacher(rows, levels, told(taught), uncond))
        weights = self._error.weights(drawn.levels.flatten(), self.noising)
        pred, target = pred.flatten(0, 1).float(), target.flatten(0, 1).float()
        counts = None if batch.mask is None else chunks.split(batch.mask).flatten(0, 1)
        return self._error(
            pred, target, weights, None if counts is None else counts.expand_as(pred)
        )

    def _counts(self, like: Tensor, batch: Batch) -> Tensor | None:
        """Return how much each value counts: as the mask says, and 0 for latents that a first
        frame gives; None if all are 1."""
        counts = self._not_given(like, batch.conditions)
        if batch.mask is None:
            return counts
        return batch.mask.expand_as(like) if counts is None else counts * batch.mask

    def _not_given(self, like: Tensor, conditions: dict[str, Tensor]) -> Tensor | None:
        """Return 0 for latents that a first frame gives, 1 for others; None if all are 1."""
        given = FIRST_FRAME in conditions and self._family.given_latents(self.transformer)
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
        uncond: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Predict as the teacher does; guided with the conditions of the empty caption."""
        predict = partial(self._family.predict, self.transformer, noisy, sigma)
        with self._adapter.teaching():
            pred = predict(conditions)
            if uncond is None:
                return pred
            # In float32: guidance amplifies the small difference, and its rounding error.
            pred, alone = pred.float(), predict(uncond).float()
            return alone + self._guidance * (pred - alone)
