"""Refusal of a finetuning that cannot fit into memory, with the figure, before it allocates.

Each estimate is a lower bound, so that nothing is refused that would fit.
"""

from typing import Any

from torch import nn

from gen_accel.attention_processors.families import family_of
from gen_accel.room import check_room

NUMBER = 8  # bytes of a number in a list
ACTIVATIONS = 5  # activations that a block holds at once: its input, q, k, v and the output


def check_config(config: Any) -> None:
    """Raise ValueError for sizes in the config that cannot fit with any model."""
    steps = config.total_steps
    clips = steps * config.batch_size * config.gradient_accumulation
    check_room(
        f"a list of the {clips} clips of {steps} steps",
        NUMBER * clips,
        "lower the steps of stages, batch_size or gradient_accumulation",
    )
    height, width = max(config.clip_sizes, key=lambda size: size[0] * size[1])
    pixels = 3 * config.longest * height * width
    size = f"{config.longest} frames of {height} x {width}"
    check_room(f"a clip of {size}", pixels, "lower stages, height or width")
    if config.max_tokens is not None:  # text encoders mask each pair of tokens
        check_room(f"max_tokens {config.max_tokens}", config.max_tokens**2, "lower it")
    if config.adapter == "image_prompt":
        side, tokens = config.image_size, config.image_tokens
        check_room(f"image_size {side}", 12 * side**2, "lower it")
        check_room(f"image_tokens {tokens}", 4 * NUMBER * tokens, "lower it")


def check_adapter(config: Any, transformer: nn.Module) -> None:
    """Raise ValueError for a LoRA whose parameters cannot fit, in float32."""
    if config.adapter != "lora" or not config.rank:
        return
    sites = family_of(transformer).self_attentions(transformer)
    size = sum(2 * site.heads * site.dim * config.rank * 4 for site in sites)
    check_room(f"a LoRA of rank {config.rank} on {len(sites)} attentions", size, "lower rank")


def check_batch(config: Any, transformer: Any, tokens: int) -> None:
    """Raise ValueError for a batch that not even one block of the model can hold, or of several
    clips for a model whose texts must be of one length.

    Args:
        tokens: number of tokens of a clip.
    """
    family = family_of(transformer)
    if config.batch_size > 1 and family.ONE_TEXT_LENGTH:
        raise ValueError(
            f"batch_size must be 1 for {family.MODELS}, which has no mask for captions of several "
            f"lengths, got {config.batch_size}: raise gradient_accumulation instead"
        )
    sites = family.self_attentions(transformer)
    width = max(site.heads * site.dim for site in sites)
    itemsize = 4 if config.mixed_precision == "no" else 2
    check_room(
        f"batch_size {config.batch_size} of {tokens} tokens each",
        ACTIVATIONS * config.batch_size * tokens * width * itemsize,
        "lower batch_size, or the frames of stages, height or width",
        transformer.device,
    )
