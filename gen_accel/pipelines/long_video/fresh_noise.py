"""Fresh noise at every step, and more steps at high noise, so that neighbouring frames agree.

    clean = x - sigma v,    x <- (1 - sigma') clean + sigma' noise,    fresh noise

An ordinary sampler keeps its initial noise. If a video is longer than the reach of the model's
attention, that noise decides the layout of each stretch separately, and objects jump between
stretches. With fresh noise at each step, features that neighbouring stretches agree on stay, and
features that came from the noise alone vanish. Layout is decided at high noise, where agreement
spreads from step to step. Repetitions by the model itself remain.

The sampler is `FlowMatchEulerDiscreteScheduler` with `stochastic_sampling` (diffusers 0.42.1); on
the errors that added noise corrects, see Karras et al., 2022,
https://arxiv.org/abs/2206.00364, section 4. The noise levels are shifted further by the ratio of
frames; Esser et al., 2024, https://arxiv.org/abs/2403.03206, section 5.3.2, shift by the root of
the ratio of pixels. The effect of fresh noise on long videos is our own finding, on one small
model.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

from gen_accel.pipelines.long_video.technique import Arguments, Target

if TYPE_CHECKING:
    import torch


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
        self.scheduler(target, target.frames)
        return lambda: None

    def scheduler(self, target: Target, frames: int) -> Any:
        """Build the scheduler that replaces the pipeline's own, for `frames` latent frames.

        Raises ValueError if the pipeline's scheduler does not step by flow matching, from noise to
        clean.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        pipe = target.pipe
        assert pipe is not None
        config, kind = pipe.scheduler.config, type(pipe.scheduler).__name__
        dynamic = config.get("use_dynamic_shifting")
        if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            if config.invert_sigmas:
                raise ValueError(
                    "fresh_noise adds noise by its share, and this scheduler's levels are the "
                    "share of the video (invert_sigmas)"
                )
            own, kept = pipe.scheduler.shift, config
        elif config.get("prediction_type") == "flow_prediction" and not dynamic:
            own = config.get("flow_shift") or 1.0
            kept = {"num_train_timesteps": config.num_train_timesteps}
        else:
            raise ValueError(
                "fresh_noise needs a FlowMatchEulerDiscreteScheduler, or another scheduler with "
                f"prediction_type flow_prediction and a fixed shift, got {kind}"
            )
        given: dict[str, Any] = {}
        if self.shift is not None:
            given = {"shift": self.shift, "use_dynamic_shifting": False}
        elif not dynamic:
            given = {"shift": own * frames / target.trained}
        return FlowMatchEulerDiscreteScheduler.from_config(kept, stochastic_sampling=True, **given)

    def generate(self, target: Target, arguments: Arguments) -> object:
        pipe = target.pipe
        assert pipe is not None
        # Rounded down, as pipelines do.
        latents = (arguments["num_frames"] - 1) // target.temporal_factor + 1
        frames = latents // target.temporal_patch
        if frames <= target.trained:
            return pipe(**arguments)
        with self._at_work(target, frames, arguments.get("generator")):
            return pipe(**arguments)

    @contextmanager
    def _at_work(
        self, target: Target, frames: int, generator: "torch.Generator | None"
    ) -> Iterator[None]:
        pipe = target.pipe
        assert pipe is not None
        before, scheduler = pipe.scheduler, self.scheduler(target, frames)

        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("per_token_timesteps") is not None:
                raise ValueError("fresh_noise is for calls in which all frames are as noisy")
            # Not all pipelines pass their generator on.
            return type(self).step(self, *args, **({"generator": generator} | kwargs))

        scheduler.step = MethodType(step, scheduler)  # a copy, e.g. for sound, steps by itself
        pipe.scheduler = scheduler
        try:
            yield
        finally:
            pipe.scheduler = before

    def describe(self, target: Target) -> str:
        length = f"{target.frames} latent frames, trained at {target.trained}"
        if not target.longer:
            return f"{length}: off"
        config = self.scheduler(target, target.frames).config
        shift = f"{config.shift:g}"
        if config.use_dynamic_shifting:
            shift = "by the resolution"
        return f"{length}: other noise at each step, noise levels with shift {shift}"
