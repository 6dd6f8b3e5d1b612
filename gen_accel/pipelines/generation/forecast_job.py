"""Forecast of a job of `generate`: what its run would cost, before anything is loaded."""

import inspect
from typing import Any

from gen_accel.hub import fetched
from gen_accel.io import read_fields
from gen_accel.measure.cost.forecast import Forecast, forecast
from gen_accel.measure.cost.model import subject_of
from gen_accel.paths import model_named
from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.pipelines.generation.generation_plan import GenerationPlan, plan_of
from gen_accel.pipelines.generation.loading import folder_of
from gen_accel.pipelines.generation.model_index import pipeline_class
from gen_accel.pipelines.tuning.preset import choose_preset

STEPS = 50  # of a pipeline without a default


def forecast_job(
    plan: GenerationPlan, *, gpu: str | None = None, remeasure: bool = False
) -> Forecast:
    """Forecast one video of a resolved plan.

    Values that the plan leaves open are the defaults of its pipeline's class.

    Args:
        gpu: a card of `measure.cost.rates`; None: this machine.

    Raises:
        ValueError: what `forecast` refuses, or a size that is given neither by the plan nor by the
            pipeline.
    """
    subject = subject_of(model_named(plan.config.model))
    kind = _pipeline(plan)
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__call__).parameters.items()
        if isinstance(parameter.default, int | float)
    }

    def value(field: str, argument: str) -> Any:
        given = getattr(plan.config, field)
        return known.get(argument) if given is None else given

    frames = value("frames", subject.family.generation.frames_argument)
    height, width = value("height", "height"), value("width", "width")
    missing = {"--frames": frames, "--height": height, "--width": width}
    lacking = [option for option, size in missing.items() if size is None]
    if lacking:
        raise ValueError(f"give {', '.join(lacking)}: {kind.__name__} has no default")
    steps = value("steps", "num_inference_steps")
    method, schedule = plan.method, plan.schedule
    if plan.preset is not None:
        asked = {"num_frames": frames, "height": height, "width": width}
        asked["num_inference_steps"] = plan.config.steps
        method, schedule, found = choose_preset(plan.preset, subject.model, schedule, asked)
        steps = found.method.steps if found is not None else steps
    assert method is not None, "resolved"
    scale = value("guidance_scale", "guidance_scale")
    config: Any = subject.model.config
    distilled = config.get("guidance_embeds", False)
    return forecast(
        model_named(plan.config.model),
        method,
        gpu=gpu,
        dtype=plan.config.dtype,
        guidance=None if scale is None or distilled else scale > 1,
        offload=plan.config.offload,
        remeasure=remeasure,
        height=int(height),
        width=int(width),
        num_frames=int(frames),
        schedule=schedule,
        steps=int(steps or STEPS),
        text=plan.config.max_tokens,
    )


def forecast_generate(config: GenerateConfig, *, gpu: str | None = None) -> Forecast:
    """Forecast one video of a config, which is checked as far as that goes without the model.

    Args:
        gpu: a card of `measure.cost.rates`; None: this machine.
    """
    if not config.texts:
        config = config.replaced(prompt=("any prompt",))  # as none changes the cost
    return forecast_job(plan_of(config), gpu=gpu)


def _pipeline(plan: GenerationPlan) -> Any:
    folder = folder_of(plan.config.model)
    index = folder / "model_index.json"
    if not folder.exists():
        index = fetched(str(plan.config.model), "model_index.json")
    return pipeline_class(read_fields(index).get("_class_name"))
