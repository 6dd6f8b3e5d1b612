"""Attach the attention that a LoRA was trained with."""

import warnings
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import nn

from gen_accel.pipelines.attach import Attachment, attach, served_transformers
from gen_accel.pipelines.long_video.rope import apply_rule
from gen_accel.pipelines.long_video.technique import latent_frames, temporal_patch
from gen_accel.pipelines.recipe import GuidedTwice, check_base, read_recipe
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
    if recipe.holds_guidance and pipe_or_transformer is not transformer:
        watch = _GuidanceWatch(pipe_or_transformer, recipe.teacher_guidance)
        handle.companions.append(transformer.register_forward_pre_hook(watch).remove)
    return handle


class _GuidanceWatch:
    """A hook that warns of the first call with guidance.

    It holds the pipeline weakly, as that owns the model, and goes with a copy of both.
    """

    def __init__(self, pipe: Any, scale: float) -> None:
        self._pipe, self._scale, self._told = ref(pipe), scale, False

    def __call__(self, module: nn.Module, args: tuple) -> None:
        # In a graph, and of pipelines that do not say, nothing is known.
        if torch.compiler.is_compiling() or self._told:
            return
        if not getattr(self._pipe(), "do_classifier_free_guidance", False):
            return
        self._told = True
        warnings.warn(
            f"the LoRA holds a guidance of {self._scale:g} and is guided again: call the pipeline "
            "with guidance_scale=1, which takes half the time",
            GuidedTwice,
            stacklevel=2,
        )

    def __deepcopy__(self, memo: dict) -> "_GuidanceWatch":
        pipe = self._pipe()
        if pipe is None:
            return self
        return _GuidanceWatch(memo.get(id(pipe), pipe), self._scale)
