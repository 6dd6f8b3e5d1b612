"""A model of single files: a folder of diffusers whose weights are links to them.

    assemble("outputs/wan", ["wan2.1_t2v_1.3B_fp16.safetensors", "wan_2.1_vae.safetensors"],
             base="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")

Configs, tokenizer and scheduler come from the base, and the models for which no file is given. The
folder holds no weights, and is a model like any other wherever one is taken.

Two trainings of one model may be added up, FILE + (PLUS - MINUS), as TurboDiffusion adds sparse
attention, SLA, to a model of few steps, rCM (`merge_models.py` of thu-ml/TurboDiffusion at main).
The sum is written into the folder. Unlike there, weights that one file lacks are refused, but for
the parameters of a method, such as `proj_l`, which PLUS brings.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gen_accel.attention_processors.attached.trained import TRAINED
from gen_accel.hub import downloaded, fetched
from gen_accel.io import check_finite, named, replacing, save_tensors
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
    header_of,
    original_in,
    plain_names,
)

EMPTY = torch.empty(0)
ABOUT = ("model_index.json", "gen_accel.json")


class Assembled(NamedTuple):
    """A model that was assembled.

    Args:
        base: folder or repository of all that is in no file.
        files: the file of a part, by the part's name.
        others: models from the base.
        merged: the part that is a sum; "": none.
    """

    folder: Path
    base: str
    files: dict[str, Path]
    others: list[str]
    merged: str = ""


class Difference(NamedTuple):
    """Two files whose difference is added to the weights of a part.

    Args:
        part: its name; None: the one with the same tensors.
        plus, minus: files of its weights, after and before a training.
    """

    part: str | None
    plus: Path
    minus: Path


def assemble(
    out: str | Path,
    files: Sequence[str],
    *,
    base: str | Path | None = None,
    plus: str | None = None,
    minus: str | None = None,
) -> Assembled:
    """Make a folder of diffusers around single files, which are linked and not copied.

    Args:
        files: "FILE", or "PART=FILE" where a file fits several parts, as those of two experts.
        base: folder or hub repository of a pipeline. Default: the repository that diffusers takes
            such files to be of.
        plus, minus: "FILE" or "PART=FILE", the weights of one part after and before a training,
            whose difference is added to the file of that part.

    Raises:
        ValueError: a file that fits no part or several, of another format, or two for one part; a
            base that `index_of` refuses, or none; weights that cannot be added up.
        OSError: a missing file or repository, or a folder that cannot be written.
    """
    check_folder_path("out", out)
    given, difference = [weights_named(text) for text in files], difference_of(plus, minus)
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
    merged = "" if difference is None else _merged_part(difference, chosen)
    parts = list(parts_in(index, source))
    home = Path(location)
    if not home.exists():
        whole = [f"{name}/*" for name in parts if name not in chosen]
        home = downloaded(location, [*ABOUT, *(f"{name}/*.json" for name in chosen), *whole])
    for name in others:
        folder = home / name
        held = os.listdir(folder) if folder.is_dir() else []
        if not any(map(OWN.fullmatch, held)) and original_in(folder) is None:
            raise ValueError(
                f"no file is given for {name}, and {source} holds no weights of it: give "
                f"{name}=FILE, or a base with them"
            )
    place = expanded(out)
    with replacing(place) as partial:
        _write(partial, home, parts, chosen, others)
        if difference is not None:
            _write_sum(partial / merged, chosen[merged], difference)
    return Assembled(place, str(source), chosen, others, merged)


def difference_of(plus: str | None, minus: str | None) -> Difference | None:
    """Check the two files of a difference, and of which part they are; None without them."""
    if plus is None or minus is None:
        if plus or minus:
            raise ValueError("give plus and minus, weights after and before a training, or none")
        return None
    (part, after), (other, before) = weights_named(plus), weights_named(minus)
    if None not in (part, other) and part != other:
        raise ValueError(f"plus is for {part} and minus for {other}: give two of one part")
    for path in (after, before):
        if path.suffix != WEIGHTS[0]:
            raise ValueError(f"{path} is quantised: give its weights as .safetensors of full size")
    return Difference(part or other, after, before)


def _merged_part(difference: Difference, chosen: Mapping[str, Path]) -> str:
    """Name the part that a difference is added to; ValueError for weights that do not go
    together, by the headers alone."""
    part, plus, minus = difference
    if part is not None and part not in chosen:
        raise ValueError(f"{plus} is for {part}, of which no file is given: add {part}=FILE")
    headers = {name: plain_names(header_of(path)) for name, path in chosen.items()}
    after, before = (plain_names(header_of(path)) for path in (plus, minus))
    like = [name for name, own in headers.items() if len(own.keys() & before.keys()) > 1]
    if part is None and len(like) != 1:
        told = named(like) if like else "no file that is given"
        raise ValueError(
            f"{minus} has the tensors of {told}: say which, as transformer={minus.name}"
        )
    part = part or like[0]
    own, path = headers[part], chosen[part]
    plain = {key for key in own if not TRAINED.fullmatch(key)}
    if path.suffix != WEIGHTS[0] or any(own[key].dtype.itemsize < 2 for key in plain):
        raise ValueError(f"{path} is quantised: give its weights as .safetensors of full size")
    for file, held in ((plus, after), (minus, before)):
        theirs = {key for key in held if not TRAINED.fullmatch(key)}
        if wrong := sorted(plain ^ theirs):
            raise ValueError(
                f"{file} and {path} are not of one model: {len(wrong)} tensors are in one of them "
                f"alone, such as {named(wrong, 2)}"
            )
        # A convolution over patches may be a linear layer in one of them.
        sizes = ((key, held[key], own[key]) for key in sorted(plain))
        wrong = [k for k, x, y in sizes if (x.shape[:1], x.numel()) != (y.shape[:1], y.numel())]
        if wrong:
            raise ValueError(
                f"{file} and {path} are not of one size: {wrong[0]} is "
                f"{tuple(held[wrong[0]].shape)} and {tuple(own[wrong[0]].shape)}"
            )
    return part


def _write_sum(folder: Path, path: Path, difference: Difference) -> None:
    """Put path + (plus - minus) in the place of the link to `path`: summed in fp32, tensor by
    tensor, rounded once to the dtype there. Parameters of a method come from `plus`."""
    found = {}
    with ExitStack() as stack:
        own, plus, minus = (
            _Opened(stack.enter_context(safe_open(file, "pt")))
            for file in (path, difference.plus, difference.minus)
        )
        for key in own.names:
            if TRAINED.fullmatch(key):
                continue
            x = own.tensor(key)
            more = plus.tensor(key).float() - minus.tensor(key).float().view_as(plus.tensor(key))
            found[key] = (x.float() + more.view_as(x)).to(x.dtype)
        of_method = plus if any(map(TRAINED.fullmatch, plus.names)) else own
        found |= {key: of_method.tensor(key) for key in of_method.names if TRAINED.fullmatch(key)}
    check_finite(found, f"the sum of {path} and {difference.plus} less {difference.minus}")
    place = folder / NAMES[0]
    place.unlink()
    save_tensors(found, place, {"format": "pt"})


class _Opened:
    """A file of safetensors that is open, by its names without "net."."""

    def __init__(self, file: Any) -> None:
        keys = [*file.keys()]
        self.names = dict(zip(plain_names(dict.fromkeys(keys, EMPTY)), keys, strict=True))
        self._file = file

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(self.names[name])


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
