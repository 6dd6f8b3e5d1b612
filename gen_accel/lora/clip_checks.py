"""Checks of the fields of a finetuning that choose clips and captions."""

from dataclasses import fields
from typing import Any

from gen_accel.lora.data.captions import parse_repeats

# Fields that a cache keeps what was asked of.
OPTIONS = (
    "take",
    "chunks",
    "scenes",
    "trigger",
    "prefix",
    "shuffle_tags",
    "tag_orders",
    "default_caption",
    "repeats",
)


def check_clips(config: Any) -> None:
    """Check the fields of a `TrainConfig` on clips and captions.

    Raises ValueError for a text that cannot be read, or for fields that do not go together.
    """
    sizes = config.clip_sizes
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"sizes must differ, got {', '.join(config.sizes)}")
    if (config.height, config.width) not in sizes:
        raise ValueError(
            f"height {config.height} and width {config.width}, of the videos sampled, are none of "
            f"sizes {', '.join(config.sizes)}: leave both out, or add {config.height}x"
            f"{config.width} to sizes"
        )
    for text in config.repeats:
        parse_repeats(text)
    if config.is_given("chunks") and config.take != "random":
        raise ValueError(
            f"chunks is for take random, got {config.chunks} with take {config.take}: leave it out"
        )
    if config.is_given("tag_orders") and config.shuffle_tags is None:
        raise ValueError(
            f"tag_orders is for shuffle_tags, which is not given, got {config.tag_orders}: give "
            "shuffle_tags, as 1, or leave it out"
        )
    for name in ("trigger", "default_caption"):
        text = getattr(config, name)
        if text is not None and not text.strip():
            raise ValueError(f"{name} must hold a word, got {text!r}: leave it out for none")


def check_options(config: Any, latents: Any) -> None:
    """Refuse, by a ValueError, a `LatentCache` made with other clips or captions than are asked
    for. A field that is not given takes what the cache has."""
    defaults = {one.name: one.default for one in fields(config)}
    for name in OPTIONS:
        asked, held = getattr(config, name), latents.options.get(name, defaults[name])
        held = tuple(held) if isinstance(held, list) else held
        if config.is_given(name) and asked != held:
            raise ValueError(
                f"{latents.folder} was made with {name} {held!r}, asked for is {asked!r}: give "
                "data, or cache again with this config"
            )
    if config.images and not any(entry.is_picture for entry in latents.entries):
        raise ValueError(
            f"images is {config.images:g}, and {latents.folder} holds no pictures: add some with "
            "captions to data, or leave images out"
        )
