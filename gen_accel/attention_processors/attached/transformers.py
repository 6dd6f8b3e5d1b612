"""The transformers of a pipeline and its scheduler."""

import pickle
from typing import Any
from weakref import ref

from torch import nn

# As pipelines name them.
TRANSFORMERS = ("transformer", "transformer_2", "transformer_ref", "unet")


def served_transformers(pipe_or_transformer: Any) -> dict[str, nn.Module]:
    """Map the names that a pipeline has for its transformers to them; TypeError for an object
    without any."""
    if isinstance(pipe_or_transformer, nn.Module):
        return {TRANSFORMERS[0]: pipe_or_transformer}
    found = {name: getattr(pipe_or_transformer, name, None) for name in TRANSFORMERS}
    transformers = {name: module for name, module in found.items() if module is not None}
    if not transformers:
        kind = type(pipe_or_transformer).__name__
        raise TypeError(f"{kind} is neither a pipeline with a transformer nor a module")
    return transformers


def class_of(transformer: Any) -> str:
    """Name of a transformer's class, without the prefix that sharding gives it."""
    return type(transformer).__name__.removeprefix("FSDP")


class SchedulerOf:
    """A pipeline's scheduler, looked up at each call because users may exchange it. The reference
    is weak, as the pipeline owns the model."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = ref(pipe)

    def __call__(self) -> Any:
        alive = self._pipe()
        if alive is None:
            raise RuntimeError("the pipeline attached to is gone; attach to the one now in use")
        return alive.scheduler

    def __reduce__(self) -> Any:
        raise pickle.PicklingError(
            "a pipeline with a method attached cannot be pickled: detach() first, and attach "
            "again where it is loaded"
        )

    def __deepcopy__(self, memo: dict) -> "SchedulerOf":
        """Refer to the copy's scheduler where the whole pipeline is copied."""
        pipe = self._pipe()
        return SchedulerOf(memo.get(id(pipe), pipe))
