"""Attached methods on disk: one safetensors file with the parameters, and the method in its
metadata."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from gen_accel.attention_processors import method_name
from gen_accel.attention_processors.attached.attachment import (
    Attachment,
    AttachOptions,
    attach_method,
    attachment_of,
)
from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.attached.layer import is_offloaded
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.methods.registry import method_of_file, saved_options
from gen_accel.io import (
    check_finite,
    fields_of,
    flush,
    parse_json,
    read_tensors,
    replacing,
    save_tensors,
    tensors_sha256,
    typed,
)
from gen_accel.method import Method
from gen_accel.parsing import shown

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from typing_extensions import Unpack

FILE = "processors.safetensors"
KEY, VERSION = "processors", 2


@dataclass(frozen=True)
class Saved:
    """Content of the file of `save_processors`: the method, options of `attach`, and the
    parameters by layer and name."""

    method: Method
    schedule: Schedule
    kernel: str
    dense_kernel: str | None
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: str | Path) -> "Saved":
        """Read the file of a folder.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it is no such file, or of another version, or its parameters are damaged.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; save_processors writes it")
        tensors, metadata = read_tensors(path)
        try:
            about = fields_of(parse_json(metadata.get(KEY, "null"), path), path)
            if about.get("version") != VERSION:
                version = shown(about.get("version"))
                raise ValueError(f"its version is {version}, not {VERSION}; save again")
            options = typed(about, "options", dict, origin=path)
            method = method_of_file(typed(about, "method", str, origin=path), options)
            schedule = Schedule.of_file(typed(about, "schedule", dict, origin=path))
            kernel = typed(about, "kernel", str, origin=path)
            dense_kernel = typed(about, "dense_kernel", str, type(None), origin=path)
            digest = typed(about, "sha256", str, origin=path)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not what save_processors writes: {error}") from error
        if tensors_sha256(tensors) != digest:
            raise ValueError(
                f"the parameters in {path} and their sha256 do not belong together; save again"
            )
        return cls(method, schedule, kernel, dense_kernel, tensors)


def save_processors(
    pipe_or_handle: "DiffusionPipeline | nn.Module | Attachment",
    folder: str | Path,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write the attached method, its schedule, and the parameters of its layers, in one file of
    the folder, which is returned. A run that is killed at any point leaves the earlier file or
    this one.

    Args:
        pipe_or_handle: a pipeline or transformer with a method attached, or the handle.
        tensors: parameters of each layer to write instead of the current ones, such as an average,
            or tensors gathered from shards.

    Raises:
        ValueError: nothing is attached, a method that has no name, options that JSON cannot
            hold, or parameters that are not finite.
        OSError: the folder cannot be written.
    """
    handle = pipe_or_handle
    if not isinstance(handle, Attachment):
        handle = attachment_of(handle)
    held = _parameters(handle) if tensors is None else _by_name(tensors)
    held = {name: x.cpu() for name, x in held.items()}
    about = {
        "version": VERSION,
        "method": method_name(handle.method),
        "options": saved_options(handle.method),
        "schedule": asdict(handle.schedule),
        "kernel": handle.kernel,
        "dense_kernel": handle.dense_kernel,
        "sha256": tensors_sha256(held),
    }
    folder = Path(folder)
    check_finite(held, f"what is attached, for {folder},")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE) as partial:
        save_tensors(held, partial, {KEY: json.dumps(about)})
        flush(partial)
    return folder


def load_processors(
    pipe_or_transformer: "DiffusionPipeline | nn.Module",
    folder: str | Path,
    *,
    others: Mapping[str, Path] | None = None,
    **options: "Unpack[AttachOptions]",
) -> Attachment:
    """Attach what `save_processors` wrote, with its parameters.

    Args:
        others: part of the pipeline, to the folder with what was saved of its transformer alone;
            `folder` then is of `transformer` alone. Their method is the same.
        options: arguments of `attach` that replace the saved ones: schedule, kernel, dense_kernel,
            timed. Dense layers have no saved parameters, so that they cannot become sparse.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: an unknown method or version, or parameters that are damaged or do not fit
            this model, which are named; nothing is attached then.
    """
    saved = Saved.read(folder)
    tensors = dict(saved.tensors)
    for part, other in (others or {}).items():
        also = Saved.read(other)
        if also.method != saved.method:
            raise ValueError(
                f"{other} is of {also.method!r}, {folder} of {saved.method!r}: load one of them"
            )
        tensors |= {f"{part}.{name.partition('.')[2]}": x for name, x in also.tensors.items()}
    own: AttachOptions = {
        "schedule": saved.schedule,
        "kernel": saved.kernel,
        "dense_kernel": saved.dense_kernel,
    }
    own.update(options)
    schedule = own.get("schedule") or Schedule()
    _check_fit(pipe_or_transformer, saved.method, schedule, tensors, Path(folder) / FILE)
    handle = attach_method(pipe_or_transformer, saved.method, **own)
    for name, parameter in _parameters(handle).items():
        parameter.copy_(tensors[name])
    return handle


def _parameters(handle: Attachment) -> dict[str, Tensor]:
    """Collect the parameters by layer and name. They share memory with the model."""
    for layer, branch in handle.branches.items():
        if is_offloaded(branch):
            raise ValueError(
                f"the parameters of {layer} are offloaded: load and save before the model is"
            )
    return _by_name({layer: branch.state_dict() for layer, branch in handle.branches.items()})


def _by_name(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{layer}.{name}": tensor
        for layer, tensors in layers.items()
        for name, tensor in tensors.items()
    }


def _check_fit(
    pipe_or_transformer: "DiffusionPipeline | nn.Module",
    method: Method,
    schedule: Schedule,
    tensors: Mapping[str, Tensor],
    path: Path,
) -> None:
    """Refuse parameters that do not fit, before another attachment is taken off."""
    wanted, possible = {}, {}
    for part, transformer in served_transformers(pipe_or_transformer).items():
        for site in family_of(transformer).self_attentions(transformer):
            own = method.for_layer(site.layer)
            branch = own.parameters_of(site.heads, site.dim, site.width)
            held = {} if branch is None else branch.state_dict()
            found = {f"{part}.{site.name}.{name}": x.shape for name, x in held.items()}
            possible |= found
            wanted |= found if schedule.why_layer(site.layer) is None else {}
    have = {name: tensor.shape for name, tensor in tensors.items()}
    # Parameters of layers that are dense now are not loaded.
    differing = (wanted.items() - have.items()) | (have.items() - possible.items())
    wrong = sorted({name for name, _ in differing})
    if wrong:
        raise ValueError(
            f"{path} does not fit this model: {len(wrong)} parameters are missing, unexpected or "
            f"of another shape, such as {', '.join(wrong[:3])}"
        )
