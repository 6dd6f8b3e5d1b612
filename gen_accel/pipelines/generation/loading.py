"""Loading of a pipeline from a folder or the hub, onto its device."""

import inspect
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gen_accel import registry
from gen_accel.attention_processors.attached.clock import TRANSFORMERS
from gen_accel.attention_processors.families.pipelines import choose, choose_in, part_of
from gen_accel.hub import fetched
from gen_accel.io import named, read_fields
from gen_accel.pipelines.generation.config import ConditioningFiles
from gen_accel.pipelines.generation.config import Loading as Loading
from gen_accel.pipelines.generation.decode import check_streamed
from gen_accel.pipelines.generation.inputs import OpenedFiles, identity
from gen_accel.pipelines.generation.kept import HOST, PipelineCache
from gen_accel.pipelines.generation.loras import add_loras, lora_source
from gen_accel.pipelines.generation.model_index import (
    Index,
    classes_in,
    index_of,
    location_of,
    one_line,
    part_class,
    pipeline_class,
)
from gen_accel.pipelines.generation.sampling import frames_argument, parameters, served_family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DTYPES = {name: getattr(torch, name) for name in registry.DTYPES}


def load(
    model: str | Path,
    loading: Loading | None = None,
    given: ConditioningFiles | OpenedFiles | None = None,
    *,
    parts: Mapping[str, nn.Module | None] | None = None,
    cache: PipelineCache | None = None,
) -> "DiffusionPipeline":
    """Load the pipeline onto its device, with its LoRAs.

    Args:
        parts: models that are loaded already, or None for those to do without, by name.
        cache: keeps the weights for the next call, and may have them from the last.
        given: what the video is made from besides text, which decides the class of the pipeline
            if the weights serve several. None: the class that the folder names.

    Raises:
        ValueError: a model that `index_of` refuses, a missing device, a LoRA that does not fit or
            fits only in part, or integer weights of the transformer.
        OSError: a missing file or repository.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    loading = loading or Loading()
    device, dtype = _placement(loading)
    index, source = index_of(model), location_of(model)
    loras = [lora_source(text) for text in loading.loras]
    _check_floats(Path(source))
    name = index["_class_name"] if given is None else _chosen(index, source, given)
    # With parts, the base class would load again what a pipeline can do without.
    own = name == index["_class_name"] and not parts
    kind = DiffusionPipeline if own else pipeline_class(name)

    def loaded() -> DiffusionPipeline:
        with warnings.catch_warnings(), one_line(model):
            # Newer diffusers call it `dtype`; older ones ignore that.
            warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
            pipe = kind.from_pretrained(source, torch_dtype=dtype, **(parts or {}))
        _check_complete(pipe, model)
        return pipe

    if cache is None or parts:
        pipe = loaded()
    else:
        pipe = cache.taken((name, dtype, source, _state_of(source)), loaded)
    _take_factors(pipe)
    pipe.set_progress_bar_config(disable=True)
    if given is None and frames_argument(pipe) not in parameters(pipe):
        raise ValueError(
            f"{type(pipe).__name__} makes no video from a prompt alone: it takes no num_frames"
        )
    if served_family(pipe).generation.tiled:
        pipe.vae.enable_tiling()
    add_loras(pipe, loras)
    _place(pipe, loading.offload, device)
    return pipe


def load_decoder(model: str | Path, loading: Loading | None = None) -> "DiffusionPipeline":
    """Load the pipeline with its autoencoder only, for `decode_stream`.

    Raises:
        ValueError: a model that `index_of` refuses, a missing device, LoRAs, which do not change
            the decoding, or a pipeline that decodes in its own way.
        OSError: a missing file or repository.
    """
    loading = loading or Loading()
    if loading.loras:
        raise ValueError(f"a LoRA does not change how latents are decoded, got {loading.loras}")
    device, dtype = _placement(loading)
    index = index_of(model)
    kind = pipeline_class(index["_class_name"])
    decoder = part_class(index.get("vae") or (None, None), "vae")
    check_streamed(*classes_in(index, model))
    with warnings.catch_warnings(), one_line(model):
        warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
        vae = decoder.from_pretrained(location_of(model), subfolder="vae", torch_dtype=dtype)
    known = inspect.signature(kind.__init__).parameters
    parts = [name for name, one in known.items() if one.default is one.empty and name != "self"]
    pipe = kind(**(dict.fromkeys(parts) | {"vae": vae}))
    _place(pipe, loading.offload, device)
    return pipe


def find_device(name: str) -> torch.device:
    """Return the device of that name, or the best one for "auto".

    Raises ValueError for a device that this machine or this torch does not have.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return found or HOST
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {name!r}") from None
    if device.type == "cpu":
        return device
    have = "only the CPU" if found is None else f"the CPU and {found.type}"
    if found is None or device.type != found.type:
        raise ValueError(f"device {name!r} is not there: torch {torch.__version__} finds {have}")
    if (device.index or 0) >= torch.accelerator.device_count():
        count = torch.accelerator.device_count()
        raise ValueError(f"device {name!r} is not there: {count} of {found.type}, from 0")
    return device


