"""Loading of a pipeline from a folder or the hub, with LoRAs, dtype, device and offloading."""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gen_accel import registry
from gen_accel.attention_processors.attached.clock import TRANSFORMERS
from gen_accel.attention_processors.families import served_classes, video_classes
from gen_accel.attention_processors.families.pipelines import choose, choose_in, part_of, takes
from gen_accel.hub import check_pipeline, check_there, fetched, parted, reachable, silenced
from gen_accel.io import named, read_fields
from gen_accel.paths import expanded, model_named
from gen_accel.pipelines.generation.config import ConditioningFiles
from gen_accel.pipelines.generation.config import Loading as Loading
from gen_accel.pipelines.generation.decode import (
    check_streamed,
)
from gen_accel.pipelines.generation.inputs import OpenedFiles, check_length
from gen_accel.pipelines.generation.lora_fit import (
    check_lora,
    loads_alone,
    lora_file,
    parts_of_lora,
)
from gen_accel.pipelines.generation.model_index import check_index, part_class, pipeline_class
from gen_accel.pipelines.generation.pipeline_cache import PipelineCache, state_of
from gen_accel.pipelines.generation.sampling import frames_argument, parameters, served_family
from gen_accel.registry import needed_for

DTYPES = {name: getattr(torch, name) for name in registry.DTYPES}
MOST_SAID = 400  # most characters of a library's error


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
    index = folder / "model_index.json"
    kind, _ = _classes(read_fields(index), index)
    if kind is not None and kind not in served_classes():
        raise ValueError(f"no family serves {kind} of {model}; see `gen-accel models`")
    if kind is not None and kind not in video_classes():
        raise ValueError(f"{kind} of {model} makes images and no video; attach to it in Python")


def check_length_of(model: str | Path, files: OpenedFiles | None, frames: int | None) -> None:
    """Refuse what a model in a folder makes no video from, a video with fewer frames than are
    asked for, or with too many to go on from; a model on the hub is left to `load`.

    Args:
        files: a result of `open_files`; None for text alone.
    """
    folder = folder_of(model)
    if not (folder / "model_index.json").is_file():
        return
    asked = () if files is None else files.kinds
    row = takes(choose_in(folder, asked, strength=bool(files and files.strength is not None)))
    if row is not None and files is not None:
        check_length(row, files, frames)


def check_latents_of(model: str | Path) -> None:
    """Refuse a pipeline whose latents cannot be kept, see `is_streamed`.

    Reads the pipeline's index, from the hub if necessary.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    source = _location(model)
    with _one_line(model):
        index = DiffusionPipeline.load_config(source)
    check_streamed(*_classes(index, model))


def load(
    model: str | Path,
    loading: Loading | None = None,
    given: ConditioningFiles | OpenedFiles | None = None,
    *,
    parts: Mapping[str, Any] | None = None,
    cache: PipelineCache | None = None,
) -> Any:
    """Load the pipeline onto its device, with its LoRAs.

    Args:
        parts: models that are loaded already, or None for those to do without, by name.
        cache: keeps the weights for the next call, and may have them from the last.
        given: what the video is made from besides text, which decides the class of the pipeline
            where the weights serve several. None: the class that the folder names.

    Raises:
        ValueError: a model that `check_model` or `check_index` refuses, a missing device, a LoRA
            that does not fit or fits only in part, or integer weights of the transformer.
        OSError: a missing file or repository.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    loading = loading or Loading()
    source, device, dtype = _source(model, loading)
    loras = [_lora(text) for text in loading.loras]
    _check_floats(Path(source))
    with _one_line(model):
        index: Any = DiffusionPipeline.load_config(source)
    check_index(index, source)
    name = index["_class_name"] if given is None else _chosen(index, source, given)
    kind: Any = DiffusionPipeline if name == index["_class_name"] else pipeline_class(name)
    if parts:  # of which the base class would load again what a pipeline can do without
        kind = pipeline_class(name)

    def loaded() -> Any:
        with warnings.catch_warnings(), _one_line(model):
            # Newer diffusers call it `dtype`; older ones ignore that.
            warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
            pipe = kind.from_pretrained(source, torch_dtype=dtype, **(parts or {}))
        _check_complete(pipe, model)
        return pipe

    if cache is None or parts:
        pipe = loaded()
    else:
        pipe = cache.taken((name, dtype, *_files(source)), loaded)
    _take_factors(pipe)
    pipe.set_progress_bar_config(disable=True)
    if given is None and frames_argument(pipe) not in parameters(pipe):
        kind = type(pipe).__name__
        raise ValueError(f"{kind} makes no video from a prompt alone: it takes no num_frames")
    if served_family(pipe).generation.tiled:
        pipe.vae.enable_tiling()
    _add_loras(pipe, loras)
    _place(pipe, loading.offload, device)
    return pipe


