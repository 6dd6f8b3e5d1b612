"""Encoders of clips and captions: a pipeline's models, loaded without its transformer."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from gen_accel.attention_processors.attached.clock import TRANSFORMERS
from gen_accel.attention_processors.families import Given, classes_for, family_of
from gen_accel.io import read_fields, write_json
from gen_accel.parsing import shown
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.loading import DTYPES, find_device
from gen_accel.pipelines.generation.model_index import (
    check_model,
    index_of,
    load_part,
    options_in,
    part_class,
    parts_in,
    pipeline_class,
    places_of,
)
from gen_accel.pipelines.generation.of_blocks import is_of_blocks
from gen_accel.pipelines.generation.quantising import hollow_of
from gen_accel.registry import needed_for
from gen_accel.video import Coding, vae_factor

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from gen_accel.attention_processors.families.base import Family

RECORD = "encoders.json"
PREFIX = "text_encoder"
# Fields of a configuration to leave out; the weights state their own dtype.
PASSING = ("transformers_version", "dtype", "torch_dtype")


class TextEncoders:
    """Text encoders that a pipeline was loaded without.

    Their hashes are recorded beside the cache, so that they are loaded for new texts alone.

    Args:
        pipe: pipeline that gets them.
        places: where the parts of the pipeline lie, see `places_of`.
        kinds: library and class of each, by its name in the pipeline.
        folder: folder of the cache.
    """

    def __init__(
        self,
        pipe: "DiffusionPipeline",
        places: Mapping[str, tuple[str, str]],
        kinds: Mapping[str, Sequence[str]],
        dtype: torch.dtype,
        folder: Path,
    ) -> None:
        self._pipe, self._places, self._kinds = pipe, places, kinds
        self._dtype, self._file = dtype, folder / RECORD

    def load(self) -> None:
        for name, kind in self._kinds.items():
            if getattr(self._pipe, name) is None:
                setattr(self._pipe, name, load_part(*self._places[name], kind, self._dtype))

    def states(self) -> dict[str, str]:
        """Hash each encoder, as `model_state` does, or read its hash from the record."""
        known: dict[str, object] = {}
        with suppress(OSError, ValueError):  # missing, or no JSON of ours
            known = read_fields(self._file)
        stamps = {name: self._stamp(name) for name in self._kinds}
        found = {}
        for name, stamp in stamps.items():
            match known.get(name):
                case {"files": str(files), "state": str(state)} if files == stamp:
                    found[name] = state
        if found.keys() == stamps.keys():
            return found
        self.load()
        states = {name: model_state(name, getattr(self._pipe, name)) for name in self._kinds}
        new = {n: {"files": self._stamp(n), "state": state} for n, state in states.items()}
        if os.access(self._file.parent, os.W_OK):
            write_json(self._file, known | new)
        return states

    def _stamp(self, name: str) -> str | None:
        """Hash names, sizes and dates of an encoder's files; None if they are not here."""
        source, place = self._places[name]
        folder = Path(source) / place
        if not Path(source).exists():
            from huggingface_hub import try_to_load_from_cache

            config = try_to_load_from_cache(source, f"{place}/config.json")
            if not isinstance(config, str):
                return None
            folder = Path(config).parent
        files = []
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                about = path.stat()
                files.append([path.name, path.resolve().name, about.st_size, about.st_mtime_ns])
        return hash_of([list(self._kinds[name]), str(self._dtype), files])


class Encoders(NamedTuple):
    """A pipeline without its transformer's weights.

    Args:
        transformer: source of the configuration; its weights are not used.
        device: device to encode on.
        texts: text encoders of a pipeline that was loaded without them.
    """

    pipe: "DiffusionPipeline"
    transformer: "ModelMixin"
    device: torch.device
    texts: TextEncoders | None = None

    @property
    def family(self) -> "Family":
        return family_of(self.transformer)

    def states(self, *prefixes: str) -> list[list[str]]:
        """Hash each component whose name begins with one of `prefixes`."""
        known = self.texts.states() if self.texts is not None and PREFIX in prefixes else {}
        parts = {**dict.fromkeys(known), **_components(self.pipe, *prefixes)}
        for prefix in prefixes:
            if not any(name.startswith(prefix) for name in parts):
                raise ValueError(f"{type(self.pipe).__name__} was loaded without its {prefix}")
        return [
            [name, known.get(name) or _state(name, part)] for name, part in sorted(parts.items())
        ]

    @contextmanager
    def at_work(self, *prefixes: str) -> Iterator[None]:
        """Move models whose names begin with one of `prefixes` to the device, and back at the
        end."""
        if self.texts is not None and PREFIX in prefixes:
            self.texts.load()
        parts = _components(self.pipe, *prefixes).values()
        models = [model for model in parts if isinstance(model, nn.Module)]
        with on_device(models, self.device):
            yield


