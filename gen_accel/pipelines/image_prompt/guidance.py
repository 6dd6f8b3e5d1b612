"""Which rows of a call are of the negative prompt."""

from typing import Any
from weakref import ref

from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import nn

# The sides that the rows of a call are of, in their order, each with the number of its rows.
Layout = tuple[tuple[str, int], ...]


class Guidance:
    """Tells them apart by what diffusers' pipelines make known.

    Args:
        pipe: gives the pipeline, or None where there is none.
    """

    def __init__(self, pipe: "Pipe") -> None:
        self._pipe = pipe
        self._run: tuple[Any, bool] | None = None  # timesteps, and whether guidance is on

    def layout(self, calls: "Calls", batched: bool, rows: int) -> Layout:
        """Of a call with so many rows.

        Args:
            calls: of the model.
            batched: its pipelines run the negative prompt in the first rows, and do not tell.
        """
        call, pipe = calls.name, self._pipe()
        if call in ("cond", "uncond"):
            return (("positive" if call == "cond" else "negative", rows),)
        if call == "cond_uncond" or batched:
            guided = call == "cond_uncond" if pipe is None else self._guided(pipe)
            # Perturbed attention guidance runs the prompt once more, after the rest.
            perturbed = bool(getattr(pipe, "do_perturbed_attention_guidance", False))
            sides = ["negative"] * guided + ["positive"] * (1 + perturbed)
            if rows % len(sides) == 0:
                return tuple((side, rows // len(sides)) for side in sides)
            return (("positive", rows),)
        # Pipelines that do not tell run the negative prompt second in each step.
        moment = None if pipe is None else _moment(pipe)
        again = moment is not None and _same(moment, calls.moment)
        calls.moment = None if again else moment
        return (("negative" if again else "positive", rows),)

    def _guided(self, pipe: Any) -> bool:
        if hasattr(pipe, "do_classifier_free_guidance"):
            return bool(pipe.do_classifier_free_guidance)
        # CogVideoX: its scale may change from step to step, and counts as it was at the first.
        timesteps = pipe.scheduler.timesteps
        if self._run is None or self._run[0] is not timesteps:
            self._run = timesteps, (getattr(pipe, "guidance_scale", None) or 0) > 1
        return self._run[1]


class Calls(nn.Module):
    """A child of the model that hears which of the calls of guidance is under way: diffusers tells
    stateful hooks of a model's children.

    A hook on the model itself would wrap its `forward`, which offloading wraps too, and what was
    wrapped first cannot be taken off first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moment: Any = None  # of the last call, where that is all that is known
        registry = HookRegistry.check_if_exists_or_initialize(self)
        self._hook = CallHook()
        registry.register_hook(self._hook, "image_prompt")

    @property
    def name(self) -> str | None:
        return self._hook.call.name


class CallHook(ModelHook):
    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.call = _Call()

    def reset_state(self, module: nn.Module) -> nn.Module:
        return module


class _Call(StateManager):
    """The name of the `cache_context`; None outside of one."""

    def __init__(self) -> None:
        super().__init__(BaseState)  # pyright: ignore[reportArgumentType]
        self.name: str | None = None

    def set_context(self, context: Any) -> None:
        self.name = getattr(context, "name", context)


class Pipe:
    """A pipeline, weakly, as it owns the model; None where there is none."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = None if pipe is None else ref(pipe)

    def __call__(self) -> Any:
        if self._pipe is None:
            return None
        alive = self._pipe()
        if alive is None:
            raise RuntimeError(
                "the pipeline of the image prompt is gone; load it on the one now in use"
            )
        return alive

    def scheduler(self) -> Any:
        """Looked up at each call, as users exchange it."""
        return self().scheduler

    def __deepcopy__(self, memo: dict) -> "Pipe":
        """With a copy of the whole pipeline, that of the copy."""
        pipe = None if self._pipe is None else self._pipe()
        return Pipe(memo.get(id(pipe), pipe))


def _moment(pipe: Any) -> Any:
    """Something that is the same within one step of a pipeline's run alone; None outside of it."""
    if hasattr(type(pipe), "current_timestep"):
        return getattr(pipe, "_current_timestep", None)
    scheduler = pipe.scheduler
    step = getattr(scheduler, "step_index", None)
    if getattr(scheduler, "num_inference_steps", None) is None or (
        step is not None and step >= len(scheduler.timesteps)
    ):
        return None
    return scheduler.timesteps, step


def _same(moment: Any, other: Any) -> bool:
    if isinstance(moment, tuple) and isinstance(other, tuple):
        return moment[0] is other[0] and moment[1] == other[1]
    return moment is other
