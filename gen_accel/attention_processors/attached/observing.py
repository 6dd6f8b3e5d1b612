"""Dense runs of a pipeline whose attention is observed, to fit a method to a model."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from gen_accel.attention_processors.attached.attachment import Attachment
from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.attached.layer import Observed
from gen_accel.attention_processors.seam import SparseProcessor, is_compiled
from gen_accel.plan import widest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Key = TypeVar("Key", bound=Hashable)


class StopObserving(Exception):
    """Ends the generation under way, and all that follow."""


def observe_dense(
    handle: Attachment,
    pipe: "DiffusionPipeline",
    prompts: Sequence[str],
    look: Callable[[Observed, int], None],
    *,
    steps: int,
    seed: int,
    call: Mapping[str, object],
) -> bool:
    """Generate each prompt with dense attention, as far as the latents.

    Args:
        look: gets each call that the method would have computed, and the number of the prompt. It
            may raise `StopObserving`.
        seed: of the first prompt's noise; each further prompt takes the next.
        call: further arguments of the pipeline.

    Returns:
        Whether there was such a call.
    """
    was_seen, current = False, 0

    def observe(seen: Observed) -> None:
        nonlocal was_seen
        was_seen = True
        look(seen, current)

    handle.observe = observe
    try:
        with suppress(StopObserving):
            for current, prompt in enumerate(prompts):
                run_to_latents(pipe, prompt, steps, seed + current, call)
    finally:
        handle.observe = None
    return was_seen


def run_to_latents(
    pipe: "DiffusionPipeline", prompt: str, steps: int, seed: int, call: Mapping[str, object]
) -> None:
    """Run a pipeline on a prompt, without decoding. The noise is drawn on the CPU."""
    pipe(  # pyright: ignore[reportCallIssue]
        prompt=prompt,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="latent",
        **call,
    )


def check_not_compiled(pipe: "DiffusionPipeline", verb: str) -> None:
    """Refuse, by a ValueError, a compiled model, in whose graphs nothing is observed.

    Args:
        verb: what is to be done first, for the error.
    """
    for name, transformer in served_transformers(pipe).items():
        if is_compiled(transformer):
            raise ValueError(f"{name} is compiled already: {verb} first, and compile then")


def check_bare(pipe: "DiffusionPipeline", verb: str) -> None:
    """Refuse, by a ValueError, a compiled model, or one with something attached.

    Args:
        verb: see `check_not_compiled`.
    """
    check_not_compiled(pipe, verb)
    for name, transformer in served_transformers(pipe).items():
        held = [getattr(part, "processor", None) for part in transformer.modules()]
        if any(isinstance(one, SparseProcessor) for one in held):
            raise ValueError(f"a method is attached to {name} already: detach() first")


class RelativeErrors(Generic[Key]):
    """Relative L2 errors against dense attention, summed over calls by a key."""

    def __init__(self) -> None:
        self.squares: dict[Key, tuple[float, float]] = {}  # of the error and of the dense output

    def add(self, key: Key, out: Tensor, dense: Tensor) -> None:
        """Add a call, (B, H, N, D) each. Waits for the device."""
        wide = widest(dense.device)
        error, whole = self.squares.get(key, (0.0, 0.0))
        error += (out - dense).to(wide).square().sum().item()
        self.squares[key] = error, whole + dense.to(wide).square().sum().item()

    def of(self, key: Key) -> float:
        error, whole = self.squares[key]
        return math.sqrt(error / whole)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
