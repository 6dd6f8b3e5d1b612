"""Fresh noise at every step, and more steps at high noise, so that far frames agree.

    clean = x - sigma v,    x <- (1 - sigma') clean + sigma' noise,    noise drawn anew

An ordinary step keeps the noise that it began with. Where a video is longer than the model looks
far, that noise decides by itself, stretch by stretch, where things are, and between two stretches
they jump. With other noise at each step, what neighbouring stretches agree on stays and what only
the noise said does not: at high noise, where such things are decided, agreement spreads from step
to step.

Steps as `FlowMatchEulerDiscreteScheduler` has them by `stochastic_sampling` (diffusers 0.42.1);
Karras et al., 2022, https://arxiv.org/abs/2206.00364, section 4, on what noise that is added
corrects. The noise levels are shifted further by the number of frames, as Esser et al., 2024,
https://arxiv.org/abs/2403.03206, section 5.3.2, do by that of pixels; by its ratio itself, where
they take the root. That noise so drawn helps long videos is our own finding, on one small model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

from gen_accel.pipelines.long_video.technique import Target, latent_frames


@dataclass(frozen=True)
class FreshNoise:
    """Draw the noise of each step anew, and take more of the steps at high noise.

    Acts while the handle that `extend` returns is called, in the place of the pipeline's own
    scheduler. The noise is drawn with the call's generator.

    Args:
        shift: of the noise levels, 1 for none. None: the scheduler's own times the ratio of the
            video's latent frames to the trained ones; that of a scheduler whose shift depends on
            the resolution (`use_dynamic_shifting`) stays as it is.
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
        if target.pipe is None:
            raise ValueError("fresh_noise calls the pipeline: extend that, not a transformer")
        self.scheduler(target, target.frames)
        return lambda: None

    def scheduler(self, target: Target, frames: int) -> Any:
        """In the place of the pipeline's own, for a video of so many latent frames.

        Raises ValueError for a pipeline that does not denoise by flow matching.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        pipe: Any = target.pipe
        config, ratio = pipe.scheduler.config, frames / target.trained
        if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            own: Any = None if config.use_dynamic_shifting else pipe.scheduler.shift
            kept: Any = config
        elif config.get("prediction_type") == "flow_prediction":
            own = config.get("flow_shift") or 1.0
            kept = {"num_train_timesteps": config.num_train_timesteps}
        else:
            raise ValueError(
                f"fresh_noise needs a flow matching scheduler, got {type(pipe.scheduler).__name__}"
            )
        shift = self.shift if self.shift is not None or own is None else own * ratio
        given: dict[str, Any] = {} if shift is None else {"shift": shift}
        if self.shift is not None:
            given["use_dynamic_shifting"] = False
        return FlowMatchEulerDiscreteScheduler.from_config(kept, stochastic_sampling=True, **given)

    def generate(self, target: Target, arguments: dict[str, Any]) -> Any:
        frames = latent_frames(
            "num_frames", arguments["num_frames"], target.temporal_factor, target.temporal_patch
        )
        pipe: Any = target.pipe
        if frames <= target.trained:
            return pipe(**arguments)
        with self._at_work(target, frames, arguments.get("generator")):
            return pipe(**arguments)

    @contextmanager
    def _at_work(self, target: Target, frames: int, generator: Any) -> Iterator[None]:
        pipe: Any = target.pipe
        before, scheduler = pipe.scheduler, self.scheduler(target, frames)
        own = scheduler.step

        @wraps(own)
        def step(*args: Any, **kwargs: Any) -> Any:
            # Not all pipelines pass theirs on.
            return own(*args, **({"generator": generator} | kwargs))

        scheduler.step = step
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
        shift = "own" if config.use_dynamic_shifting else f"{config.shift:g}"
        return f"{length}: other noise at each step, noise levels with shift {shift}"
