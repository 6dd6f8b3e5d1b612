"""Rules on temporal rotary frequencies by name, for training at a longer length."""

from typing import TYPE_CHECKING

from torch import nn

from gen_accel.attention_processors.attached.recipe import Recipe
from gen_accel.attention_processors.families import family_for
from gen_accel.attention_processors.lengths import latent_frames, temporal_patch, vae_factor
from gen_accel.parsing import shown
from gen_accel.pipelines.long_video.position_interpolation import PositionInterpolation
from gen_accel.pipelines.long_video.riflex import Riflex, check_heads
from gen_accel.pipelines.long_video.temporal_rule import TemporalRule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

RULES = ("none", "riflex", "position_interpolation")


def apply_rule(transformer: nn.Module, rule: str, *, frames: int, trained: int) -> TemporalRule:
    """Change the temporal rotary frequencies as `extend` does, for training at that length.

    Args:
        rule: one of `RULES`; "none" changes nothing.
        frames: length to make the frequencies for, in latent frames after patchify. Longer grids
            get frequencies for their own length.
        trained: length that the base model was trained at, in the same unit. Grids up to this
            length keep the model's own frequencies.

    Returns:
        A handle; take the rule off by `remove()`, or by leaving its `with`.

    Raises:
        ValueError: what `check_rule` refuses, lengths below 1, or a model that has a rule already.
    """
    check_rule(transformer, rule)
    made = {"riflex": Riflex(), "position_interpolation": PositionInterpolation()}.get(rule)
    frequencies = None if made is None else made.frequencies
    return TemporalRule({"transformer": transformer}, frequencies, frames=frames, trained=trained)


def apply_recipe(
    recipe: Recipe, transformer: "ModelMixin", pipe_or_transformer: "DiffusionPipeline | nn.Module"
) -> TemporalRule:
    """Change the temporal rotary frequencies as they were when a LoRA trained; raises as
    `apply_rule` does."""
    if recipe.rope == "none" or recipe.trained_frames is None:
        return apply_rule(transformer, "none", frames=1, trained=1)
    patch, factor = temporal_patch(transformer), vae_factor(pipe_or_transformer, "temporal") or 4
    frames = latent_frames("frames", recipe.frames, factor, patch)
    trained = latent_frames("trained_frames", recipe.trained_frames, factor, patch)
    return apply_rule(transformer, recipe.rope, frames=frames, trained=trained)


def check_rule(transformer: nn.Module, rule: str) -> None:
    """Refuse a rule that a model cannot have.

    Raises ValueError for an unknown rule, a class that no family serves, or a model that has not
    the rotary frequencies that the rule changes.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {shown(rule)}")
    if rule == "none":
        return
    family = family_for(transformer, "rules on rotary frequencies")
    family.temporal_frequencies(transformer)
    if rule == "riflex":
        check_heads(family)
