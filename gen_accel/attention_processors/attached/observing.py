"""Dense generations that are observed: what they need of a pipeline, and how they run."""

from collections.abc import Mapping
from typing import Any

import torch

from gen_accel.attention_processors.attached.transformers import served_transformers
from gen_accel.attention_processors.seam import SparseProcessor, is_compiled


def check_not_compiled(pipe: Any, verb: str) -> None:
    """Refuse, by a ValueError, a compiled model, in whose graphs nothing is observed.

    Args:
        verb: what is to be done first, for the error.
    """
    for name, transformer in served_transformers(pipe).items():
        if is_compiled(transformer):
            raise ValueError(f"{name} is compiled already: {verb} first, and compile then")


def check_bare(pipe: Any, verb: str) -> None:
    """Refuse, by a ValueError, a compiled model, or one with something attached.

    Args:
        verb: see `check_not_compiled`.
    """
    check_not_compiled(pipe, verb)
    for name, transformer in served_transformers(pipe).items():
        held = [getattr(part, "processor", None) for part in transformer.modules()]
        if any(isinstance(one, SparseProcessor) for one in held):
            raise ValueError(f"a method is attached to {name} already: detach() first")


def run_to_latents(pipe: Any, prompt: str, steps: int, seed: int, call: Mapping[str, Any]) -> None:
    """Run a pipeline on a prompt, without decoding. The noise is drawn on the CPU."""
    pipe(
        prompt=prompt,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="latent",
        **call,
    )
