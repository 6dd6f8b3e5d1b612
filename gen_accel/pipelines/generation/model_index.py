"""A model before its weights: the index of its folder, the classes that it names, a pipeline
of its configs alone, and the size of a run where nothing is said.

An index may name public classes of diffusers and transformers. To import anything else that a
folder names would be to run the folder's code. Newer versions of the libraries check this
themselves; here the check holds with all versions.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType, NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_origin, get_type_hints

import torch
from torch import nn

from gen_accel.attention_processors.attached.clock import TRANSFORMERS
from gen_accel.attention_processors.families import family_named, served_classes, video_classes
from gen_accel.attention_processors.families.pipelines import takes
from gen_accel.hub import (
    check_pipeline,
    fetched,
    index_file,
    index_in,
    silenced,
)
from gen_accel.io import places_in, read_fields, read_index
from gen_accel.measure.cost.model import subject_of
from gen_accel.parsing import example, fits, members, shown, wrong_type
from gen_accel.paths import expanded, model_named
from gen_accel.pipelines.generation.of_blocks import called, is_of_blocks
from gen_accel.pipelines.generation.single_file import load_original, original_in
from gen_accel.registry import EXPERTS
from gen_accel.served import DEMO, RUNS, RunSize, row_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Index = Mapping[str, Any]  # see `io.read_index`

# Base classes of a pipeline's parts, by library.
KINDS = {
    "diffusers": ("ModelMixin", "SchedulerMixin", "BaseGuidance"),
    "transformers": (
        *("PreTrainedModel", "PreTrainedTokenizer", "PreTrainedTokenizerFast"),
        *("PreTrainedTokenizerBase", "FeatureExtractionMixin", "ImageProcessingMixin"),
        "ProcessorMixin",
    ),
}
PLAIN = (bool, int, float, str, NoneType)  # types of a pipeline's options
MOST_SAID = 400  # most characters of a library's error
Kind = TypeVar("Kind")


def check_model(model: str | Path) -> None:
    """Refuse a model without a loadable pipeline, by reading one small file at most.

    Raises:
        ValueError: a folder without a pipeline, or with a pipeline that no family serves.
        FileNotFoundError: neither a folder nor a name that the hub could know.
    """
    check_pipeline(model)
    folder = folder_of(model)
    if not folder.exists():
        return
    index = index_in(folder)
    assert index is not None, "checked"
    kind, _ = classes_in(read_index(index), index)
    if kind is not None and kind not in served_classes():
        raise ValueError(f"no family serves {kind} of {model}; see `gen-accel models`")
    if kind is not None and kind not in video_classes():
        raise ValueError(f"{kind} of {model} makes images and no video; attach to it in Python")


def index_of(model: str | Path) -> Index:
    """Read the index of a pipeline.

    Raises:
        ValueError: a model that `check_model` or `check_index` refuses.
        OSError: a repository that is out of reach.
    """
    check_model(model)
    source = location_of(model)
    index = read_index(index_file(source))
    check_index(index, source)
    return index


def check_index(index: Index, source: str | Path) -> None:
    """Refuse a pipeline whose index names anything but public classes of the two libraries.

    Args:
        source: the folder, or the name of a repository.

    Raises:
        ValueError: a part is no such class, or the folder holds code in place of the class. The
            error gives the part and the name.
    """
    parts = parts_in(index, source)
    if not parts.keys() & {*TRANSFORMERS}:
        raise ValueError(
            f"model_index.json of {source} has no transformer or unet: add its library and class"
        )
    if index.get("boundary_ratio") is not None and EXPERTS[1] not in parts:
        raise ValueError(
            f"boundary_ratio of {source} is the noise from which {EXPERTS[1]} runs, which is not "
            "there: add that part, or remove boundary_ratio from model_index.json"
        )
    for part, kind in parts.items():
        found = part_class(kind, part)
        code = Path(source) / part / f"{kind[0]}.py"
        if code.exists():  # older diffusers would take the class from there
            raise ValueError(f"{code} is code in the place of {found.__name__}: it is not run")


def parts_in(index: Index, origin: str | Path) -> dict[str, Sequence[str]]:
    """Return library and class of each part that a pipeline has.

    Args:
        origin: name of the index, for messages.

    Raises ValueError for a part that is no library and class, and for an option of the pipeline of
    another type.
    """
    hints = get_type_hints(pipeline_class(index.get("_class_name")).__init__)
    found = {}
    for name, value in index.items():
        kinds = members(hints[name]) if name in hints else ()
        if kinds and all(one in PLAIN or get_origin(one) for one in kinds):
            if not fits(value, hints[name]):
                right = f"{name}={example(hints[name])!r}"
                raise wrong_type(f"{name} of {origin}", hints[name], value, right)
        elif not name.startswith("_") and (kinds or isinstance(value, list | tuple)):
            found[name] = _pair(name, value, origin)
    return {name: pair for name, pair in found.items() if pair[0] is not None}


def classes_in(index: Index, origin: str | Path) -> tuple[str | None, str | None]:
    """Return the class names of the first transformer and the autoencoder in an index.

    Args:
        origin: name of the index, for messages.
    """
    none = [None, None]
    found = {
        name: _pair(name, index.get(name, none), origin)[1] for name in (*TRANSFORMERS, "vae")
    }
    return next(filter(None, map(found.get, TRANSFORMERS)), None), found["vae"]


def _pair(name: str, value: object, origin: str | Path) -> Any:
    """Return the library and the class of a part in an index, None and None if it is not there."""
    if not fits(value, tuple[str | None, str | None]):
        raise ValueError(
            f"{name} in {origin} must be a library and a class, or [null, null] for none, got "
            f"{shown(value)}"
        )
    return value


def pipeline_class(name: object) -> type[Any]:
    """Return the pipeline of diffusers of that name, one of blocks as `called` makes it;
    ValueError for anything else."""
    import diffusers

    found = _public(diffusers, name, type)
    if found is not None and issubclass(found, diffusers.ModularPipeline):
        return called(found)
    if found is None or not issubclass(found, diffusers.DiffusionPipeline):
        raise ValueError(f"_class_name must be a pipeline of diffusers, got {name!r}")
    return found


def part_class(kind: Sequence[str | None], part: str) -> type[Any]:
    """Return the class of a part of a pipeline.

    Args:
        kind: library and name. diffusers keeps some parts beside their pipeline, and names the
            pipeline's module in place of the library.

    Raises:
        ValueError: another library, or a name that is no public class of the kinds in `KINDS`.
    """
    from diffusers import pipelines

    library, name = kind if len(kind) == 2 else (kind, None)
    known = import_module(str(library)) if library in KINDS else None
    home = known or _public(pipelines, library, ModuleType)
    if home is None:
        raise ValueError(
            f"{part} must be a class of diffusers or transformers, got {library}.{name}, which "
            "would be code that comes with the model"
        )
    found = _public(home, name, type)
    kinds = KINDS.get(str(library), KINDS["diffusers"])
    bases = [getattr(import_module(home.__name__.split(".")[0]), base, None) for base in kinds]
    if found is None or not issubclass(found, tuple(base for base in bases if base is not None)):
        raise ValueError(
            f"{part} must be a model, a scheduler, a tokenizer or a processor of {library}, got "
            f"{name!r}"
        )
    return found


def places_of(index: Index, source: str) -> dict[str, tuple[str, str]]:
    """Map the parts of a pipeline to where they lie: a folder or repository, and a folder in it.

    Args:
        source: the folder or repository of the index.
    """
    parts = parts_in(index, source)
    if not is_of_blocks(pipeline_class(index["_class_name"])):
        return {name: (source, name) for name in parts}
    return {name: place for name, place in places_in(index_file(source)).items() if name in parts}


def options_in(index: Index) -> dict[str, Any]:
    """Return the plain values of an index."""
    return {name: one for name, one in index.items() if name[0] != "_" and isinstance(one, PLAIN)}


def load_part(source: str, name: str, kind: Sequence[str], dtype: torch.dtype) -> Any:
    """Load one component of the pipeline in the folder or repository `source`, from a single file
    in the names of the original model too.

    Args:
        name: of its folder.
    """
    found: Any = part_class(kind, name)
    original = original_in(Path(source) / name)
    if original is not None:
        return load_original(original, found, dtype)
    options = {"dtype": dtype} if nn.Module in found.__mro__ else {}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*weight_norm", FutureWarning
        )  # as of MiniMax-H3's sound
        return found.from_pretrained(source, subfolder=name, **options)


def skeleton(model: str | Path) -> "DiffusionPipeline":
    """Make a pipeline without values: its models lie on the meta device, its scheduler is as
    configured, and tokenizers and whatever else only a run needs are None.

    `gen_accel.extend` and `attach` refuse it what they refuse the model itself. It generates
    nothing.

    Args:
        model: the folder of a saved pipeline, or a repository on the hub, of which only config
            files are read.

    Raises:
        ValueError: a model that `index_of` refuses, or a pipeline that cannot be made so.
        OSError: a missing file or repository.
    """
    from gen_accel.measure.cost.model import components_of, subject_of

    index, folder = index_of(model), folder_of(model)
    components, _ = components_of(model, subject_of(model), torch.float32)
    models = {part.name: part.model for part in components if part.model is not None}
    given: dict[str, Any] = {}
    for name, kind in parts_in(index, model).items():
        given[name] = models.get(name)
        found = part_class(kind, name)
        if not issubclass(found, nn.Module) and hasattr(found, "from_config"):
            file = f"{name}/{found.config_name}"
            path = folder / file if folder.exists() else fetched(location_of(model), file)
            given[name] = found.from_config(read_fields(path))
    for name in TRANSFORMERS:
        if given.get(name) is not None:  # beside which `gen_accel.json` may lie
            given[name].register_to_config(_name_or_path=str(folder / name))
    made = pipeline_class(index["_class_name"])
    try:
        if is_of_blocks(made):
            return made.of_parts(options_in(index), given)
        return made(**given)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{model} cannot be looked at without its weights: {made.__name__} needs more than "
            f"configs ({error})"
        ) from error


def folder_of(model: str | Path) -> Path:
    """Path of a pipeline's folder, whether or not it exists."""
    return expanded(model_named(model))


def location_of(model: str | Path) -> str:
    """Return the model's location for `from_pretrained`: a folder or a repository."""
    folder = folder_of(model)
    return str(folder) if folder.exists() else model_named(model)


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


@contextmanager
def one_line(source: object) -> Iterator[None]:
    """Shorten a library's error on loading files to one line that names the source."""
    try:
        with silenced("diffusers"):  # its log lists pages of names
            yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # The first line states the error; in a list of misfits the second is an example.
        said = " ".join(lines[:2])[:MOST_SAID] or type(error).__name__
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{source} cannot be loaded: {said}") from error


def _public(home: ModuleType, name: object, kind: type[Kind]) -> Kind | None:
    """Return what a module calls by a public name, if it is of a kind."""
    is_public = isinstance(name, str) and name.isidentifier() and not name.startswith("_")
    found = getattr(home, str(name), None) if is_public else None
    return found if isinstance(found, kind) else None
