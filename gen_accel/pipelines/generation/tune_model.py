"""Tune the attention of a model from a folder or the hub: load, check, `gen_accel.tune`."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gen_accel import kernels
from gen_accel.attention_processors import Dense
from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.attached.recipe import Recipe, check_base, read_recipe
from gen_accel.attention_processors.lengths import latent_frames, temporal_patch, vae_factor
from gen_accel.config import check_text
from gen_accel.pipelines.generation.loading import Loading, check_model, find_device, load
from gen_accel.pipelines.generation.progress import progress_bar, stage_ticker
from gen_accel.pipelines.generation.sampling import Clip, arguments, check_clip, filled
from gen_accel.pipelines.long_video.rope import apply_rule
from gen_accel.pipelines.tuning.stages import tune
from gen_accel.pipelines.tuning.tuned import Tuned
from gen_accel.process import unwinding

GIVEN = ("frames", "height", "width", "guidance_scale")


def tune_model(
    model: str | Path,
    prompts: Sequence[str],
    *,
    clip: Clip,
    loading: Loading | None = None,
    from_lora: str | Path | None = None,
    held_out: Sequence[str] | None = None,
    kernel: str = "auto",
    **options: Any,
) -> Tuned:
    """Load a pipeline, and find the sparsest attention that keeps a bound on quality.

    Progress goes to stderr.

    Args:
        model: the folder of a saved pipeline, or a repository on the hub.
        clip: sizes, steps, guidance scale and seed. Open values are the pipeline's own, and not a
            part of what the preset was tuned for.
        from_lora: a folder of `gen_accel.lora.train`, with whose weights and positions the model
            is tuned; of a LoRA that holds its guidance, without guidance.
        options: of `gen_accel.tune`.

    Raises:
        ValueError: as `gen_accel.tune`, and an unusable model, size or LoRA.
        OSError: a missing file or repository.
    """
    loading = loading or Loading()
    for prompt in (*prompts, *(held_out or ())):
        check_text("prompt", prompt)
    check_model(model)
    kernels.check_name(kernel, "kernel")
    if kernel != "auto":
        kernels.check_kernel(kernel, find_device(loading.device))
    recipe = None if from_lora is None else _recipe(from_lora)
    if recipe is not None:
        if recipe.rank:
            loading = loading.replaced(loras=(*loading.loras, str(from_lora)))
        if recipe.holds_guidance and clip.guidance_scale is None:
            clip = clip.replaced(guidance_scale=1.0)
    pipe = load(model, loading)
    whole = filled(pipe, clip)
    check_clip(pipe, whole, Dense())
    names = arguments(pipe)
    call = {names[one]: getattr(clip, one) for one in GIVEN if getattr(clip, one) is not None}
    if clip.steps is not None:
        options["num_inference_steps"] = clip.steps
    with ExitStack() as stack:
        stack.enter_context(unwinding())
        bar = stack.enter_context(progress_bar())
        if recipe is not None:
            _set_positions(pipe, recipe, stack)
        return tune(
            pipe,
            prompts,
            held_out=held_out,
            kernel=kernel,
            seed=clip.seed,
            tick=stage_ticker(bar),
            **options,
            **call,
        )


def _recipe(from_lora: str | Path) -> Recipe:
    """Read the recipe of a LoRA that can be tuned with; ValueError for another."""
    recipe = read_recipe(from_lora)
    if recipe.part != "transformer":
        raise ValueError(f"from_lora {from_lora} is for {recipe.part}: tune in Python with it")
    if recipe.techniques:
        raise ValueError(
            f"from_lora {from_lora} generates with {', '.join(recipe.techniques)}, with which "
            "nothing can be tuned: tune with its weights alone, by --lora"
        )
    return recipe


def _set_positions(pipe: Any, recipe: Recipe, stack: ExitStack) -> None:
    """Change the rotary frequencies as the LoRA was trained with, until the stack is closed."""
    transformer: Any = next(iter(served_transformers(pipe).values()))
    check_base(recipe, transformer)
    if recipe.rope == "none" or recipe.trained_frames is None:
        return
    patch, factor = temporal_patch(transformer), vae_factor(pipe, "temporal") or 4
    frames = latent_frames("frames", recipe.frames, factor, patch)
    trained = latent_frames("trained_frames", recipe.trained_frames, factor, patch)
    stack.enter_context(apply_rule(transformer, recipe.rope, frames=frames, trained=trained))