def index_of(model: str | Path) -> dict[str, Any]:
    """Read the index of a pipeline, checked as `load` checks it; raises as `load` does."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    check_model(model)
    source = _location(model)
    with _one_line(model):
        index: Any = DiffusionPipeline.load_config(source)
    check_index(index, source)
    return index


def _take_factors(pipe: Any) -> None:
    """Let the autoencoder's config say how it scales: some classes of diffusers count its stages,
    which is wrong where it takes pixels in patches."""
    config = getattr(getattr(pipe, "vae", None), "config", {})
    for axis in ("spatial", "temporal"):
        name, factor = f"vae_scale_factor_{axis}", config.get(f"scale_factor_{axis}")
        if factor is not None and getattr(pipe, name, factor) != factor:
            setattr(pipe, name, factor)
            if axis == "spatial":
                pipe.video_processor.register_to_config(vae_scale_factor=factor)


def load_decoder(model: str | Path, loading: Loading | None = None) -> Any:
    """Load the pipeline with its autoencoder only, for `decode_stream`.

    Raises:
        ValueError: a model that `check_model` or `check_index` refuses, a missing device, LoRAs,
            which do not change the decoding, or a pipeline that decodes in its own way.
        OSError: a missing file or repository.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    loading = loading or Loading()
    if loading.loras:
        raise ValueError(f"a LoRA does not change how latents are decoded, got {loading.loras}")
    source, device, dtype = _source(model, loading)
    with _one_line(model):
        index: Any = DiffusionPipeline.load_config(source)
    check_index(index, source)
    kind: Any = pipeline_class(index.get("_class_name"))
    decoder: Any = part_class(index.get("vae") or (None, None), "vae")
    check_streamed(*_classes(index, model))
    with warnings.catch_warnings(), _one_line(model):
        warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
        vae = decoder.from_pretrained(source, subfolder="vae", torch_dtype=dtype)
    parts = {
        part: None
        for part, parameter in inspect.signature(kind.__init__).parameters.items()
        if parameter.default is parameter.empty and part != "self"
    }
    pipe = kind(**(parts | {"vae": vae}))
    _place(pipe, loading.offload, device)
    return pipe


def find_device(name: str) -> torch.device:
    """Return the device of that name, or the best one for "auto".

    Raises ValueError for a device that this machine or this torch does not have.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return found or torch.device("cpu")
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


def folder_of(model: str | Path) -> Path:
    """Path of a pipeline's folder, whether or not it exists."""
    return expanded(model_named(model))


def _chosen(index: Any, source: str | Path, given: ConditioningFiles | OpenedFiles) -> str:
    """Name the pipeline class that makes a video from what is given, see `families.pipelines`."""
    asked, strength = given.kinds, given.strength is not None
    if Path(source).exists():
        return choose_in(Path(source), asked, strength=strength)
    config = {}
    with suppress(OSError):  # where the classes tell enough
        config = read_fields(fetched(str(source), f"{part_of(index)}/config.json"))
    return choose(index, config, asked, source, strength=strength)


