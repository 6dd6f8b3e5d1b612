"""Models known by their config: from a name, a folder, the hub, a config or the model itself."""

import inspect
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gen_accel.attention_processors.attached.transformers import TRANSFORMERS
from gen_accel.attention_processors.families import (
    FAMILIES,
    Family,
    Preset,
    SelfAttention,
    family_named,
    served_classes,
    video_classes,
)
from gen_accel.attention_processors.families.layers import Cost, Flops
from gen_accel.attention_processors.lengths import PIXELS, nearest, patch_of
from gen_accel.hub import fetched
from gen_accel.json_files import read_fields, typed
from gen_accel.names import no_model
from gen_accel.paths import expanded
from gen_accel.video import VideoShape

NEEDED = ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "patch_size")

MOST_LAYERS = 10_000  # of a config; a thousand layers take a second to build


@dataclass(frozen=True, eq=False)
class Subject:
    """A transformer that makes videos, and the sizes of its autoencoder.

    Args:
        model: without values, on the meta device.
        temporal, spatial: frames, and pixels a side, in a latent.
        sites: the attentions over the grid.
        cost: FLOPs by its layers; None where the family counts in its own way.
        uncounted: in words, work that FLOPs leave out.
        text: tokens of a prompt; None where unknown.
    """

    name: str
    family: Family
    model: nn.Module = field(repr=False)
    temporal: int
    spatial: int
    text: int | None
    device: torch.device
    dtype: torch.dtype
    sites: list[SelfAttention] = field(repr=False)
    cost: Cost | None = field(repr=False)
    uncounted: tuple[str, ...] = ()

    @property
    def blocks(self) -> set[int]:
        """Numbers of the layers with self-attention."""
        return {site.layer for site in self.sites}

    @property
    def head_dim(self) -> int:
        return self.sites[0].dim

    @property
    def patch(self) -> tuple[int, int, int]:
        config: Any = self.model.config
        return patch_of(config)

    def flops(self, video: VideoShape) -> Flops:
        """FLOPs of one call for one clip."""
        lengths = {"text": self.text or 0}
        if self.family.flops is not None:
            return self.family.flops(self.model, video, lengths)
        assert self.cost is not None
        return self.cost(video, lengths)

    def seen(self, video: VideoShape) -> VideoShape:
        """Grid that one attention sees: a single frame where frames attend apart; with the text
        where it attends too."""
        if self.family.KIND == "frames":
            return VideoShape(1, video.height, video.width)
        return self.whole(video)

    def whole(self, video: VideoShape) -> VideoShape:
        """Grid with the text, where it attends with the video."""
        layers = self.family.layers
        joint = layers is not None and "text" in layers(self.model).beside
        return VideoShape(*video.grid, text=(self.text or 0) if joint else 0)

    def grid(self, height: int, width: int, num_frames: int) -> VideoShape:
        """The tokens of a video in pixels and frames; ValueError for sizes that cannot be made,
        with the nearest that can."""
        frames, rows, columns = self.patch
        sides, wrong = [], []
        for name, size, p in (("height", height, rows), ("width", width, columns)):
            step = self.spatial * p
            if self.family.KIND == "video":
                step = math.lcm(PIXELS, step)
            if size < step or size % step:
                near = _nearest(size, step, step)
                wrong.append(f"{name} must be a multiple of {step}, got {size}; nearest: {near}")
            sides.append(size // (self.spatial * p))
        step, first = self.temporal, self._first()
        if num_frames < first or (num_frames - first) % step:
            near = _nearest(num_frames, step, first)
            rule = "1 more than a multiple" if first == 1 != step else "a multiple"
            wrong.append(f"num_frames must be {rule} of {step}, got {num_frames}; nearest: {near}")
        if wrong:
            raise ValueError("\n".join(wrong))
        latents = (num_frames - first) // step + 1
        return VideoShape(-(-latents // frames), *sides)  # pipelines fill patches up

    def frames(self, tokens: int) -> int:
        """Number of pixel frames in `tokens` frames of tokens."""
        return (tokens * self.patch[0] - 1) * self.temporal + self._first()

    def _first(self) -> int:
        """Number of pixel frames in the first latent."""
        return 1 if self.family.FIRST_FRAME_ALONE else self.temporal


def presets() -> dict[str, tuple[Family, Preset]]:
    """Published models by name."""
    return {
        name: (family, preset)
        for family in map(family_named, FAMILIES)
        for name, preset in family.PRESETS.items()
    }


def subject_of(source: Any, text: int | None = None) -> Subject:
    """
    Args:
        source: a pipeline, a transformer, its config, the folder of a saved pipeline or
            transformer, a name of `presets` or of its repository, a family or a transformer class,
            which stand for their first preset, or a repository on the hub, of which only configs
            are read, from the local cache if they are there. A subject is itself.
        text: tokens of a prompt, where they are other than the family's pipelines make.

    Raises:
        ValueError: a source that is unknown, makes no videos, or has no config to build from, or
            fewer than 0 tokens of text.
    """
    if text is not None and text < 0:
        raise ValueError(f"text must be 0 tokens or more, got {text}")
    if isinstance(source, Subject):
        return source
    if isinstance(source, str | Path):
        return _named(str(source), text)
    if isinstance(source, Mapping):
        kind = source.get("_class_name", "WanTransformer3DModel")
        _check_whole(str(kind), source)
        return _built(str(kind), source, {}, text=text, name=str(kind))
    if isinstance(source, nn.Module):
        module = getattr(source, "_orig_mod", source)  # of a compiled one
        return _built(
            *_config_of(module), {}, text=text, name=type(module).__name__, module=module
        )
    found = (getattr(source, name, None) for name in TRANSFORMERS)
    module = next((module for module in found if module is not None), None)
    if module is None:
        raise ValueError(
            "pipe_or_config must be a pipeline, a transformer, its config, a folder or one of "
            f"{_known()}, got {type(source).__name__}"
        )
    vae = getattr(source, "vae", None)
    return _built(
        *_config_of(getattr(module, "_orig_mod", module)),
        {} if vae is None else vae.config,
        text=text,
        name=type(source).__name__,
        module=module,
        device=getattr(source, "_execution_device", None),
    )


def _named(name: str, text: int | None) -> Subject:
    folder = expanded(name)
    if folder.is_dir():
        return _in_folder(folder, text)
    preset = name.removeprefix("Wan-AI/").removesuffix("-Diffusers")
    published = presets()
    by_repository = {preset.repository: key for key, (_, preset) in published.items()}
    key = by_repository.get(name, preset)
    if key not in published:
        family = served_classes().get(name, name)
        if family in FAMILIES:
            own = [key for key, (other, preset) in published.items() if _is(other, preset, name)]
            if not own:
                raise ValueError(
                    f"no published model of {name} is known here: give the folder of a saved "
                    "pipeline, the repository of one, or a config"
                )
            key = own[0]
    if key in published:
        family, found = published[key]
        sizes = {"scale_factor_temporal": found.temporal, "scale_factor_spatial": found.spatial}
        kind = found.kind or family.CLASSES[0]
        return _built(kind, found.config, sizes, text=text, name=key)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _on_hub(name, text)
    raise no_model(name)


def _is(family: Family, preset: Preset, name: str) -> bool:
    return name in (family.name, preset.kind or family.CLASSES[0])


def _known() -> str:
    return ", ".join(presets())


def _in_folder(folder: Path, text: int | None) -> Subject:
    """Read the folder of a pipeline, or of a transformer alone."""
    name = folder.resolve().name
    for part in TRANSFORMERS:
        config = folder / part / "config.json"
        if config.exists():
            vae = folder / "vae" / "config.json"
            return _read(name, config, vae if vae.exists() else None, text)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no transformer/config.json")
    return _read(name, folder / "config.json", None, text)


def _on_hub(name: str, text: int | None) -> Subject:
    for part in TRANSFORMERS:
        try:
            config = fetched(name, f"{part}/config.json")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ValueError(f"{error}; known without it: {_known()}") from error
        vae = None
        with suppress(OSError):  # some pipelines have none; the family's sizes are taken
            vae = fetched(name, "vae/config.json")
        return _read(name, config, vae, text)
    raise ValueError(f"{name} on the hub holds no transformer/config.json")


def _read(name: str, config: Path, vae: Path | None, text: int | None) -> Subject:
    known = read_fields(config)
    sizes = {} if vae is None else read_fields(vae)
    kind = typed(known, "_class_name", str, origin=config, default="WanTransformer3DModel")
    _check_whole(name, known)
    return _built(kind, known, sizes, text=text, name=name)


def _check_whole(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a config that lacks entries which change the work: class defaults are another
    model's."""
    import diffusers

    kind = config.get("_class_name", "WanTransformer3DModel")
    if kind not in video_classes():
        return  # refused by name
    takes = inspect.signature(getattr(diffusers, kind).__init__).parameters
    missing = [key for key in NEEDED if key in takes and key not in config]
    if missing:
        raise ValueError(f"the config of {name} lacks {', '.join(missing)}")
    patch = config.get("patch_size")
    if isinstance(patch, list | tuple) and patch[0] != 1:
        raise ValueError(f"patch_size must be 1 in time, got {patch}")


def _config_of(module: Any) -> tuple[str, Mapping[str, Any]]:
    return type(module).__name__, getattr(module, "config", {})


def _built(
    kind: str,
    config: Mapping[str, Any],
    vae: Mapping[str, Any],
    *,
    text: int | None,
    name: str,
    module: Any = None,
    device: torch.device | None = None,
) -> Subject:
    if kind not in video_classes():
        raise ValueError(
            f"estimate knows the models that make videos ({', '.join(video_classes())}), got "
            f"{kind}; attach and summary() tell the density of any model"
        )
    family = family_named(served_classes()[kind])
    model = _without_values(kind, config)
    sites = family.self_attentions(model)
    if not sites:
        raise ValueError(f"{name} has no layers of self-attention, by its config")
    layers = None if family.layers is None else family.layers(model)
    apart = family.KIND == "frames"
    text = family.TEXT_TOKENS if text is None else text
    uncounted = [layers.uncounted] if layers is not None and layers.uncounted else []
    uncounted += ["the text, whose length is not known"] * (text is None)
    device, dtype = _runs_on(module, device)
    temporal = _first_of(vae, "scale_factor_temporal", "temporal_compression_ratio")
    spatial = _first_of(vae, "scale_factor_spatial", "spatial_compression_ratio")
    temporal, spatial = temporal or family.TEMPORAL_FACTOR, spatial or family.spatial_factor(model)
    if temporal is None or spatial is None:
        raise ValueError(
            f"the factors by which {name} compresses videos to latents are not known: give its "
            "pipeline, or the folder or repository of one"
        )
    return Subject(
        name=name,
        family=family,
        model=model,
        temporal=temporal,
        spatial=spatial,
        text=text,
        device=device,
        dtype=dtype,
        sites=sites,
        cost=None if layers is None else Cost(model, layers, sites, apart),
        uncounted=tuple(uncounted),
    )


def _without_values(kind: str, config: Mapping[str, Any]) -> nn.Module:
    import diffusers

    made: Any = getattr(diffusers, kind)
    known = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    for key, value in known.items():
        if "layers" in key and isinstance(value, int) and value > MOST_LAYERS:
            raise ValueError(f"{key} of {kind} must be at most {MOST_LAYERS}, got {value}")
    try:
        with torch.device("meta"):
            return made.from_config(known)
    except Exception as error:
        why = f": {error}" if isinstance(error, ValueError) else ""
        raise ValueError(f"no {kind} can be made of its config{why}") from error


def _runs_on(module: Any, device: torch.device | None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that the model runs in; without a model, the best device there is."""
    dtype = None
    if module is not None:
        weight = next(module.parameters())
        dtype, device = module.dtype, device or weight.device
    if device is None or device.type == "meta":
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return device, dtype


def _first_of(known: Mapping[str, Any], *names: str) -> int | None:
    return next((known[name] for name in names if known.get(name) is not None), None)


def _nearest(size: int, step: int, least: int) -> str:
    return " or ".join(map(str, nearest(size, step, least)))
