"""Checks before torch is imported, which takes seconds, and a message while it is.

The library checks all of this again, as for Python callers; here errors only come sooner.
"""

import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from gen_accel import names
from gen_accel.cli.loading import hide_load_failures
from gen_accel.demo import NAME
from gen_accel.hub import check_there, parted
from gen_accel.json_files import read_fields
from gen_accel.lora.config import Stage, check_installed
from gen_accel.lora.experts import check_parts
from gen_accel.names import FIRST, LAST, VIDEO
from gen_accel.paths import check_replaceable, check_video_suffix, expanded

_CLASS = re.compile(r"[A-Z]\w+(Model|Transformer)")  # of diffusers


def check_names(
    *,
    method: str = "radial",
    kernels: Mapping[str, str | None] | None = None,
    device: str = "auto",
    techniques: Sequence[str] = (),
) -> None:
    """Raise ValueError for a word that is not known.

    Args:
        method: may be "module:Class", which only its import can check.
        kernels: by the option that names them; None is not given.
    """
    loaded = "gen_accel.attention_processors" in sys.modules  # where one may be registered
    if method not in names.METHODS and ":" not in method and not loaded:
        hint = names.nearest_to(method, [*names.METHODS])
        raise ValueError(f"method must be one of {tuple(names.METHODS)}, got {method!r}{hint}")
    for what, kernel in (kernels or {}).items():
        if kernel is not None:
            names.check_kernel(kernel, what)
    if device != "auto" and device.partition(":")[0] not in names.DEVICES:
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {device!r}")
    names.check_techniques(techniques)


def check_model(model: str) -> None:
    """Raise FileNotFoundError for a pipeline that is neither here nor on the hub, ValueError for a
    folder without one."""
    if model == NAME:
        return
    check_there(model, "folder")
    folder = expanded(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{model} holds no model_index.json: give the folder that a diffusers pipeline was "
            "saved in"
        )


def check_subject(model: str) -> None:
    """Raise ValueError or FileNotFoundError for a model of `gen-accel estimate`. A published
    model's name is enough; names of classes are left to the families."""
    if model == NAME or expanded(model).exists():
        return
    if "/" in model:
        check_there(model, "folder")
        return
    known = (*names.PUBLISHED, *names.FAMILIES)
    if model.removesuffix("-Diffusers") not in known and not _CLASS.fullmatch(model):
        raise names.no_model(model)


def check_loras(loras: Iterable[str]) -> None:
    for lora in loras:
        check_there(parted(lora)[0], "LoRA")


def check_files(what: str, files: Iterable[str | Path | None]) -> None:
    """Raise FileNotFoundError for a file or folder that is given and not there."""
    for file in files:
        if file is not None and not expanded(file).exists():
            raise FileNotFoundError(f"no {what} at {file}")


def check_preset(preset: str | None, steps: int | None = None) -> None:
    """Raise FileNotFoundError for a preset that is neither a name nor there, ValueError for a file
    that holds none or was solved for another number of steps."""
    if preset is None or preset in names.PRESETS:
        return
    path = expanded(preset)
    if not path.is_file():
        known = ", ".join(names.PRESETS)
        hint = names.nearest_to(preset, names.PRESETS)
        raise FileNotFoundError(f"no preset at {preset}; the names of presets are {known}{hint}")
    held = read_fields(path)
    if held.get("gen_accel") != "preset":
        raise ValueError(f"{preset} is no preset: gen-accel tune writes one")
    solved = held.get("steps")
    if steps is not None and isinstance(solved, int) and solved != steps:
        raise names.other_steps(preset, solved, steps)


def check_given(
    model: str,
    image: Path | None,
    last_image: Path | None,
    video: Path | None,
    *,
    strength: float | None,
    techniques: Sequence[str] = (),
) -> None:
    """Raise FileNotFoundError for a picture or video that is not there, ValueError for a file that
    is no picture, a strength that means nothing, and a model in a folder that takes them not or
    needs others."""
    check_files("first frame", [image])
    check_files("last frame", [last_image])
    check_files("video", [video])
    names.check_strength(strength, has_video=video is not None)
    given = {FIRST: image, LAST: last_image, VIDEO: video}
    asked = tuple(kind for kind, file in given.items() if file is not None)
    if asked:
        names.check_beside_given(techniques, asked)
    for file in (image, last_image):
        if file is not None:
            _check_picture(file)
    folder = expanded(model)
    if model != NAME and (folder / "model_index.json").is_file():
        from gen_accel.attention_processors.families.pipelines import choose_in

        choose_in(folder, asked, strength=strength is not None)