def _classes(index: Any, origin: Any) -> tuple[str | None, str | None]:
    """Return the class names of the first transformer and the autoencoder in a pipeline's index.

    Args:
        origin: name of the index, for messages.
    """
    found = [_class_in(index, name, origin) for name in TRANSFORMERS]
    first = next((kind for kind in found if kind is not None), None)
    return first, _class_in(index, "vae", origin)


def _class_in(index: Any, name: str, origin: Any) -> str | None:
    pair = index.get(name)
    if pair is None:
        return None
    whole = isinstance(pair, list | tuple) and len(pair) == 2
    if not whole or not isinstance(pair[1], str | None):
        raise ValueError(f"{name} in {origin} must be a library and a class, got {pair!r}")
    return pair[1]


@contextmanager
def _one_line(source: Any) -> Iterator[None]:
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


def _check_complete(pipe: Any, model: str | Path) -> None:
    """Refuse a model whose files lack weights: such weights stay on the meta device."""
    for name, part in pipe.components.items():
        parameters = part.named_parameters() if isinstance(part, nn.Module) else ()
        lacking = [key for key, value in parameters if value.is_meta]
        if lacking:
            raise ValueError(
                f"{name} of {model} lacks {len(lacking)} of its weights, such as {lacking[0]}: "
                "its files are not whole, fetch or save them again"
            )


def _files(source: str) -> tuple[Any, ...]:
    """Return what tells whether a model's files are still those that were loaded."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(source)
    if not folder.exists():  # of the hub, where `_location` looked: a snapshot's name is a commit
        return source, try_to_load_from_cache(source, "model_index.json")
    return folder.resolve(), state_of(folder)


def _location(model: str | Path) -> str:
    """Return the model's location for `from_pretrained`. Raises OSError if it is out of reach."""
    folder = folder_of(model)
    if folder.exists():
        return str(folder)
    fetched(str(model), "model_index.json")
    return str(model)


def _source(model: str | Path, loading: Loading) -> tuple[str, torch.device, torch.dtype]:
    """Return location, device and dtype, checked before anything is loaded."""
    check_model(model)
    device = find_device(loading.device)
    if loading.offload != "none" and device.type == "cpu":
        raise ValueError(
            f"offload {loading.offload!r} needs a GPU to load onto; the device is the CPU"
        )
    if loading.dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    else:
        dtype = DTYPES[loading.dtype]
    return _location(model), device, dtype


def _place(pipe: Any, offload: str, device: torch.device) -> None:
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


def _lora(text: str) -> tuple[str, float]:
    """Parse "folder:0.5" to the folder and 0.5."""
    source, weight = parted(text)
    check_there(source, "LoRA")
    path = expanded(source)
    return (str(path) if path.exists() else reachable(source)), weight


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


def _add_loras(pipe: Any, loras: Sequence[tuple[str, float]]) -> None:
    if loras:
        with needed_for("a LoRA", extra="video"):
            import peft  # noqa: F401
    adapters: list[str] = []
    alone: Any = loads_alone(pipe)
    for i, (source, _) in enumerate(loras):
        name = f"lora_{i}"
        parts = parts_of_lora(source)
        for part, path in parts.items():
            check_lora(pipe, path, part)
        adapters.append(name)
        if alone is not None:
            file = lora_file(source)  # with its alpha in its metadata
            options = {"weight_name": file.name, "local_files_only": True}
            with _one_line(source):
                alone.load_lora_adapter(
                    str(file.parent), prefix="transformer", adapter_name=name, **options
                )
            continue
        for part, path in parts.items():
            second = {"load_into_transformer_2": True} if part == registry.EXPERTS[1] else {}
            with _one_line(source):
                pipe.load_lora_weights(path, adapter_name=name, **second)
        if not any(name in loaded for loaded in pipe.get_list_adapters().values()):
            raise ValueError(f"{source} holds no LoRA for {type(pipe).__name__}")
    if adapters:
        (pipe if alone is None else alone).set_adapters(adapters, [weight for _, weight in loras])
