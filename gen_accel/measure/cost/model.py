"""Models known by their config: a transformer and its grid, and the components beside it.

Nothing is loaded: models are made on the meta device, from a name, a folder, the hub, a config or
the model itself. Parameters are counted from configs and headers of files.
"""

import inspect
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import nn

from gen_accel.attention_processors.attached.clock import TRANSFORMERS
from gen_accel.attention_processors.families import (
    Family,
    PublishedModel,
    SelfAttention,
    families,
    family_named,
    served_classes,
    video_classes,
)
from gen_accel.attention_processors.families.base import Config, Pass
from gen_accel.attention_processors.families.layers import Flops, Lengths
from gen_accel.attention_processors.families.pipelines import takes
from gen_accel.attention_processors.families.weights import BYTES, held_names
from gen_accel.hub import fetched, index_file, index_in
from gen_accel.io import read_fields, read_index, typed
from gen_accel.paths import DEMO, expanded, model_named
from gen_accel.published import PARTS
from gen_accel.registry import needed_for
from gen_accel.served import check_row, no_model, row_of
from gen_accel.video import PIXELS, Coding, VideoShape, grid_of, patch_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

# A pipeline, a transformer, a config, or the name of one; see `subject_of`.
Source = Union[str, Path, Config, nn.Module, "DiffusionPipeline", "Subject"]

PUBLISHED = Path(__file__).with_name("published.json")
NEEDED = ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "patch_size")
WAN = "WanTransformer3DModel"  # the class of a config that names none
MOST_LAYERS = 10_000  # of a config; a thousand layers take a second to build
ENCODERS = ("text_encoder", "image_encoder")  # how their names begin
OF_REFERENCES = "transformer_ref"  # in place of the transformer, for videos from references
NO_PARTS = "text encoder and autoencoder, which are not known by a transformer"


