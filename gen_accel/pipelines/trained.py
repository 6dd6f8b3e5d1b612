"""Attach the attention that a LoRA was trained with."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gen_accel.pipelines.attach import Attachment, attach, served_transformers
from gen_accel.pipelines.long_video.rope import apply_rule
from gen_accel.pipelines.long_video.technique import latent_frames, temporal_patch
from gen_accel.pipelines.recipe import GuidedTwice, Recipe, check_base, read_recipe
from gen_accel.pipelines.schedule import Schedule
from gen_accel.pipelines.storage import CONFIG, load_processors


def attach_trained(
    pipe_or_transformer: Any,
    folder: str | Path,
    *,
    schedule: Schedule | None = None,
    **options: Any,
) -> Attachment:
    """`gen_accel.attach(pipe, from_lora=folder)`."""
    folder = Path(folder).expanduser()
    folder = folder.parent if folder.is_file() else folder
    recipe = read_recipe(folder)
    transformers = served_transformers(pipe_or_transformer)
    transformer: Any = transformers.get(recipe.part, next(iter(transformers.values())))
    check_base(recipe, transformer)
    chosen = schedule if schedule is not None else recipe.build_schedule()
    if folder.is_dir() and (folder / CONFIG).is_file():
        handle = load_processors(pipe_or_transformer, folder, schedule=chosen, **options)
    else:
        handle = attach(pipe_or_transformer, recipe.build_method(), schedule=chosen, **options)
    if recipe.rope != "none" and recipe.trained_frames is not None:
        patch = temporal_patch(transformer)
        factor = getattr(pipe_or_transformer, "vae_scale_factor_temporal", 4)
        try:
            lengths = {
                "frames": latent_frames("frames", recipe.frames, factor, patch),
                "trained": latent_frames("trained_frames", recipe.trained_frames, factor, patch),
            }
            rule = apply_rule(transformer, recipe.rope, **lengths)
        except ValueError:
            handle.detach()
            raise
        handle.companions.append(rule.remove)
    if recipe.holds_guidance:
        handle.companions.append(_watch_guidance(pipe_or_transformer, transformer, recipe))
    return handle


def _watch_guidance(pipe: Any, transformer: nn.Module, recipe: Recipe) -> Callable[[], None]:
    """Warn of the first call with guidance; returns what ends the watch."""

    def check(module: nn.Module, args: tuple) -> None:
        # Of pipelines that do not say, and in a graph, nothing is known.
        if torch.compiler.is_compiling() or not getattr(
            pipe, "do_classifier_free_guidance", False
        ):
            return
        watch.remove()
        warnings.warn(
            f"the LoRA holds a guidance of {recipe.teacher_guidance:g} and is guided again: call "
            "the pipeline with guidance_scale=1, which takes half the time",
            GuidedTwice,
            stacklevel=2,
        )

    watch = transformer.register_forward_pre_hook(check)
    return watch.remove
