"""Tune the attention of a model from a folder or the hub: load, check, `gen_accel.tune`."""

from contextlib import ExitStack
from pathlib import Path

from gen_accel import kernels
from gen_accel.attention_processors import Dense
from gen_accel.attention_processors.attached.clock import first_transformer
from gen_accel.attention_processors.attached.recipe import Recipe, check_base, read_recipe
from gen_accel.config import check_outputs
from gen_accel.paths import expanded, model_named
from gen_accel.pipelines.generation.config import Clip, Loading, read_prompts, values_of_clip
from gen_accel.pipelines.generation.loading import find_device, load
from gen_accel.pipelines.generation.model_index import asked_run, check_model, usual_run
from gen_accel.pipelines.generation.progress import Progress, Tick, ticker
from gen_accel.pipelines.generation.sampling import arguments, check_clip, filled
from gen_accel.pipelines.long_video import apply_recipe
from gen_accel.pipelines.tuning.config import TuneConfig
from gen_accel.pipelines.tuning.measuring import PipelineCall
from gen_accel.pipelines.tuning.stages import Tuning
from gen_accel.pipelines.tuning.tuned import Tuned
from gen_accel.process import unwinding


def tune_model(config: TuneConfig) -> Tuned:
    """Load the pipeline of a config, and find the sparsest attention that keeps its bound.

    Progress goes to stderr. Sizes and steps that are not given are those that the model is usually
    run with. Other values of the clip are then the pipeline's own, and not a part of what the
    preset was tuned for.

    Raises:
        ValueError: as `gen_accel.tune`, and an unusable model, size or LoRA, or an output that is
            an input too.
        OSError: a missing file or repository, or an output that is there already.
    """
    assert config.model, "as `check` says"
    assert config.prompts, "as `check` says"
    check_outputs(config)
    prompts = read_prompts(config.prompts)
    held_out = None if config.held_out is None else read_prompts(config.held_out)
    model = model_named(config.model)
    check_model(model)
    if config.kernel != "auto":
        kernels.check_kernel(config.kernel, find_device(config.device))
    recipe = None if config.from_lora is None else _recipe(config.from_lora)
    run = usual_run(config.model) | asked_run(config)
    clip = Clip(**{**values_of_clip(config), **run})
    loras = config.loras
    if recipe is not None:
        loras = (*loras, *([str(config.from_lora)] if recipe.rank else []))
        if recipe.holds_guidance and clip.guidance_scale is None:
            clip = clip.replaced(guidance_scale=1.0)
    pipe = load(model, Loading(dtype=config.dtype, device=config.device, loras=loras))
    check_clip(pipe, filled(pipe, clip), Dense())
    names = {one: name for one, name in arguments(pipe).items() if one != "steps"}
    given = {name: getattr(clip, one) for one, name in names.items()}
    call = {name: value for name, value in given.items() if value is not None}
    with ExitStack() as stack:
        stack.enter_context(unwinding())
        bar = stack.enter_context(Progress())
        stages: dict[str, Tick] = {}

        def tick(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = ticker(bar, stage, "")
            stages[stage](done, total)

        if clip.sampling is not None:
            stack.enter_context(clip.sampling.at_work(pipe))
        if recipe is not None:
            transformer = first_transformer(pipe)
            check_base(recipe, transformer)
            stack.enter_context(apply_recipe(recipe, transformer, pipe))
        passed = PipelineCall(run["steps"], config.seed, call)
        return Tuning(
            pipe, prompts, held_out, passed, config, None, expanded(config.out), tick
        ).go()


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