@dataclass(frozen=True, eq=False)
class Subject:
    """A transformer that makes videos, and the sizes of its autoencoder.

    Args:
        model: without values, on the meta device.
        temporal, spatial: frames, and pixels a side, in a latent.
        sites: the attentions over the grid.
        cost: FLOPs of a call, see `Family.cost`.
        uncounted: in words, work that FLOPs leave out.
        text: tokens of a prompt; None if unknown.
        pipeline: class of the pipeline that runs it; "" for the family's first.
    """

    name: str
    family: Family
    model: "ModelMixin" = field(repr=False)
    temporal: int
    spatial: int
    text: int | None
    device: torch.device
    dtype: torch.dtype
    sites: list[SelfAttention] = field(repr=False)
    cost: Callable[[VideoShape, Lengths], Flops] = field(repr=False)
    uncounted: tuple[str, ...] = ()
    pipeline: str = ""

    @property
    def blocks(self) -> set[int]:
        """Numbers of the layers with self-attention."""
        return {site.layer for site in self.sites}

    @property
    def head_dim(self) -> int:
        return self.sites[0].dim

    @property
    def width(self) -> int:
        """Channels of a token, heads times dim."""
        return max(site.heads * site.dim for site in self.sites)

    @property
    def config(self) -> Config:
        """Config of the model."""
        return self.model.config

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns in a token."""
        return patch_of(self.config)

    def passes(self, video: VideoShape, steps: int) -> list[Pass]:
        """Forward passes that its pipeline makes a clip by, in one part or chunk after chunk."""
        row = takes(self.pipeline or next(iter(self.family.pipelines), ""))
        return [Pass(steps, video)] if row is None else row.passes(self.config, video, steps)

    def flops(self, video: VideoShape, lengths: Lengths | None = None) -> Flops:
        """FLOPs of one call for one clip.

        Args:
            lengths: of tokens beside the video and the text, by kind.
        """
        return self.cost(video, {"text": self.text or 0, **(lengths or {})})

    def seen(self, video: VideoShape, lengths: Lengths | None = None) -> VideoShape:
        """Grid that one attention sees: a single frame if frames attend apart; with the text if it
        attends too."""
        if self.family.kind == "frames":
            return VideoShape(1, video.height, video.width)
        return self.whole(video, lengths)

    def whole(self, video: VideoShape, lengths: Lengths | None = None) -> VideoShape:
        """Grid with the text and other tokens, if they attend with the video."""
        known = {"text": self.text or 0, **(lengths or {})}
        beside = self.family.layers(self.model).beside
        others = sum(int(n) for kind, n in known.items() if kind in beside)
        return VideoShape(*video.grid, text=others)

    @property
    def multiples(self) -> tuple[int, int]:
        """Pixels that divide the height and the width of a clip."""
        rows, columns = (math.lcm(self._least, self.spatial * p) for p in self.patch[1:])
        return rows, columns

    @property
    def _least(self) -> int:
        return PIXELS if self.family.kind == "video" else 1

    def grid(self, height: int, width: int, num_frames: int) -> VideoShape:
        """The tokens of a video in pixels and frames; ValueError for sizes that cannot be made,
        with the nearest that can."""
        sizes = {"num_frames": num_frames, "height": height, "width": width}
        return grid_of(sizes, self._coding, self.spatial, self.patch, self._least)

    def frames(self, tokens: int) -> int:
        """Number of pixel frames in `tokens` frames of tokens, of whole chunks."""
        return self._coding.frames_of(tokens * self.patch[0])

    def frames_in(self, seconds: float, fps: float) -> int:
        """Number of pixel frames that can be made and last nearest to `seconds`; a first one that
        is a latent by itself lasts none."""
        step, _, first, _ = self._coding
        alone = int(first == 1 < step)
        return first + step * max(alone, round((seconds * fps + alone - first) / step))

    @property
    def _coding(self) -> Coding:
        return self.family.sizes.coding(self.temporal)


@dataclass(frozen=True)
class ComponentSize:
    """A component of a pipeline that has weights.

    Args:
        name: such as transformer, transformer_2, text_encoder, vae.
        kind: its class.
        parameters: number of parameters.
        size: bytes of all weights.
        largest: bytes of the largest layer's own weights.
        embedding: parameters that are looked up and take no part in products.
        unpacked: bytes of the copy that a layer computes with, if its weights are held in fewer
            bits; of the largest such layer.
        model: on the meta device; None if it is not needed.
    """

    name: str
    kind: str
    parameters: int
    size: int
    largest: int
    embedding: int = 0
    unpacked: int = 0
    model: "ModelMixin | None" = field(default=None, repr=False, compare=False)

    @property
    def is_encoder(self) -> bool:
        return self.name.startswith(ENCODERS)


def presets() -> dict[str, tuple[Family, PublishedModel]]:
    """Published models by name."""
    return {
        name: (family, preset) for family in families() for name, preset in family.presets.items()
    }


def subject_of(source: Source, text: int | None = None) -> Subject:
    """Read a model's config and make the model without values.

    Args:
        source: a pipeline, a transformer, its config, the folder of a saved pipeline or
            transformer, a name of `presets` or of its repository, a family or a transformer class,
            which mean their first preset, or a repository on the hub, of which only configs are
            read, from the local cache if they are there. A subject is itself.
        text: tokens of a prompt, if other than the family's pipelines make.

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
        return _saved(str(source.get("_class_name", WAN)), source, {}, text)
    name, vae, device = type(source).__name__, {}, None
    module = source if isinstance(source, nn.Module) else None
    if module is None:
        found = (getattr(source, part, None) for part in TRANSFORMERS)
        module = next((one for one in found if one is not None), None)
        if module is None:
            raise ValueError(
                "pipe_or_config must be a pipeline, a transformer, its config, a folder or one of "
                f"{', '.join(presets())}, got {name}"
            )
        device = getattr(source, "_execution_device", None)
        vae = getattr(getattr(source, "vae", None), "config", {})
    plain = getattr(module, "_orig_mod", module)  # of a compiled one
    kind = type(plain).__name__
    name = kind if module is source else name
    if device is None:
        device = next((value.device for value in module.parameters()), None)
    dtype = getattr(module, "dtype", None)
    made = _built(kind, getattr(plain, "config", {}), vae, text, name, device, dtype)
    return made if module is source else replace(made, pipeline=name)


