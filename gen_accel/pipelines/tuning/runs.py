"""Generations for tuning: kept pass by pass, and repeated from the middle.

A generation that differs from an earlier one from some step on need not be computed before that
step: the transformer returns what it returned then.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.pipelines.generation.decode import decode_stream, is_streamed


@dataclass(frozen=True)
class Call:
    """Arguments of the pipeline beside the prompt.

    Args:
        steps: num_inference_steps.
        seed: of the noise of the first prompt; each further prompt takes the next.
        more: sizes, guidance scale and others, by the pipeline's own names.
    """

    steps: int
    seed: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)


class Enough(Exception):
    """Ends a generation after the calls that were wanted."""


class Passes:
    """Outputs of a model in a generation, pass by pass.

    Attributes:
        outputs: of each pass, in order, with its step.
    """

    def __init__(self) -> None:
        self.outputs: list[tuple[int, Any]] = []


def generate(pipe: Any, prompt: str, number: int, call: Call) -> Tensor:
    """Run the pipeline as far as the latents, (1, C, f, h, w). The noise is drawn on the CPU.

    Args:
        number: of the prompt, which decides its seed.
    """
    made = pipe(
        prompt=prompt,
        num_inference_steps=call.steps,
        generator=torch.Generator().manual_seed(call.seed + number),
        output_type="latent",
        **call.more,
    )
    latents = made.frames if hasattr(made, "frames") else made[0]
    if not torch.isfinite(latents).all():
        raise ValueError("the model made latents that are not finite: try dtype float32")
    return latents


def decoded(pipe: Any, latents: Tensor) -> np.ndarray:
    """Decode to (F, H, W, 3) uint8."""
    return np.concatenate([*decode_stream(pipe, latents)])


def check_decodes(pipe: Any) -> None:
    """Refuse, by a ValueError, a pipeline whose latents cannot be decoded here."""
    if not is_streamed(pipe):
        raise ValueError(
            f"the latents of {type(pipe).__name__} cannot be decoded outside of it, as an "
            "objective on pixels needs: give objective='latent_error'"
        )


@contextmanager
def keeping(pipe: Any, step: Callable[[], int]) -> Iterator[Passes]:
    """Keep what the transformers return inside.

    Args:
        step: tells the denoising step under way.
    """
    passes = Passes()

    def kept(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        passes.outputs.append((step(), _copied(output)))
        return output

    with _in_place(pipe, kept):
        yield passes


@contextmanager
def repeating(pipe: Any, passes: Passes, before: int) -> Iterator[None]:
    """Return what the transformers returned in the kept passes of the steps before `before`."""
    known = iter([output for step, output in passes.outputs if step < before])
    done = object()

    def repeated(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        output = next(known, done)
        return forward(*args, **kwargs) if output is done else _copied(output)

    with _in_place(pipe, repeated):
        yield


@contextmanager
def _in_place(pipe: Any, replacement: Callable) -> Iterator[None]:
    """Call `replacement(forward, ...)` in the place of each transformer's forward. Hooks, which
    read the step, run as before."""
    before = []
    for module in served_transformers(pipe).values():
        own = module.__dict__.get("forward")
        before.append((module, own))
        forward = module.forward

        def replaced(*args: Any, _forward: Callable = forward, **kwargs: Any) -> Any:
            return replacement(_forward, *args, **kwargs)

        module.forward = replaced
    try:
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward
            else:
                module.forward = own


def _copied(output: Any) -> Any:
    """Copy the tensors of an output, which schedulers may write into."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple):
        return tuple(map(_copied, output))
    if isinstance(output, dict):  # diffusers' outputs are dictionaries too
        return type(output)(**{name: _copied(value) for name, value in output.items()})
    return output
