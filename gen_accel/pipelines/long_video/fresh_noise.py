"""Fresh noise at every step, and more steps at high noise, so that neighbouring frames agree.

    clean = x - sigma v,    x <- (1 - sigma') clean + sigma' noise,    fresh noise

An ordinary sampler keeps its initial noise. If a video is longer than the reach of the model's
attention, that noise decides the layout of each stretch separately, and objects jump between
stretches. With fresh noise at each step, features that neighbouring stretches agree on stay, and
features that came from the noise alone vanish. Layout is decided at high noise, where agreement
spreads from step to step. Repetitions by the model itself remain.

The sampler is "lcm" of `pipelines.sampler`; on the errors that added noise corrects, see Karras et
al., 2022, https://arxiv.org/abs/2206.00364, section 4. The noise levels are shifted further by the
ratio of frames; Esser et al., 2024, https://arxiv.org/abs/2403.03206, section 5.3.2, shift by the
root of the ratio of pixels. The effect of fresh noise on long videos is our own finding, on one
small model.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from gen_accel.pipelines.long_video.technique import Arguments, Target
from gen_accel.pipelines.sampler import Sampler, own_shift
from gen_accel.registry import MOST_FEW


@dataclass(frozen=True)
class FreshNoise:
    """Draw new noise at each step, and take more of the steps at high noise.

    Acts only in calls of the handle that `extend` returns, by a scheduler in place of the
    pipeline's own. The noise is drawn with the call's generator.

    Args:
        shift: shift of the noise levels, 1 for none. None: the scheduler's own shift times the
            ratio of the video's latent frames to the trained length. A
            `FlowMatchEulerDiscreteScheduler` whose shift depends on the resolution
            (`use_dynamic_shifting`) then keeps its shift.
    """

    shift: float | None = None

    name: ClassVar[str] = "fresh_noise"
    excludes: ClassVar[Mapping[str, str]] = {
        "continuation": "its chunks are no longer than what the model was trained at"
    }

    def __post_init__(self) -> None:
        if self.shift is not None and not 0 < self.shift < float("inf"):
            raise ValueError(f"shift must be positive, got {self.shift}")

    def apply(self, target: Target) -> Callable[[], None]:
        pipe, kind = target.pipe, type(target.pipe).__name__
        if pipe is None:
            raise ValueError("fresh_noise calls the pipeline: extend that, not a transformer")
        if "num_frames" not in inspect.signature(type(pipe).__call__).parameters:
            raise ValueError(f"fresh_noise needs num_frames, which {kind} does not take")
        self.sampler(target, target.frames).scheduler(pipe.scheduler)
        return lambda: None

    def sampler(self, target: Target, frames: int) -> Sampler:
        """Return the sampler of `frames` latent frames."""
        pipe = target.pipe
        assert pipe is not None
        config, shift = pipe.scheduler.config, self.shift
        if shift is None and not config.get("use_dynamic_shifting"):
            shift = own_shift(config) * frames / target.trained
        return Sampler("lcm", shift=shift)

    def generate(self, target: Target, arguments: Arguments) -> object:
        pipe = target.pipe
        assert pipe is not None
        # Rounded down, as pipelines do.
        latents = (arguments["num_frames"] - 1) // target.temporal_factor + 1
        frames = latents // target.temporal_patch
        if frames <= target.trained:
            return pipe(**arguments)
        # Tuned and measured at the levels of diffusers, which waste a step only where few are.
        sampler = self.sampler(target, frames)
        is_few = arguments.get("num_inference_steps", MOST_FEW + 1) <= MOST_FEW
        sampler = replace(sampler, exact=is_few)
        with sampler.at_work(pipe, arguments.get("generator")):
            return pipe(**arguments)

    def describe(self, target: Target) -> str:
        if not target.longer:
            return f"{target.lengths}: off"
        found = self.sampler(target, target.frames).shift
        shift = "by the resolution" if found is None else f"{found:g}"
        return f"{target.lengths}: other noise at each step, noise levels with shift {shift}"
