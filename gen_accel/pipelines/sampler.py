"""Samplers of flow matching, each on exact noise levels.

    euler:  x' = x + (s' - s) v
    lcm:    x' = (1 - s') (x - s v) + s' noise,    fresh noise
    unipc:  a second-order step (Zhao et al., 2023, https://arxiv.org/abs/2302.04867)
    dpmpp_2m_sde:  one with noise that is partly fresh, SDE-DPM-Solver++ (Lu et al., 2022,
            https://arxiv.org/abs/2211.01095, appendix B)

`v` is the predicted velocity at a level s, 1 for pure noise, and s' is the next level, 0 after the
last. Levels of n steps with a shift k are those of Esser et al., 2024,
https://arxiv.org/abs/2403.03206, section 5.3.2:

    s_i = k t / (1 + (k - 1) t),    t = 1 - i / n,    i = 0, ..., n - 1

`FlowMatchEulerDiscreteScheduler` of diffusers 0.42.1, where a pipeline passes it no levels, shifts
the ends of its line before it shifts the line: at k = 3 its last of four steps begins at 0.009,
where 0.5 is due, and does nothing. `UniPCMultistepScheduler` divides its line by the number of
training steps and truncates its timesteps. `MiniMaxH3Scheduler` counts the end among the steps,
and so runs one less. The schedulers here are these, with levels set.
"""

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gen_accel import registry

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor
    from typing_extensions import Self

Level = TypeVar("Level", float, "Tensor")
H3, DPM, SOUND = "MiniMaxH3Scheduler", "DPMSolverMultistepScheduler", "audio_scheduler"
EXACT = "Exact"  # begins the name of a scheduler of this module
WASTED = 0.5  # share of its exact level below which a last step is called wasted


def shifted(level: Level, shift: float) -> Level:
    """Shift a noise level, or a tensor of some, towards 1."""
    return shift * level / (1 + (shift - 1) * level)


def unshifted(level: Level, shift: float) -> Level:
    """Return the noise level that `shifted` moves to this one."""
    return level / (shift - (shift - 1) * level)


def equal_steps(steps: int, shift: float) -> tuple[float, ...]:
    """Return the noise levels at which `steps` equal steps begin, shifted, from 1 down."""
    return tuple(shifted(1 - i / steps, shift) for i in range(steps))


def own_shift(config: Mapping[str, Any]) -> float:
    """Return the fixed shift in a scheduler's config; 1 if it has none."""
    return float(config.get("shift", config.get("flow_shift")) or 1.0)


def check_levels(levels: Sequence[float], steps: int | None = None) -> None:
    """Refuse, by a ValueError, levels that do not fall, lie outside of (0, 1], or are not as many
    as `steps`."""
    told = ", ".join(f"{level:g}" for level in levels)
    if any(not 0 < level <= 1 for level in levels):
        raise ValueError(f"levels must be above 0 and at most 1, as 1,0.9,0.75,0.5, got {told}")
    if any(now <= then for now, then in itertools.pairwise(levels)):
        raise ValueError(f"levels must fall from step to step, as 1,0.9,0.75,0.5, got {told}")
    if steps not in (None, len(levels)):
        raise ValueError(
            f"levels are the noise of each step, {len(levels)} here, and steps are {steps}: leave "
            "steps out, or give as many levels"
        )