def _named(name: str, text: int | None) -> Subject:
    folder = expanded(name)
    if folder.is_dir():
        name = DEMO if folder == Path(model_named(DEMO)) else folder.resolve().name
        found = _read(name, lambda path: folder / path, text)
        if found is None and (folder / "config.json").exists():
            found = _read(name, lambda path: folder / path, text, alone=True)
        if found is None:
            raise ValueError(f"{folder} holds no transformer/config.json")
        return found
    row = row_of(name)
    if row is not None and row.published:
        return _published_subject(row.published, row.kind, text)
    check_row(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise no_model(name)
    try:
        found = _read(name, lambda path: fetched(name, path), text)
    except OSError as error:
        raise ValueError(f"{error}; known without it: {', '.join(presets())}") from error
    if found is None:
        raise ValueError(f"{name} on the hub holds no transformer/config.json")
    return found


@lru_cache(maxsize=4)  # a verb asks several times, and large models take a second to build
def _published_subject(name: str, kind: str, text: int | None) -> Subject:
    found = presets()[name][1]
    made = _built(kind, found.config, {"scale_factor_temporal": found.temporal}, text, name)
    return replace(made, pipeline=found.pipeline)


def _read(
    name: str, file: Callable[[str], Path], text: int | None, *, alone: bool = False
) -> Subject | None:
    """Read the configs of a saved pipeline; None without a transformer.

    Args:
        file: from a path within the pipeline to a file on disk.
        alone: the folder of a transformer, not of a pipeline.
    """
    for part in ("",) if alone else TRANSFORMERS:
        try:
            config = file(f"{part}/config.json".lstrip("/"))
            known = read_fields(config)
        except FileNotFoundError:
            continue
        sizes, index = {}, {}
        with suppress(OSError):  # some pipelines have none; the family's sizes are taken
            sizes = {} if alone else read_fields(file("vae/config.json"))
        with suppress(OSError):  # those that are made of blocks are alike
            index = {} if alone else read_fields(file("model_index.json"))
        kind = typed(known, "_class_name", str, origin=config, default=WAN)
        kind = PARTS.get(kind, kind)
        made = _saved(name, {**known, "_class_name": kind}, sizes, text)
        return replace(made, pipeline=str(index.get("_class_name", "")))
    return None


def _saved(name: str, config: Config, vae: Config, text: int | None) -> Subject:
    """Make a subject of a config that must hold all that changes the work: class defaults are
    another model's."""
    import diffusers

    kind = str(config.get("_class_name", WAN))
    if kind in video_classes():  # others are refused by name
        takes = inspect.signature(getattr(diffusers, kind).__init__).parameters
        missing = [key for key in NEEDED if key in takes and key not in config]
        if missing:
            raise ValueError(f"the config of {name} lacks {', '.join(missing)}")
        patch = config.get("patch_size")
        if isinstance(patch, list | tuple) and patch[0] != 1:
            raise ValueError(f"patch_size must be 1 in time, got {patch}")
    return _built(kind, config, vae, text, name)


def _built(
    kind: str,
    config: Config,
    vae: Config,
    text: int | None,
    name: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Subject:
    """Make a subject.

    Args:
        kind, config: of the transformer; `vae` is the autoencoder's config.
        device, dtype: of the values; None: the best device there is.
    """
    if kind not in video_classes():
        raise ValueError(
            f"estimate knows the models that make videos ({', '.join(video_classes())}), got "
            f"{kind}; attach and summary() tell the density of any model"
        )
    family = family_named(served_classes()[kind])
    for key, value in config.items():
        if "layers" in key and isinstance(value, int) and value > MOST_LAYERS:
            raise ValueError(f"{key} of {kind} must be at most {MOST_LAYERS}, got {value}")
    try:
        model = _on_meta(kind, config)
    except Exception as error:  # classes raise different errors for a foreign config
        why = f": {error}" if isinstance(error, ValueError) else ""
        raise ValueError(f"no {kind} can be made of its config{why}") from error
    sites = family.self_attentions(model)
    if not sites:
        raise ValueError(f"{name} has no layers of self-attention, by its config")
    known, uncounted = family.sizes_of(model.config), family.layers(model).uncounted
    text = known.text if text is None else text
    uncounted = [uncounted] if uncounted else []
    uncounted += ["the text, whose length is not known"] * (text is None)
    chunked = known.chunks and -(-known.chunks.frames // known.chunks.latents)
    temporal, spatial = (
        vae.get(f"scale_factor_{axis}") or vae.get(f"{axis}_compression_ratio") or own
        for axis, own in (("temporal", chunked or known.temporal), ("spatial", known.spatial))
    )
    if not isinstance(temporal, int) or not isinstance(spatial, int):
        raise ValueError(
            f"the factors by which {name} compresses videos to latents are not known: give its "
            "pipeline, or the folder or repository of one"
        )
    if device is None or device.type == "meta":
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return Subject(
        name=name,
        family=family,
        model=model,
        temporal=temporal,
        spatial=spatial,
        text=text,
        device=device,
        dtype=dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16),
        sites=sites,
        cost=family.cost(model),
        uncounted=tuple(uncounted),
    )


def _on_meta(kind: str, config: Config) -> "ModelMixin":
    """Make a model of a class of diffusers, or else of transformers, without values.

    Raises:
        LookupError: neither library has a class of models of that name.
        Exception: whatever the class raises.
    """
    import diffusers

    if (made := _class_of(diffusers, kind)) is not None:
        known = {key: value for key, value in config.items() if not key.startswith("_")}
        with torch.device("meta"):
            return made.from_config(known)
    with needed_for("the size of a text encoder", extra="video"):
        import transformers
    if (made := _class_of(transformers, kind)) is None:
        raise LookupError(kind)
    with torch.device("meta"):
        return made(made.config_class.from_dict(dict(config)))


def _class_of(home: ModuleType, name: str) -> Any:
    """A public class of models in a library; None if there is none of that name."""
    found = None if name.startswith("_") else getattr(home, name, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model on the meta device as loading would, which leaves some weights in float32."""
    held = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    if type(model).__module__.startswith("transformers") and dtype != torch.float16:
        held = ()  # transformers keeps them for float16 alone
    for name, value in model.named_parameters():
        if value.is_floating_point() and not any(part in name.split(".") for part in held):
            value.data = value.data.to(dtype)
    return model


def components_of(
    source: Source, subject: Subject, dtype: torch.dtype, quantize: str | None = None
) -> tuple[list[ComponentSize], list[str]]:
    """List the components of a pipeline, and in words the components of unknown size.

    Args:
        source: what `subject_of` took.
        subject: what it returned.
        dtype: that the weights are loaded in; classes of diffusers keep some in float32.
        quantize: how the linear layers of the transformers' blocks are held, of `BYTES`.
    """
    transformer = _counted("transformer", subject.model, dtype, quantize)
    if isinstance(source, str | Path):
        folder = expanded(str(source))
        if index_in(folder) is not None:
            read = lambda path: folder / path  # noqa: E731
            return _components_in(transformer, folder, read, folder, dtype, quantize)
        if not folder.exists():
            known = presets()
            name = subject.name if subject.name in known else str(source)
            if name in known:
                return _published(transformer, name, *known[name], dtype)
            if "/" in str(source):
                with suppress(OSError):
                    fetch = lambda path: fetched(str(source), path)  # noqa: E731
                    return _components_in(transformer, source, fetch, None, dtype, quantize)
    elif not isinstance(source, nn.Module | Mapping | Subject):
        found = []
        for name, module in source.components.items():
            if isinstance(module, nn.Module):
                make: Any = getattr(type(module), "from_config", type(module))
                with torch.device("meta"):
                    found.append(_counted(name, make(module.config), dtype, quantize))
        return found, []
    return [transformer], [NO_PARTS]


def _counted(
    name: str, model: "ModelMixin", dtype: torch.dtype, quantize: str | None = None
) -> ComponentSize:
    """Count a component.

    Args:
        quantize: how the linear layers of a transformer's blocks are held; None: as the others.
    """
    cast(model, dtype)
    is_held = quantize is not None and name in TRANSFORMERS
    held = {f"{one}.weight" for one in held_names(model, quantize)} if is_held else set[str]()
    bytes_of = {
        key: round(value.numel() * (BYTES[str(quantize)] if key in held else value.itemsize))
        for key, value in model.named_parameters()
    }
    layers: Counter[str] = Counter()
    for key, count in bytes_of.items():
        layers[key.rpartition(".")[0]] += count
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return ComponentSize(
        name=name,
        kind=type(model).__name__,
        parameters=sum(value.numel() for value in model.parameters()),
        size=sum(bytes_of.values()),
        largest=max(layers.values(), default=0),
        unpacked=max((model.get_parameter(one).nbytes for one in held), default=0),
        embedding=sum(table.weight.numel() for table in tables),
        model=model,
    )


def _components_in(
    transformer: ComponentSize,
    source: str | Path,
    file: Callable[[str], Path],
    folder: Path | None,
    dtype: torch.dtype,
    quantize: str | None,
) -> tuple[list[ComponentSize], list[str]]:
    """Read the components that an index names. Weights that lie quantised in a folder, as of
    GGUF, count as in their files.

    Args:
        source: folder or repository of the pipeline.
        file: from a path within the pipeline to a file on disk.
        folder: of the pipeline; None on the hub.
    """
    found, unknown = [], []
    index = read_index(index_file(source))
    for name, kind in index.items():
        known = isinstance(kind, list) and len(kind) == 2 and all(isinstance(k, str) for k in kind)
        if name.startswith("_") or not known:
            continue
        if name == OF_REFERENCES and TRANSFORMERS[0] in index:
            continue  # a run loads one of the two
        try:
            config = read_fields(file(f"{name}/config.json"))
        except OSError:
            continue  # a scheduler or tokenizer
        if name == TRANSFORMERS[0]:
            found.append(_as_stored(transformer, folder, config))
            continue
        try:
            one = _counted(name, _on_meta(kind[1], config), dtype, quantize)
            found.append(_as_stored(one, folder, config))
        except ImportError:
            raise
        except Exception:  # classes raise different errors for a foreign config
            count = None if folder is None else _elements_in(folder / name)
            if count is None:
                unknown.append(f"{name}, a {kind[1]} that cannot be made of its config")
            else:
                size = count * dtype.itemsize
                found.append(ComponentSize(name, kind[1], count, size, size))
    return found, unknown


def _as_stored(part: ComponentSize, folder: Path | None, config: Config) -> ComponentSize:
    """Return a part with the bytes of its files, if they hold it quantised: it stays so, but for
    the layer that computes."""
    if folder is None:
        return part
    files = [*(folder / part.name).glob("*.gguf")]
    if not files and config.get("quantization_config") is not None:
        files = [*(folder / part.name).glob("*.safetensors")]
    if not files:
        return part
    size = sum(file.stat().st_size for file in files)
    return replace(part, size=size, unpacked=part.largest)


def _elements_in(folder: Path) -> int | None:
    """Add up the elements in the headers of a component's files; None if they are not read."""
    from safetensors import SafetensorError, safe_open

    files, count = [*folder.glob("*.safetensors")], 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as held:
                shapes = [held.get_slice(key).get_shape() for key in held.keys()]  # noqa: SIM118
        except SafetensorError:
            return None
        count += sum(torch.Size(shape).numel() for shape in shapes)
    return count if files else None


def _published(
    transformer: ComponentSize,
    name: str,
    family: Family,
    preset: PublishedModel,
    dtype: torch.dtype,
) -> tuple[list[ComponentSize], list[str]]:
    """Components of a published model, some of them as `published.json` counts them."""
    import diffusers

    found = [transformer]
    for number in range(1, preset.transformers):
        found.append(replace(transformer, name=f"transformer_{number + 1}", model=None))
    for part, key in family.parts.items():
        if key not in _encoders():
            with torch.device("meta"):
                vae = getattr(diffusers, key).from_config(preset.vae)
            found.append(_counted("vae", vae, dtype))
            continue
        encoder, size = _encoders()[key], dtype.itemsize
        found.append(
            ComponentSize(
                name=part,
                kind=encoder["class"],
                parameters=encoder["parameters"],
                size=encoder["parameters"] * size,
                largest=encoder["largest"] * size,
                embedding=encoder["embedding"],
            )
        )
    if family.parts:
        return found, []
    return found, [f"text encoder and autoencoder of {name}: give the folder of its pipeline"]


@cache
def _encoders() -> dict[str, Any]:
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))