def _placement(loading: Loading) -> tuple[torch.device, torch.dtype]:
    device = find_device(loading.device)
    if loading.offload != "none" and device.type == "cpu":
        raise ValueError(
            f"offload {loading.offload!r} needs a GPU to load onto; the device is the CPU"
        )
    if loading.dtype == "auto":
        return device, torch.float32 if device.type == "cpu" else torch.bfloat16
    return device, DTYPES[loading.dtype]


def _chosen(index: Index, source: str, given: ConditioningFiles | OpenedFiles) -> str:
    """Name the pipeline class that makes a video from what is given, see `families.pipelines`."""
    asked, strength = given.kinds, given.strength is not None
    if Path(source).exists():
        return choose_in(Path(source), asked, strength=strength)
    config = {}
    with suppress(OSError):  # if the classes tell enough
        config = read_fields(fetched(source, f"{part_of(index)}/config.json"))
    return choose(index, config, asked, source, strength=strength)


def _check_floats(folder: Path) -> None:
    """Refuse integer weights of a transformer, which diffusers would cast."""
    for file in (one for part in TRANSFORMERS for one in folder.glob(f"{part}/*.safetensors")):
        config = file.with_name("config.json")
        if config.is_file() and "quantization_config" in config.read_text(encoding="utf-8"):
            continue
        try:
            with safe_open(file, framework="pt") as held:
                kinds = {key: held.get_slice(key).get_dtype() for key in held.keys()}  # noqa: SIM118
        except SafetensorError:
            continue  # diffusers reports the fault
        wrong = [key for key in kinds if key.endswith((".weight", ".bias"))]
        wrong = [key for key in wrong if kinds[key].startswith(("I", "U", "BOOL"))]
        if wrong:
            raise ValueError(f"{file} holds weights of {kinds[wrong[0]]}: {named(wrong)}")


def _check_complete(pipe: "DiffusionPipeline", model: str | Path) -> None:
    """Refuse a model whose files lack weights: such weights stay on the meta device."""
    for name, part in pipe.components.items():
        parameters = part.named_parameters() if isinstance(part, nn.Module) else ()
        lacking = [key for key, value in parameters if value.is_meta]
        if lacking:
            raise ValueError(
                f"{name} of {model} lacks {len(lacking)} of its weights, such as {lacking[0]}: "
                "its files are not whole, fetch or save them again"
            )


def _take_factors(pipe: "DiffusionPipeline") -> None:
    """Let the autoencoder's config say how it scales: some classes of diffusers count its stages,
    which is wrong for one that takes pixels in patches."""
    config: Mapping[str, Any] = getattr(getattr(pipe, "vae", None), "config", {})
    for axis in ("spatial", "temporal"):
        name, factor = f"vae_scale_factor_{axis}", config.get(f"scale_factor_{axis}")
        if factor is not None and getattr(pipe, name, factor) != factor:
            setattr(pipe, name, factor)
            if axis == "spatial":
                pipe.video_processor.register_to_config(vae_scale_factor=factor)


def _place(pipe: "DiffusionPipeline", offload: str, device: torch.device) -> None:
    match offload:
        case "none":
            pipe.to(device)
        case "model":
            pipe.enable_model_cpu_offload(device=device)
        case "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        case "group":
            pipe.enable_group_offload(
                onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda"
            )


def _state_of(source: str) -> str | Path | object:
    """Return what tells whether a model's files are still those that were loaded."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).exists():
        return identity(source)
    return try_to_load_from_cache(source, "model_index.json")  # a snapshot's name is a commit
