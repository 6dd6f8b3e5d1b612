"""What the `__call__` of a pipeline takes, and by which names."""

import inspect
from typing import Any

from gen_accel.attention_processors.attached.transformers import served_transformers
from gen_accel.attention_processors.families import Family, family_of

# Of a `Clip`, and what diffusers calls it.
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
    """All that it takes, by name."""
    known = dict(inspect.signature(type(pipe).__call__).parameters)
    del known["self"]
    return known


def arguments(pipe: Any) -> dict[str, str]:
    """The fields of a `Clip`, by what this pipeline calls them."""
    rate = rate_argument(pipe)
    frames = {"frames": frames_argument(pipe)}
    return ARGUMENTS | frames | ({} if rate is None else {"fps": rate})


def frames_argument(pipe: Any) -> str:
    return served_family(pipe).FRAMES_ARGUMENT


def rate_argument(pipe: Any) -> str | None:
    """What the model is told the frames a second by; most are not told."""
    known = parameters(pipe)
    return next((name for name in ("frame_rate", "fps") if name in known), None)


def served_family(pipe: Any) -> Family:
    """Of the first transformer."""
    module = first_transformer(pipe)
    return family_of(getattr(module, "_orig_mod", module))


def first_transformer(pipe: Any) -> Any:
    return next(iter(served_transformers(pipe).values()))
