"""What a verb refuses before torch is imported, which takes seconds, and a line while it is.

The library checks all of this again, as it does for Python; here it is only sooner.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from gen_accel import names
from gen_accel.demo import NAME
from gen_accel.hub import check_there, parted
from gen_accel.paths import check_replaceable, check_video_suffix, expanded


def check_names(
    *,
    method: str = "radial",
    kernels: Mapping[str, str | None] | None = None,
    device: str = "auto",
    techniques: Sequence[str] = (),
) -> None:
    """Raise ValueError for a word that is not known.

    Args:
        method: may be "module:Class", which only its import can tell of.
        kernels: by what holds them; None is not given.
    """
    loaded = "gen_accel.attention_processors" in sys.modules  # where one may be registered
    if method not in names.METHODS and ":" not in method and not loaded:
        hint = names.nearest_to(method, names.METHODS)
        raise ValueError(f"method must be one of {names.METHODS}, got {method!r}{hint}")
    for what, kernel in (kernels or {}).items():
        if kernel is not None:
            names.check_kernel(kernel, what)
    if device != "auto" and device.partition(":")[0] not in names.DEVICES:
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {device!r}")
    names.check_techniques(techniques)


def check_model(model: str) -> None:
    """Raise FileNotFoundError for a pipeline that is neither here nor on the hub, ValueError for a
    folder that holds none."""
    if model == NAME:
        return
    check_there(model, "folder")
    folder = expanded(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{model} holds no model_index.json: give the folder that a diffusers pipeline was "
            "saved in"
        )


def check_loras(loras: Iterable[str]) -> None:
    for lora in loras:
        check_there(parted(lora)[0], "LoRA")


def check_files(what: str, files: Iterable[Path | None]) -> None:
    """Raise FileNotFoundError for a file or folder that is given and not there."""
    for file in files:
        if file is not None and not expanded(file).exists():
            raise FileNotFoundError(f"no {what} at {file}")


def check_outputs(*paths: Path | None, suffix: str | None = None) -> None:
    """Raise ValueError or OSError for a file that cannot be written.

    Args:
        suffix: that each must have; None: one of a video.
    """
    for path in paths:
        if path is None:
            continue
        if suffix is None:
            check_video_suffix(path)
        elif path.suffix.lower() != suffix:
            raise ValueError(f"{path} must end in {suffix}")
        check_replaceable(expanded(path))


def check_training(given: Mapping[str, Any]) -> None:
    """The fields of a config that name what has to be there."""
    text = {name: value for name, value in given.items() if isinstance(value, str)}
    check_names(
        method=text.get("method", "radial"),
        kernels={"kernel": text.get("kernel")},
        device=text.get("device", "auto"),
    )
    check_model(text.get("model", NAME))
    data = text.get("data")
    if data is not None and not expanded(data).exists():
        raise FileNotFoundError(f"data: there is nothing at {data}")


def announce(what: str = "torch and diffusers") -> None:
    """Say on stderr what the next seconds go by with."""
    if "torch" not in sys.modules:
        typer.echo(f"loading {what}", err=True)
