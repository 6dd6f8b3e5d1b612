"""Forecast of a job of `generate`: what its run would cost, before anything is loaded."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gen_accel.hub import fetched
from gen_accel.json_files import read_fields
from gen_accel.measure.cost.forecast import Forecast, forecast
from gen_accel.measure.cost.model import subject_of
from gen_accel.pipelines.generation.job import Job
from gen_accel.pipelines.generation.loading import Loading, folder_of
from gen_accel.pipelines.generation.model_index import pipeline_class
from gen_accel.pipelines.generation.sampling import Clip
from gen_accel.pipelines.tuning.preset import choose_preset

STEPS = 50  # of a pipeline without a default


def forecast_job(job: Job, *, gpu: str | None = None, remeasure: bool = False) -> Forecast:
    """Forecast one video of a resolved job.

    Values that the job leaves open are the defaults of its pipeline's class.

    Args:
        gpu: a card of `measure.cards`; None: this machine.

    Raises:
        ValueError: what `forecast` refuses, or a size that is given neither by the job nor by the
            pipeline.
    """
    subject = subject_of(job.model)
    kind = _pipeline(job)
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__call__).parameters.items()
        if isinstance(parameter.default, int | float)
    }

    def value(field: str, argument: str) -> Any:
        given = getattr(job.clip, field)
        return known.get(argument) if given is None else given

    frames = value("frames", subject.family.generation.frames_argument)
    height, width = value("height", "height"), value("width", "width")
    missing = {"--frames": frames, "--height": height, "--width": width}
    lacking = [option for option, size in missing.items() if size is None]
    if lacking:
        raise ValueError(f"give {', '.join(lacking)}: {kind.__name__} has no default")
    steps = value("steps", "num_inference_steps")
    method, schedule = job.method, job.schedule
    if job.preset is not None:
        asked = {"num_frames": frames, "height": height, "width": width}
        asked["num_inference_steps"] = job.clip.steps
        method, schedule, found = choose_preset(job.preset, subject.model, schedule, asked)
        steps = found.method.steps if found is not None else steps
    assert method is not None, "resolved"
    scale = value("guidance_scale", "guidance_scale")
    config: Any = subject.model.config
    distilled = config.get("guidance_embeds", False)
    return forecast(
        job.model,
        method,
        gpu=gpu,
        dtype=job.loading.dtype,
        guidance=None if scale is None or distilled else scale > 1,
        offload=job.loading.offload,
        remeasure=remeasure,
        height=int(height),
        width=int(width),
        num_frames=int(frames),
        schedule=schedule,
        steps=int(steps or STEPS),
        text=job.clip.max_tokens,
    )


def forecast_generate(
    model: str | Path,
    prompts: Sequence[str],
    *,
    gpu: str | None = None,
    out: str | Path,
    techniques: Sequence[str] | None = None,
    latents: str | Path | None = None,
    numbered: bool = False,
    resume: bool = False,
    settings: bool = True,
    named: Mapping[str, str] | None = None,
    clip: Clip | None = None,
    loading: Loading | None = None,
    **options: Any,
) -> Forecast:
    """Forecast one video of a call of `generate` with the same arguments, which is checked as far
    as that goes without loading the model.

    Args:
        gpu: a card of `measure.cards`; None: this machine.
        resume, settings, named: count for nothing here.
    """
    job = Job(model=model, clip=clip or Clip(), loading=loading or Loading(), **options)
    job = job.resolve(prompts, out=out, techniques=techniques, latents=latents, numbered=numbered)
    return forecast_job(job, gpu=gpu)


def _pipeline(job: Job) -> Any:
    folder = folder_of(job.model)
    index = folder / "model_index.json"
    if not folder.exists():
        index = fetched(str(job.model), "model_index.json")
    return pipeline_class(read_fields(index).get("_class_name"))
