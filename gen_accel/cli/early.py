"""Checks before torch is imported, which takes seconds, and a message while it is."""

import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import typer

from gen_accel import registry
from gen_accel.cli.loading import hide_load_failures
from gen_accel.demo import NAME
from gen_accel.hub import check_pipeline, check_sources, check_there, parted
from gen_accel.lora.config import Stage, check_installed
from gen_accel.lora.experts import check_parts
from gen_accel.paths import check_files, check_folder_path, expanded

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
    registry.check_method(method)
    for what, kernel in (kernels or {}).items():
        if kernel is not None:
            registry.check_kernel(kernel, what)
    if device != "auto" and device.partition(":")[0] not in registry.DEVICES:
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {device!r}")
    registry.check_techniques(techniques)


def check_subject(model: str) -> None:
    """Raise ValueError or FileNotFoundError for a model of `gen-accel estimate`. A published
    model's name is enough; names of classes are left to the families."""
    if model == NAME or expanded(model).exists():
        return
    if "/" in model:
        check_there(model, "folder")
        return
    known = (*registry.PUBLISHED, *registry.FAMILIES)
    if model.removesuffix("-Diffusers") not in known and not _CLASS.fullmatch(model):
        raise registry.no_model(model)


def check_loras(loras: Iterable[str]) -> None:
    for lora in loras:
        check_there(parted(lora)[0], "LoRA")


def check_choice(option: str, word: str, known: Sequence[str]) -> None:
    """Raise ValueError for a word that is not in `known`."""
    if word not in known:
        hint = registry.nearest_to(word, known)
        raise ValueError(f"{option} must be one of {', '.join(known)}, got {word!r}{hint}")


def check_config(given: Mapping[str, Any], *, published: bool = False) -> None:
    """Check the fields of a training's config that choose among names.

    Args:
        published: whether the name of a published model is enough, as for a plan.
    """
    registry.check_techniques(given.get("sample_with", ()), "sample_with")
    for stage in given.get("stages", ()):
        Stage.parse(stage)
    check_installed(given)
    check_clips(given)
    check_names(
        method=given.get("method", "radial"),
        kernels={"kernel": given.get("kernel")},
        device=given.get("device", "auto"),
    )
    check = check_subject if published else check_pipeline
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
        check_folder_path(name, given.get(name))
    for name in ("init_lora", "teacher_lora"):
        check_files(f"LoRA for {name}", given.get(name))
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
