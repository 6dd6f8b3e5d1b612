"""Attached methods on disk: the method as JSON, its parameters as safetensors."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from gen_accel.attention_processors import method_name
from gen_accel.attention_processors.attached.attachment import (
    Attachment,
    attach_method,
    attachment_of,
)
from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.attached.layer import is_offloaded
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.methods.registry import (
    method_of_file,
    saved_options,
    with_tuples,
)
from gen_accel.io import (
    check_finite,
    file_sha256,
    flush,
    read_fields,
    replacing,
    save_tensors,
    typed,
    write_json,
)
from gen_accel.parsing import check_names, shown

CONFIG, WEIGHTS = "processors.json", "processors.safetensors"
NEXT = "processors.next.safetensors"  # parameters that the JSON does not name yet
VERSION = 1


def save_processors(
    pipe_or_handle: Any,
    folder: str | Path,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write the attached method, its schedule, and the parameters of its layers.

    `processors.json` names the method with its options, and the hash of `processors.safetensors`,
    which holds the parameters. The parameters are first written under a temporary name, and
    renamed once the JSON names them. A run that is killed at any point leaves the earlier pair or
    this one, and `load_processors` finds it.

    Args:
        pipe_or_handle: a pipeline or transformer with a method attached, or the handle.
        tensors: parameters of each layer to write instead of the current ones, such as an average,
            or tensors gathered from shards.

    Returns:
        The folder.

    Raises:
        ValueError: nothing is attached, a method that has no name, options that JSON cannot
            hold, or parameters that are not finite.
        OSError: the folder cannot be written.
    """
    handle = pipe_or_handle
    if not isinstance(handle, Attachment):
        handle = attachment_of(pipe_or_handle)
    name, method_options = method_name(handle.method), saved_options(handle.method)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = _parameters(handle) if tensors is None else _by_name(tensors)
    check_finite(held, f"what is attached, for {folder},")
    _settle(folder)  # a save that was killed
    with replacing(folder / NEXT) as partial:
        save_tensors({name: x.cpu() for name, x in held.items()}, partial)
        flush(partial)
        digest = file_sha256(partial)
    config = {
        "version": VERSION,
        "method": name,
        "options": method_options,
        "schedule": asdict(handle.schedule),
        "kernel": handle.kernel,
        "dense_kernel": handle.dense_kernel,
        "sha256": digest,
    }
    try:
        write_json(folder / CONFIG, config)
    finally:
        _settle(folder)
    return folder


def weights_of(folder: Path) -> Path:
    """Path of the parameters that the JSON of `folder` names. They may still have their temporary
    name, or be missing."""
    following = folder / NEXT
    try:
        named = read_fields(folder / CONFIG)["sha256"]
        belongs = file_sha256(following) == named
    except (OSError, ValueError, KeyError, TypeError):
        belongs = False
    return following if belongs else folder / WEIGHTS


def load_processors(
    pipe_or_transformer: Any,
    folder: str | Path,
    *,
    others: Mapping[str, Path] | None = None,
    **options: Any,
) -> Attachment:
    """Attach what `save_processors` wrote, with its parameters.

    Args:
        others: part of the pipeline, to the folder with what was saved of its transformer alone;
            `folder` then is of `transformer` alone. Their method is the same.
        options: arguments of `attach` that replace the saved ones: schedule, kernel, dense_kernel,
            timed. Dense layers have no saved parameters, so that they cannot become sparse.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files that do not belong together, an unknown method or version, or parameters
            that do not fit this model, which are named; nothing is attached then.
    """
    method, saved, tensors = _load(Path(folder))
    for part, other in (others or {}).items():
        theirs, _, held = _load(other)
        if theirs != method:
            raise ValueError(f"{other} is of {theirs!r}, {folder} of {method!r}: load one of them")
        tensors |= {f"{part}.{name.partition('.')[2]}": x for name, x in held.items()}
    saved = saved | options
    schedule = saved["schedule"] or Schedule()
    _check_fit(pipe_or_transformer, method, schedule, tensors, Path(folder) / WEIGHTS)
    handle = attach_method(pipe_or_transformer, method, **saved)
    for name, parameter in _parameters(handle).items():
        parameter.copy_(tensors[name])
    return handle


def _load(folder: Path) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """Load the method, the options of `attach`, and the parameters of a folder."""
    weights = weights_of(folder)
    for path in (folder / CONFIG, weights):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; save_processors writes it")
    method, saved, digest = _read(folder / CONFIG)
    if file_sha256(weights) != digest:
        raise ValueError(f"{CONFIG} and {WEIGHTS} in {folder} do not belong together; save again")
    return method, saved, load_file(weights)


def _settle(folder: Path) -> None:
    """Rename the parameters that the JSON names, and remove all others."""
    if weights_of(folder) == folder / NEXT:
        (folder / NEXT).replace(folder / WEIGHTS)
    (folder / NEXT).unlink(missing_ok=True)


def _read(path: Path) -> tuple[Any, dict[str, Any], str]:
    """Read the method, the options of `attach`, and the hash of the weights."""
    try:
        config = read_fields(path)
        if config["version"] != VERSION:
            raise ValueError(f"its version is {shown(config['version'])}, not {VERSION}")
        options = typed(config, "options", dict, origin=path)
        method = method_of_file(typed(config, "method", str, origin=path), options)
        scheduled = typed(config, "schedule", dict, origin=path)
        check_names(scheduled, Schedule, "its schedule")
        schedule = Schedule(**with_tuples(scheduled))
        options = {"schedule": schedule, "kernel": config["kernel"]}
        options["dense_kernel"] = config.get("dense_kernel")  # which early files do not name
        return method, options, config["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what save_processors writes: {error}") from error


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
    pipe_or_transformer: Any,
    method: Any,
    schedule: Schedule,
    tensors: dict[str, Tensor],
    path: Path,
) -> None:
    """Refuse parameters that do not fit, before anything is attached: another attachment may be
    on."""
    wanted, possible = {}, {}
    for part, transformer in served_transformers(pipe_or_transformer).items():
        for site in family_of(transformer).self_attentions(transformer):
            one = method.for_layer(site.layer)
            branch = one.branch(site.heads, site.dim)
            if branch is None:
                continue
            found = {
                f"{part}.{site.name}.{name}": tensor.shape
                for name, tensor in branch.state_dict().items()
            }
            possible |= found
            if schedule.why_layer(site.layer) is None:
                wanted |= found
    have = {name: tensor.shape for name, tensor in tensors.items()}
    # Parameters of layers that are dense now are not loaded.
    wrong = sorted(
        {name for name, _ in (wanted.items() - have.items()) | (have.items() - possible.items())}
    )
    if wrong:
        raise ValueError(
            f"{path} does not fit this model: {len(wrong)} parameters are missing, unexpected or "
            f"of another shape, such as {', '.join(wrong[:3])}"
        )
