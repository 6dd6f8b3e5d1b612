"""A model of single files: a folder of diffusers whose weights are links to them.

    assemble("outputs/wan", ["wan2.1_t2v_1.3B_fp16.safetensors", "wan_2.1_vae.safetensors"],
             base="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")

Configs, tokenizer and scheduler come from the base, and the models for which no file is given. The
folder holds no weights, and is a model like any other wherever one is taken.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from gen_accel.hub import downloaded, fetched
from gen_accel.io import named, replacing
from gen_accel.paths import WEIGHTS, check_folder_path, expanded, weights_named
from gen_accel.pipelines.generation.model_index import (
    index_of,
    location_of,
    part_class,
    parts_in,
)
from gen_accel.pipelines.generation.single_file import (
    NAMES,
    OWN,
    Misfit,
    base_of,
    check_original,
    original_in,
)

ABOUT = ("model_index.json", "gen_accel.json")


class Assembled(NamedTuple):
    """A model that was assembled.

    Args:
        base: folder or repository of all that is in no file.
        files: the file of a part, by the part's name.
        others: models from the base.
    """

    folder: Path
    base: str
    files: dict[str, Path]
    others: list[str]


def assemble(
    out: str | Path, files: Sequence[str], *, base: str | Path | None = None
) -> Assembled:
    """Make a folder of diffusers around single files, which are linked and not copied.

    Args:
        files: "FILE", or "PART=FILE" where a file fits several parts, as those of two experts.
        base: folder or hub repository of a pipeline. Default: the repository that diffusers takes
            such files to be of.

    Raises:
        ValueError: a file that fits no part or several, of another format, or two for one part; a
            base that `index_of` refuses, or none.
        OSError: a missing file or repository, or a folder that cannot be written.
    """
    check_folder_path("out", out)
    given = [weights_named(text) for text in files]
    source = base if base is not None else base_of([path for _, path in given])
    index = index_of(source)
    models = {
        name: found
        for name, kind in parts_in(index, source).items()
        if issubclass(found := part_class(kind, name), nn.Module)
    }
    location = location_of(source)
    chosen: dict[str, Path] = {}
    for part, path in given:
        name = _part_for(path, part, models, location)
        if name in chosen:
            raise ValueError(f"{chosen[name]} and {path} are both for {name}: give one")
        chosen[name] = path
    others = [name for name in models if name not in chosen]
    parts = list(parts_in(index, source))
    home = Path(location)
    if not home.exists():
        whole = [f"{name}/*" for name in parts if name not in chosen]
        home = downloaded(location, [*ABOUT, *(f"{name}/*.json" for name in chosen), *whole])
    for name in others:
        _check_weights(home, name, source)
    place = expanded(out)
    with replacing(place) as partial:
        _write(partial, home, parts, chosen, others)
    return Assembled(place, str(source), chosen, others)


def _part_for(path: Path, part: str | None, models: Mapping[str, Any], location: str) -> str:
    """Name the part of a pipeline that a file holds, by its tensors."""
    if part is not None and part not in models:
        raise ValueError(f"{location} has no {part} to take from {path}: it has {named(models)}")
    fits, wrong = [], list[Misfit]()
    for name, kind in models.items() if part is None else [(part, models[part])]:
        config = f"{name}/config.json"
        here = Path(location) / config
        folder = (here if Path(location).exists() else fetched(location, config)).parent
        try:
            check_original(path, kind, folder)
            fits.append(name)
        except Misfit as error:
            wrong.append(error)
    if not fits:
        raise min(wrong, key=lambda error: error.distance)
    if len(fits) > 1:
        raise ValueError(
            f"{path} fits {' and '.join(fits)}: say which, as {fits[0]}={path.name}; of two "
            "experts, transformer is for high noise and transformer_2 for low"
        )
    return fits[0]


def _check_weights(home: Path, name: str, source: str | Path) -> None:
    folder = home / name
    held = os.listdir(folder) if folder.is_dir() else []
    if not any(map(OWN.fullmatch, held)) and original_in(folder) is None:
        raise ValueError(
            f"no file is given for {name}, and {source} holds no weights of it: give "
            f"{name}=FILE, or a base with them"
        )


def _write(
    folder: Path, home: Path, parts: Sequence[str], chosen: Mapping[str, Path], others: list[str]
) -> None:
    folder.mkdir()
    for name in ABOUT:
        if (home / name).is_file():
            shutil.copyfile(home / name, folder / name)
    for name in parts:
        source, place = home / name, folder / name
        if name in others:
            place.symlink_to(os.path.abspath(source), target_is_directory=True)
            continue
        if name not in chosen:
            shutil.copytree(source, place)
            continue
        place.mkdir()
        for file in source.glob("*.json"):
            if not file.name.endswith(".index.json"):  # of weights in several files
                shutil.copyfile(file, place / file.name)
        path = chosen[name]
        link = place / NAMES[WEIGHTS.index(path.suffix)]
        link.symlink_to(os.path.abspath(path))
