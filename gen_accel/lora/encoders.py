"""Encoders of clips and captions: a pipeline's models, loaded without its transformer."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gen_accel.attention_processors.attached.transformers import TRANSFORMERS
from gen_accel.attention_processors.families import classes_for, family_of
from gen_accel.attention_processors.lengths import vae_factor
from gen_accel.extras import needed_for
from gen_accel.hub import fetched
from gen_accel.lora.fingerprint import model_state, words_state
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.loading import DTYPES, check_model, find_device
from gen_accel.pipelines.generation.model_index import check_index, part_class, pipeline_class


class Encoders(NamedTuple):
    """A pipeline without its transformer's weights.

    Args:
        transformer: source of the configuration; its weights are not used.
        device: device to encode on.
    """

    pipe: Any
    transformer: Any
    device: torch.device

    @property
    def family(self) -> Any:
        return family_of(self.transformer)

    def states(self, *prefixes: str) -> list[Any]:
        """Hash each component whose name begins with one of `prefixes`."""
        parts = _components(self.pipe, *prefixes)
        for prefix in prefixes:
            if not any(name.startswith(prefix) for name in parts):
                raise ValueError(f"{type(self.pipe).__name__} was loaded without its {prefix}")
        return [
            [name, model_state(name, part) if isinstance(part, nn.Module) else words_state(part)]
            for name, part in parts.items()
        ]

    @contextmanager
    def at_work(self, *prefixes: str) -> Iterator[None]:
        """Move models whose names begin with one of `prefixes` to the device, and back at the
        end."""
        parts = _components(self.pipe, *prefixes).values()
        models = [model for model in parts if isinstance(model, nn.Module)]
        homes = [next(model.parameters()).device for model in models]
        try:
            for model in models:
                model.to(self.device)
            yield
        finally:
            for model, home in zip(models, homes, strict=True):
                model.to(home)


def load_encoders(model_or_pipe: Any, device: str, dtype: str) -> Encoders:
    """Take the encoders of a pipeline, or load them from a folder or hub repository.

    The transformer of a folder or repository is not loaded.

    Args:
        device: device to encode on.
        dtype: "auto" is float32 for the autoencoder and, on a GPU, bfloat16 for the others.

    Raises:
        ValueError: a model that `check_model` or `check_index` refuses, a class that no family
            trains, or a dtype together with a pipeline.
    """
    if not isinstance(model_or_pipe, str | Path):
        pipe = model_or_pipe
        if dtype != "auto":
            raise ValueError(f"dtype is for models to load, got {dtype!r} with a pipeline")
        found = [getattr(pipe, name, None) for name in TRANSFORMERS[:2]]
        transformer = next((model for model in found if model is not None), None)
        if transformer is None:
            raise ValueError(f"{type(pipe).__name__} has no transformer, which names its family")
        return Encoders(pipe, transformer, find_device(device))
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    check_model(model_or_pipe)
    target = find_device(device)
    folder = expanded(model_or_pipe)
    source = str(folder if folder.exists() else model_or_pipe)
    if not folder.exists():
        fetched(source, "model_index.json")
        source = str(DiffusionPipeline.download(source))
    # `from_pretrained` with transformer=None would load an optional transformer nevertheless.
    index: Any = DiffusionPipeline.load_config(source)
    check_index(index, source)
    found = {name: value for name, value in index.items() if isinstance(value, list) and value[0]}
    stages = [name for name in index if name.startswith("transformer")]
    wanted = {"vae": DTYPES.get(dtype, torch.float32)}
    default = DTYPES.get(dtype, torch.float32 if target.type == "cpu" else torch.bfloat16)
    parts: dict[str, Any] = {
        name: _loaded(source, name, kind, wanted.get(name, default))
        for name, kind in found.items()
        if name not in stages
    }
    scalars = {k: v for k, v in index.items() if k[0] != "_" and not isinstance(v, list)}
    kind: Any = pipeline_class(index["_class_name"])
    pipe = kind(**parts, **dict.fromkeys(stages), **scalars)
    pipe.set_progress_bar_config(disable=True)
    part = next(name for name in stages if name in found)
    return Encoders(pipe, _hollow(source, part, found[part]), target)


def factors_of(pipe: Any) -> tuple[int, int]:
    """Return how many frames, and pixels a side, are in a latent of a pipeline.

    Raises ValueError for a pipeline that does not say.
    """
    time, space = vae_factor(pipe, "temporal"), vae_factor(pipe, "spatial")
    if time is None or space is None:
        raise ValueError(f"{type(pipe).__name__} does not say how much is in a latent")
    return time, space


def check_trained(family: Any, pipeline: str | None, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a model that cannot be trained, with the family's reason.

    Args:
        pipeline: class of its pipeline; None where it is not known.
        config: of its transformer.
    """
    why = None if family.no_training is None else family.no_training(pipeline, config)
    if why is not None:
        raise ValueError(f"no training for {pipeline or family.MODELS}: {why}")


def _loaded(source: str, name: str, kind: Sequence[str], dtype: torch.dtype) -> Any:
    """Load one component of the pipeline in the folder `source`."""
    found: Any = part_class(kind, name)
    is_model = issubclass(found, nn.Module)
    options = {"torch_dtype": dtype} if is_model else {}
    with warnings.catch_warnings():
        # Newer libraries call it `dtype`; older ones do not know that.
        warnings.filterwarnings("ignore", ".*torch_dtype.*")
        return found.from_pretrained(source, subfolder=name, **options)


def _hollow(source: str, name: str, kind: Sequence[str]) -> Any:
    """Build a model on the meta device, for its configuration."""
    with needed_for("encoding clips", extra="train"):
        from accelerate import init_empty_weights
    found: Any = part_class(kind, name)
    served = classes_for("training")
    if found.__name__ not in served:
        raise ValueError(f"no training for {found.__name__}; served: {', '.join(served)}")
    with init_empty_weights():
        return found.from_config(found.load_config(source, subfolder=name))


def _components(pipe: Any, *prefixes: str) -> dict[str, Any]:
    found = {name: part for name, part in pipe.components.items() if name.startswith(prefixes)}
    return {name: part for name, part in sorted(found.items()) if part is not None}