def _check_picture(file: Path) -> None:
    from PIL import Image, UnidentifiedImageError

    path = expanded(file)
    if path.is_dir():
        raise ValueError(f"{file} must be a picture, but it is a folder")
    try:
        with Image.open(path):
            pass
    except UnidentifiedImageError:
        raise ValueError(f"{file} is no image that Pillow knows") from None


def check_choice(option: str, word: str, known: Sequence[str]) -> None:
    """Raise ValueError for a word that is not in `known`."""
    if word not in known:
        hint = names.nearest_to(word, known)
        raise ValueError(f"{option} must be one of {', '.join(known)}, got {word!r}{hint}")


def check_sources(what: str, *sources: str | None) -> None:
    """Raise FileNotFoundError for sources that are neither here nor on the hub; "demo" is
    embedded."""
    for source in sources:
        if source is not None and source != NAME:
            check_there(source, what)


def check_video(path: Path) -> None:
    """Raise ValueError or OSError for a video that cannot be written at `path`."""
    check_video_suffix(path)
    if path.suffix.lower() in (".png", ""):  # a folder, or one picture
        _check_place(path)
    else:
        check_output(path)


def check_output(path: Path | None, suffix: str = "") -> None:
    """Raise ValueError or OSError for a file that cannot be written at `path`.

    Args:
        suffix: the suffix that it must have.
    """
    if path is None:
        return
    if suffix and path.suffix.lower() != suffix:
        raise ValueError(f"{path} must end in {suffix}")
    if expanded(path).is_dir():
        raise ValueError(f"{path} must be a file, but it is a folder")
    _check_place(path)


def check_folder(what: str, path: str | Path | None) -> None:
    """Raise ValueError for a folder that cannot be made at `path`, as a file is there."""
    if path is None:
        return
    if expanded(path).is_file():
        raise ValueError(f"{what} must be a folder, but {path} is a file")
    _check_place(path)


def _check_place(path: str | Path) -> None:
    place = expanded(path).absolute()
    above = next(folder for folder in place.parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"cannot write to {path}: {above} is a file and no folder")
    check_replaceable(place)


def check_config(given: Mapping[str, Any], *, published: bool = False) -> None:
    """Check the fields of a training's config that choose among names.

    Args:
        published: whether the name of a published model is enough, as for a plan.
    """
    names.check_techniques(given.get("sample_with", ()), "sample_with")
    for stage in given.get("stages", ()):
        Stage.parse(stage)
    check_installed(given)
    check_clips(given)
    check_names(
        method=given.get("method", "radial"),
        kernels={"kernel": given.get("kernel")},
        device=given.get("device", "auto"),
    )
    check = check_subject if published else check_model
    check(given.get("model", NAME))
    check_parts(given)


def check_clips(given: Mapping[str, Any]) -> None:
    """Check the fields of a training's config that are texts on sizes and clips, and that what
    finds scenes is installed."""
    if not {"sizes", "repeats", "scenes"} & given.keys():
        return
    from gen_accel.lora.data.captions import parse_repeats
    from gen_accel.lora.data.clips import parse_sizes
    from gen_accel.lora.data.scenes import check_scenes

    for size in given.get("sizes", ()):
        parse_sizes(size)
    for repeats in given.get("repeats", ()):
        parse_repeats(repeats)
    if given.get("scenes", "off") == "cut":
        check_scenes()


def check_places(given: Mapping[str, Any]) -> None:
    """Check the fields of a training's config that name files or models, which must exist."""
    data = given.get("data")
    if data is not None and not expanded(data).exists():
        raise FileNotFoundError(f"data: there is nothing at {data}")
    for name in ("out", "cache"):
        check_folder(name, given.get(name))
    for name in ("init_lora", "teacher_lora"):
        check_files(f"LoRA for {name}", [given.get(name)])
    check_sources("adapter for init_adapter", given.get("init_adapter"))
    check_sources("image encoder", given.get("image_encoder"))
    for file in given.get("validation_images", ()):
        if not expanded(file).is_file():
            raise FileNotFoundError(f"validation_images: there is no file at {file}")


def announce(what: str = "torch and diffusers", *, asked: Collection[str] = ()) -> None:
    """Say on stderr what the next seconds are spent on, and hide what optional packages say of
    parts that do not load here.

    Args:
        asked: packages that are to run, whose messages are shown.
    """
    hide_load_failures(asked)
    if "torch" not in sys.modules:
        typer.echo(f"loading {what}", err=True)
