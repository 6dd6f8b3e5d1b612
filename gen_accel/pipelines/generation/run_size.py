"""Size of a run where nothing is said: that of the published model, or of its pipeline's call."""

import inspect
from pathlib import Path

from gen_accel.attention_processors.families import family_named, served_classes
from gen_accel.attention_processors.families.pipelines import takes
from gen_accel.hub import index_in
from gen_accel.measure.cost.model import subject_of
from gen_accel.paths import model_named
from gen_accel.pipelines.generation.model_index import (
    classes_in,
    folder_of,
    index_of,
    pipeline_class,
    skeleton,
)
from gen_accel.served import DEMO, RUNS, RunSize, row_of


def known_run(model: str | Path) -> RunSize | None:
    """Return what `served.RUNS` says of a model, by its name; None for others."""
    folder = folder_of(model)
    if folder == Path(model_named(DEMO)):
        return RUNS[DEMO]
    row = None if folder.exists() else row_of(str(model))
    return RUNS[row.published] if row is not None and row.published else None


def usual_run(model: str | Path, picture: tuple[int, int] | None = None) -> dict[str, int]:
    """Return what a model is run with where nothing is said, by the fields of `RunSize`: as
    `known_run`, or by the defaults of its pipeline's call, as far as that has any, or by its own
    rule for a picture of 16:9.

    Args:
        model: as `subject_of` takes it, by name or folder.
        picture: height and width of one that a video begins with, which such a rule is asked for.

    Raises as `index_of`, for a model that is not known by name, and with a picture for all.
    """
    known, names = known_run(model), ("height", "width")
    if known is not None and picture is None:
        return known._asdict()
    folder = folder_of(model)
    found = dict(RunSize._field_defaults) if known is None else known._asdict()
    if folder.is_dir() and index_in(folder) is None:  # a transformer alone
        return found
    index = index_of(model)
    kind, _ = classes_in(index, model)
    family = family_named(served_classes()[kind]) if kind in served_classes() else None
    frames = "num_frames" if family is None else family.generation.frames_argument
    call = inspect.signature(pipeline_class(index["_class_name"]).__call__).parameters
    arguments = {"frames": frames, **{n: n for n in names}, "steps": "num_inference_steps"}
    for name, argument in arguments.items():
        if known is None and argument in call and isinstance(call[argument].default, int):
            found[name] = call[argument].default
    row = takes(index["_class_name"])
    if row is not None and callable(row.size) and (picture or not found.keys() >= {*names}):
        found |= zip(names, row.size(skeleton(model), *(picture or (9, 16))), strict=True)
    return found


def frame_rate_of(model: str | Path, given: float | None = None) -> float:
    """Return `given`, or the frames a second that a model makes: by the default of its pipeline's
    call, or as it was published."""
    if given is not None:
        return given
    folder, call = folder_of(model), dict[str, inspect.Parameter]()
    is_pipeline = index_in(folder) is not None or not folder.exists()
    if is_pipeline and known_run(model) is None:
        kind = pipeline_class(index_of(model)["_class_name"])
        call = dict(inspect.signature(kind.__call__).parameters)
    rates = (call[name].default for name in ("frame_rate", "fps") if name in call)
    known = next((one for one in rates if isinstance(one, int | float)), None)
    subject = subject_of(model_named(model))
    return float(known or subject.family.sizes_of(subject.config).fps)


def frames_in(model: str | Path, seconds: float, fps: float | None = None) -> int:
    """Return the number of frames that a model makes whose length is nearest to `seconds`.

    Args:
        fps: frames a second; None: see `frame_rate_of`.

    Raises as `subject_of` and `index_of`.
    """
    return subject_of(model_named(model)).frames_in(seconds, frame_rate_of(model, fps))


def asked_run(clip: object) -> dict[str, int]:
    """Return what a config asks of a run, by the fields of `RunSize`; of one without steps, their
    default."""
    usual = RunSize._field_defaults
    asked = {name: getattr(clip, name, usual.get(name)) for name in RunSize._fields}
    return {name: size for name, size in asked.items() if size is not None}


def whole_run(model: str | Path, clip: object, picture: tuple[int, int] | None = None) -> RunSize:
    """Return what a model is run with: as `clip` asks, or else by `usual_run`; raises ValueError
    for a size that neither says."""
    found = asked_run(clip)
    if (seconds := getattr(clip, "seconds", None)) is not None:
        found["frames"] = frames_in(model, seconds, getattr(clip, "fps", None))
    if len(found) < len(RunSize._fields):
        found = {**usual_run(model, picture), **found}
    if lacking := ", ".join(f"--{name}" for name in RunSize._fields if name not in found):
        raise ValueError(f"give {lacking}: {model} has no default")
    return RunSize(**found)