@dataclass(frozen=True)
class Sampler:
    """How a pipeline steps from noise to video.

        with Sampler("lcm", levels=(1, 0.9375, 0.8333, 0.625)).at_work(pipe, generator):
            pipe(..., num_inference_steps=4, generator=generator)

    Args:
        name: of `registry.SAMPLERS`. None: "unipc" where the pipeline's own is; else "euler".
        levels: noise at which each step begins, falling, in (0, 1]. Empty: equal steps, shifted.
        shift: of equal steps, 1 for none. None: the scheduler's own, which may depend on the size
            of a video.
        exact: False leaves equal steps to diffusers' class, with its ends.

    Raises ValueError for a name or levels that are none, or levels beside a shift.
    """

    name: str | None = None
    levels: tuple[float, ...] = ()
    shift: float | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        if self.name not in (None, *registry.SAMPLERS):
            hint = registry.nearest_to(str(self.name), registry.SAMPLERS)
            known = ", ".join(registry.SAMPLERS)
            raise ValueError(f"sampler must be one of {known}, got {self.name!r}{hint}")
        check_levels(self.levels)
        if self.shift is not None:
            if not 0 < self.shift < float("inf"):
                raise ValueError(f"shift must be positive, got {self.shift}")
            if self.levels:
                raise ValueError(
                    f"levels are noise levels after any shift: leave shift {self.shift:g} out"
                )

    def scheduler(self, own: Any) -> Any:
        """Build the scheduler that takes the place of a pipeline's own.

        Its config keeps all entries of the own one, which pipelines read.

        Raises ValueError for a scheduler that does not step by flow matching, from noise to clean.
        """
        from diffusers import (
            DPMSolverMultistepScheduler,
            FlowMatchEulerDiscreteScheduler,
            UniPCMultistepScheduler,
        )

        config, kind = own.config, type(own).__name__
        if kind.removeprefix(EXACT) == H3:
            if self.name not in (None, "euler"):
                raise ValueError(f"{kind} steps by euler alone, got sampler {self.name}")
            shift = own.shift if self.shift is None else self.shift
            return exact(type(own)).from_config(config, levels=self.levels, shift=shift)
        if config.get("invert_sigmas"):
            raise ValueError(
                f"a sampler goes by the share of noise, and the levels of this {kind} are the "
                "share of the video (invert_sigmas): leave it out"
            )
        is_euler = isinstance(own, FlowMatchEulerDiscreteScheduler)
        if not is_euler and config.get("prediction_type") != "flow_prediction":
            raise ValueError(
                f"sampler {self.name or 'euler'} needs flow matching: a scheduler with "
                "prediction_type flow_prediction or a FlowMatchEulerDiscreteScheduler, and this "
                f"pipeline has a {kind}"
            )
        name = self.name
        if name is None:
            name = "unipc" if isinstance(own, UniPCMultistepScheduler) else "euler"
        shift = own.shift if is_euler else own_shift(config)
        given: dict[str, Any] = {"levels": self.levels, "shift": shift, "flow_shift": shift}
        given["exact"] = self.exact
        if name in ("unipc", "dpmpp_2m_sde"):
            given |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        if name == "dpmpp_2m_sde":
            given |= {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"}
        given["stochastic_sampling"] = name in registry.DRAWING
        if self.levels or self.shift is not None:
            shift = 1.0 if self.levels else self.shift
            bent = ("dynamic_shifting", "karras_sigmas", "exponential_sigmas", "beta_sigmas")
            given |= {"shift": shift, "flow_shift": shift, "shift_terminal": None}
            given |= {f"use_{one}": False for one in bent}
        kinds: dict[str, type] = {
            "unipc": UniPCMultistepScheduler,
            "dpmpp_2m_sde": DPMSolverMultistepScheduler,
        }
        taken = kinds.get(name, FlowMatchEulerDiscreteScheduler)
        return exact(taken).from_config(config, **given)

    @contextmanager
    def at_work(
        self, pipe: "DiffusionPipeline", generator: "torch.Generator | None" = None
    ) -> Iterator[None]:
        """Put the scheduler in the place of the pipeline's own for the calls within.

        Args:
            generator: draws the fresh noise, as not all pipelines pass theirs on.
        """
        before: Any = pipe.scheduler
        made = self.scheduler(before)
        sound: Any = getattr(pipe, SOUND, None)  # whose shift is another
        if made.config.get("stochastic_sampling"):

            def step(self: Any, *args: Any, **given: Any) -> Any:
                if given.get("per_token_timesteps") is not None:
                    raise ValueError(
                        "fresh noise is for calls in which all frames are as noisy: take another "
                        f"sampler than {' and '.join(registry.DRAWING)}"
                    )
                return type(self).step(self, *args, **({"generator": generator} | given))

            made.step = MethodType(step, made)  # a copy, e.g. for sound, steps by itself
        others = {} if sound is None else {SOUND: Sampler(self.name).scheduler(sound)}
        for name, one in {"scheduler": made, **others}.items():
            setattr(pipe, name, one)
        try:
            yield
        finally:
            for name, one in {"scheduler": before, **dict.fromkeys(others, sound)}.items():
                setattr(pipe, name, one)


class Exact:
    """What makes a scheduler of diffusers run on exact levels; see `Sampler`."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **given: Any) -> "Self":
        """Make a scheduler from the entries of any scheduler's config, and `levels`."""
        values = {k: v for k, v in {**config, **given}.items() if not k.startswith("_")}
        known = inspect.signature(cls.__init__).parameters
        made: Any = cls(**{name: value for name, value in values.items() if name in known})
        made.register_to_config(**{k: v for k, v in values.items() if k not in known})
        return made

    def set_timesteps(
        self: Any,
        num_inference_steps: int | None = None,
        device: "str | torch.device | None" = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Set the levels: those of the config, or `sigmas`, or equal steps, shifted. Raises
        ValueError for another number of steps than the config has levels."""
        if not self.config.get("exact", True):
            super().set_timesteps(num_inference_steps, device, sigmas=sigmas, mu=mu)  # pyright: ignore[reportAttributeAccessIssue]
            return
        if type(self).__name__.endswith(DPM):  # which takes no levels: those of Euler's steps
            from diffusers import FlowMatchEulerDiscreteScheduler

            like = exact(FlowMatchEulerDiscreteScheduler).from_config(self.config)
            like.set_timesteps(num_inference_steps, device, sigmas, mu)
            super().set_timesteps(len(like.timesteps), device)  # pyright: ignore[reportAttributeAccessIssue]
            self.sigmas, self.timesteps = like.sigmas.cpu(), like.timesteps
            return
        levels = self.config.get("levels") or sigmas
        steps = num_inference_steps if sigmas is None else len(sigmas)
        assert steps is not None, "as pipelines give one of the two"
        is_h3 = type(self).__name__.endswith(H3)
        if levels is None:
            levels = equal_steps(steps, self.shift if is_h3 else 1.0)
        check_levels([*map(float, levels)], steps)
        if is_h3:  # which has no training steps, and is given the end too
            super().set_timesteps(sigmas=[*levels, 0.0], device=device)  # pyright: ignore[reportAttributeAccessIssue]
            return
        # A new array, as it is written to.
        super().set_timesteps(sigmas=np.array(levels, np.float64), device=device, mu=mu)  # pyright: ignore[reportAttributeAccessIssue]
        # UniPC truncates them.
        self.timesteps = self.sigmas[:-1].to(device) * self.config.num_train_timesteps


@cache
def exact(kind: type) -> Any:
    """Make a class of `kind`, a scheduler of diffusers, that runs on exact levels."""
    if issubclass(kind, Exact):
        return kind
    return type(f"{EXACT}{kind.__name__}", (Exact, kind), {"__doc__": Exact.__doc__})


def wasted_step(scheduler: Any) -> str:
    """Say that the last of the steps that a scheduler is set to does next to nothing; "" if it
    does something, or the scheduler is of another kind than the one with this fault."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = scheduler.config
    plain = not (config.get("use_dynamic_shifting") or config.get("invert_sigmas"))
    if not (plain and isinstance(scheduler, FlowMatchEulerDiscreteScheduler)):
        return ""
    values: Any = scheduler.sigmas
    steps, last = len(values) - 1, float(values[-2])
    due = shifted(1 / steps, scheduler.shift)
    if steps > registry.MOST_FEW or last > WASTED * due:
        return ""
    return (
        f"the last of {steps} steps does next to nothing: the pipeline's scheduler begins it at "
        f"noise {last:.2g}, where {due:.2g} is due; sampler euler steps at exact levels"
    )