def load_encoders(
    model_or_pipe: "str | Path | Encoders | DiffusionPipeline", device: str, dtype: str
) -> Encoders:
    """Take the encoders of a pipeline, or load them from a folder or hub repository. `Encoders`
    are taken as they are.

    The transformer of a folder or repository is not loaded.

    Args:
        device: device to encode on.
        dtype: "auto" is float32 for the autoencoders and, on a GPU, bfloat16 for the others.

    Raises:
        ValueError: a model that `check_model` or `check_index` refuses, a class that no family
            trains, or a dtype together with a pipeline.
    """
    if isinstance(model_or_pipe, Encoders):
        return model_or_pipe
    if not isinstance(model_or_pipe, str | Path):
        pipe = model_or_pipe
        if dtype != "auto":
            raise ValueError(f"dtype is for models to load, got {shown(dtype)} with a pipeline")
        found = [getattr(pipe, name, None) for name in TRANSFORMERS[:2]]
        transformer = next((model for model in found if model is not None), None)
        if transformer is None:
            raise ValueError(f"{type(pipe).__name__} has no transformer, which names its family")
        return Encoders(pipe, transformer, find_device(device))
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {shown(dtype)}")
    check_model(model_or_pipe)
    target = find_device(device)
    folder = expanded(model_or_pipe)
    source = str(folder if folder.exists() else model_or_pipe)
    index: Any = index_of(model_or_pipe)
    made = pipeline_class(index["_class_name"])
    if not folder.exists() and not is_of_blocks(made):
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        source = str(DiffusionPipeline.download(source))
    # `from_pretrained` with transformer=None would load an optional transformer nevertheless.
    found, places = parts_in(index, source), places_of(index, source)
    stages = [name for name in index if name.startswith("transformer")]
    own = DTYPES.get(dtype, torch.float32)
    texts = DTYPES.get(dtype, torch.float32 if target.type == "cpu" else torch.bfloat16)
    parts = {
        name: load_part(*places[name], kind, own if name.endswith("vae") else texts)
        for name, kind in found.items()
        if name not in stages
    }
    options = options_in(index)
    if is_of_blocks(made):
        pipe = made.of_parts(options, parts)
    else:
        pipe = made(**parts, **dict.fromkeys(stages), **options)
    pipe.set_progress_bar_config(disable=True)
    part = next(name for name in (*TRANSFORMERS, *stages) if name in found)
    kind = part_class(found[part], part)
    served = classes_for("training")
    if kind.__name__ not in served:
        raise ValueError(f"no training for {kind.__name__}; served: {', '.join(served)}")
    with needed_for("encoding clips", extra="train"):
        transformer = hollow_of(kind, *places[part])
    return Encoders(pipe, transformer, target)


@contextmanager
def on_device(models: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Keep models on a device inside the context, and move each back at the end."""
    homes = [next(model.parameters()).device for model in models]
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model, home in zip(models, homes, strict=True):
            model.to(home)


def factors_of(pipe: "DiffusionPipeline", family: "Family") -> tuple[Coding, int]:
    """Return how frames are coded to latents, and how many pixels a side are in one.

    Raises ValueError for a pipeline that does not say.
    """
    time, space = vae_factor(pipe, "temporal"), vae_factor(pipe, "spatial")
    if (time is None and family.sizes.chunks is None) or space is None:
        raise ValueError(f"{type(pipe).__name__} does not say how much is in a latent")
    return family.sizes.coding(time), space


def check_trained(family: "Family", pipeline: str | None, config: Given) -> None:
    """Raise ValueError for a model that cannot be trained, with the family's reason.

    Args:
        pipeline: class of its pipeline; None if unknown.
        config: of its transformer.
    """
    why = family.no_training(pipeline, config)
    if why is not None:
        raise ValueError(f"no training for {pipeline or family.models}: {why}")


def _components(pipe: "DiffusionPipeline", *prefixes: str) -> dict[str, object]:
    found = {name: part for name, part in pipe.components.items() if name.startswith(prefixes)}
    return {name: part for name, part in sorted(found.items()) if part is not None}


def hash_of(value: object) -> str:
    """Hash a value that is fit for JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def model_state(name: str, model: nn.Module) -> str:
    """Hash a model's class, configuration and weights."""
    hooked = any(hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for m in model.modules())
    if hooked or any(x.is_meta for x in model.parameters()):
        raise ValueError(f"the {name} is offloaded: give the pipeline before that, or its folder")
    config: Any = model.config
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    lasting = {k: v for k, v in config.items() if not k.startswith("_") and k not in PASSING}
    tiled = getattr(model, "use_tiling", False)
    digest = hashlib.sha256(hash_of([type(model).__name__, lasting, tiled]).encode())
    for key, x in sorted(model.state_dict().items()):
        digest.update(f"{key} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _state(name: str, part: Any) -> str:
    """Hash a model; or how a tokenizer, also of a processor of text and pictures, splits text,
    without the padding of its last call."""
    if isinstance(part, nn.Module):
        return model_state(name, part)
    tokenizer = getattr(part, "tokenizer", part)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return hash_of(
            [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.all_special_tokens]
        )
    rules = json.loads(backend.to_str())
    return hash_of({k: v for k, v in rules.items() if k not in ("padding", "truncation")})
