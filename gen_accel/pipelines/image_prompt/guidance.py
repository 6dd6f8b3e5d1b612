"""Guidance: the rows of a model's call that belong to the negative prompt."""

import sys
from typing import TYPE_CHECKING
from weakref import ref

from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import nn

from gen_accel.attention_processors.attached.clock import TRANSFORMERS
from gen_accel.attention_processors.families.base import ImagePrompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.configuration_utils import ConfigMixin

# Names in pipelines of the models that image prompts go on.
MODELS = tuple(name for name in TRANSFORMERS if name != "transformer_ref")

# Names of calls, by pipelines or by a guider in them, for each side. The positive names after the
# second are calls that leave out a part of the model.
_NEGATIVE = ("uncond", "pred_uncond")
_POSITIVE = ("cond", "pred_cond", "uncond_stg", "uncond_modality")

# Sides of a call's rows in their order, each with its number of rows.
Layout = tuple[tuple[str, int], ...]


def layout_of(
    pipe: "Pipe",
    model: nn.Module,
    calls: "Calls",
    rows: int,
    how: ImagePrompts,
    *,
    each: bool = False,
) -> Layout:
    """Determine the layout of a call with `rows` rows, by the state of the pipeline that runs:
    several may share a model, and each keeps the state of its own last run.

    Args:
        pipe: gives the pipeline that the image prompt was loaded on, or None.
        how: how the model's pipelines run the negative prompt.
        each: there is an image for each row.

    Raises:
        ValueError: rows that may belong to one prompt or to two, or a guidance that is not known.
    """
    call, known, batched = calls.name, pipe(), how.guidance == "batched"
    unnamed = batched and not (how.names_calls and hasattr(model, "cache_context"))
    running, told = _running(model, known, how.guided)
    if call in _NEGATIVE:
        return (("negative", rows),)
    if call is not None and (call in _POSITIVE or call.startswith("pred_cond_")):
        return (("positive", rows),)
    if call == "cond_uncond" or unnamed:
        if running is None and unnamed and rows % 2 == 0 and not each:
            raise ValueError(
                f"{type(model).__name__} is called outside of a pipeline's run, so that it is not "
                f"known whether its {rows} rows include a negative prompt: call the pipeline, or "
                "give an image for each row, each=True"
            )
        # Outside of a run, the name of the call is taken at its word.
        guided = call == "cond_uncond" if running is None else _guided(running, told, rows)
        # Perturbed attention guidance runs the prompt once more, after the rest.
        perturbed = bool(getattr(running, "do_perturbed_attention_guidance", False))
        sides = ["negative"] * guided + ["positive"] * (1 + perturbed)
        if rows % len(sides):
            raise ValueError(
                f"{rows} rows do not divide into {' and '.join(sides)} ones: image prompts do not "
                f"know the guidance of {type(running or model).__name__}"
            )
        return tuple((side, rows // len(sides)) for side in sides)
    if batched:  # pipelines of such models name no calls without guidance
        return (("positive", rows),)
    # Pipelines without names for calls run the negative prompt second in each step.
    pipeline = known if running is None else running
    moment = None if pipeline is None else _moment(pipeline)
    again = moment is not None and _same(moment, calls.moment)
    calls.moment = None if again else moment
    return (("negative" if again else "positive", rows),)


class Calls(nn.Module):
    """Child module of the model that learns the name of the present call of guidance.

    diffusers passes the name to stateful hooks of a model's children. A hook on the model itself
    would wrap its `forward`. Offloading wraps that too, and the wrapper that was put on first
    cannot be taken off first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moment: object = None  # `_moment` of the last call, for calls without names
        registry = HookRegistry.check_if_exists_or_initialize(self)
        self._hook = CallHook()
        registry.register_hook(self._hook, "image_prompt")

    @property
    def name(self) -> str | None:
        context = self._hook.call._context
        return None if context is None else context.name


class CallHook(ModelHook):
    """Hook that keeps the present `cache_context`."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.call = StateManager(BaseState)  # pyright: ignore[reportArgumentType]

    def reset_state(self, module: nn.Module) -> nn.Module:
        return module


class Pipe:
    """Weak reference to a pipeline, which owns the model; gives None if there was no pipeline."""

    def __init__(self, pipe: "DiffusionPipeline | None") -> None:
        self._pipe = None if pipe is None else ref(pipe)

    def __call__(self) -> "DiffusionPipeline | None":
        if self._pipe is None:
            return None
        alive = self._pipe()
        if alive is None:
            raise RuntimeError(
                "the pipeline of the image prompt is gone; load it on the one now in use"
            )
        return alive

    def scheduler(self) -> "ConfigMixin":
        """Return the pipeline's present scheduler, which users may exchange."""
        pipe = self()
        assert pipe is not None
        return pipe.scheduler

    def __deepcopy__(self, memo: dict) -> "Pipe":
        """Refer to the copy of the pipeline if the whole pipeline is copied."""
        pipe = None if self._pipe is None else self._pipe()
        return Pipe(memo.get(id(pipe), pipe))


def _guided(pipe: "DiffusionPipeline", told: bool | None, rows: int) -> bool:
    """Whether there is a negative prompt; `told` is the variable of the run that tells."""
    guided = getattr(pipe, "do_classifier_free_guidance", told)
    if guided is None:
        raise ValueError(
            f"{type(pipe).__name__} does not tell whether a negative prompt is among its {rows} "
            "rows: image prompts do not know its guidance"
        )
    if guided and hasattr(pipe, "image_guidance_scale"):  # InstructPix2Pix
        raise ValueError(
            f"{type(pipe).__name__} guides by an image too, in a third of its {rows} rows: image "
            "prompts do not know that guidance"
        )
    return bool(guided)


def _running(
    model: nn.Module, known: "DiffusionPipeline | None", guided: str | None
) -> "tuple[DiffusionPipeline | None, bool | None]":
    """Find the pipeline whose run calls the model, on the call stack, and its variable `guided`.

    The stack is certain: pipelines do not tell that they run, and keep their state afterwards.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            pipe = frame.f_locals.get("self")
            if pipe is not None and (pipe is known or _holds(pipe, model)):
                return pipe, None if guided is None else frame.f_locals.get(guided)
        frame = frame.f_back
    return None, None


def _holds(pipe: "DiffusionPipeline", model: nn.Module) -> bool:
    if isinstance(pipe, nn.Module):
        return False
    held = [getattr(pipe, name, None) for name in MODELS]
    return any(one is model or getattr(one, "_orig_mod", None) is model for one in held)


def _moment(pipe: "DiffusionPipeline") -> object:
    """Return a value that is the same only within one step of a run; None outside of a run."""
    if hasattr(type(pipe), "current_timestep"):
        return getattr(pipe, "_current_timestep", None)
    scheduler = pipe.scheduler
    step = getattr(scheduler, "step_index", None)
    if getattr(scheduler, "num_inference_steps", None) is None or (
        step is not None and step >= len(scheduler.timesteps)
    ):
        return None
    return scheduler.timesteps, step


def _same(moment: object, other: object) -> bool:
    if isinstance(moment, tuple) and isinstance(other, tuple):
        return moment[0] is other[0] and moment[1] == other[1]
    return moment is other
