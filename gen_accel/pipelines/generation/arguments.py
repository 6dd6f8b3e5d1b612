"""Arguments of a pipeline's `__call__`, and their names."""

import inspect
from typing import Any

from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.families import Family, family_of

# Fields of a `Clip`, and diffusers' names for them.
ARGUMENTS = {
    "frames": "num_frames",
    "height": "height",
    "width": "width",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "negative_prompt": "negative_prompt",
    "max_tokens": "max_sequence_length",
}


def parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """Parameters of the pipeline's `__call__`, by name."""
    known = dict(inspect.signature(type(pipe).__call__).parameters)
    del known["self"]
    return known


def arguments(pipe: Any) -> dict[str, str]:
    """Map the fields of a `Clip` to this pipeline's names for them."""
    rate = rate_argument(pipe)
    frames = {"frames": frames_argument(pipe)}
    return ARGUMENTS | frames | ({} if rate is None else {"fps": rate})


def frames_argument(pipe: Any) -> str:
    return served_family(pipe).generation.frames_argument


def rate_argument(pipe: Any) -> str | None:
    """Name of the argument for the frame rate; None for most pipelines, which have none."""
    known = parameters(pipe)
    return next((name for name in ("frame_rate", "fps") if name in known), None)


def served_family(pipe: Any) -> Family:
    """Return the family of the first transformer."""
    module = first_transformer(pipe)
    return family_of(getattr(module, "_orig_mod", module))


def first_transformer(pipe: Any) -> Any:
    return next(iter(served_transformers(pipe).values()))
