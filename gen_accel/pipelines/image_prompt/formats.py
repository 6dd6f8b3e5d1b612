"""Files of image-prompt adapters: read, checked against a model, built, written.

Variants, and the keys that identify each:

base        image_proj.proj.weight, norm.*                      4 tokens of one embedding
plus        image_proj.latents, layers.*                        Plus and Plus-Face, which have the
                                                                same keys
full        image_proj.proj.0, 2, 3                             Full-Face
faceid      image_proj.proj.0, 2, norm.*; {n}.to_q_lora.*       with its LoRA, or without
faceid_plus the same and perceiver_resampler.*
portrait    as faceid, with other than 4 tokens and no LoRA; or as plus, reading vectors of 512
flux        as base, with biases in the layers                  4 or 16 tokens
lynx        a folder with resampler.safetensors and ip_layers.safetensors, biases in the layers
lynx_light  the same without biases; layers in every second block only
pixels      image_proj.convs.*                                  ours

`faceid_plus_v2` has the keys and shapes of `faceid_plus` and another formula: nothing in the file
tells them apart. It is chosen by a file name with "plusv2" ("plus-v2", "plus_v2"), or by
`read_adapter(path, variant="faceid_plus_v2")`.

On disk, adapters are flat safetensors (image_proj.*, ip_adapter.*), a nested dict in a .bin, which
is read as weights only, or XLabs' own names for Flux (ip_adapter_proj_model.*,
double_blocks.{n}.processor.ip_adapter_double_stream_{k,v}_proj.*). Our own files are flat
safetensors with "gen_accel" in the metadata: the variant, the blocks by name, and the base model.

Sources: https://github.com/tencent-ailab/IP-Adapter, https://github.com/XLabs-AI/x-flux,
https://github.com/bytedance/lynx, and the loaders of diffusers.
"""

import json
import pickle
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gen_accel.attention_processors.attached.recipe import CONFIG, KEY, sizes
from gen_accel.attention_processors.families import ImageAttention, family_for
from gen_accel.attention_processors.image_prompt import (
    ImageAdapter,
    KeyNorm,
    KeysValues,
    Metadata,
    Projector,
)
from gen_accel.hub import REPOSITORY, reachable
from gen_accel.io import (
    fields_of,
    named,
    parse_json,
    read_tensors,
    replacing,
    save_tensors,
    typed,
    write_json,
)
from gen_accel.parsing import Count, check_fields, cut, shown
from gen_accel.paths import expanded
from gen_accel.pipelines.image_prompt import projectors

if TYPE_CHECKING:
    from diffusers import ModelMixin

VARIANTS = (
    "base",
    "plus",
    "full",
    "faceid",
    "faceid_plus",
    "faceid_plus_v2",
    "portrait",
    "flux",
    "lynx",
    "lynx_light",
    "pixels",
)
WEIGHTS = "image_prompt.safetensors"
LYNX = ("resampler.safetensors", "ip_layers.safetensors")
VERSION = 1
MOST_PIXELS = 4096  # a side of the picture that an encoder reads

# Norm of the keys, for adapters whose published code has one.
_KEY_NORMS = {"lynx": "own", "lynx_light": "plain"}
_PROJECTORS = {  # of the others: `Resampler` or `IdLinear`
    "pixels": projectors.Pixels,
    "full": projectors.MLP,
    "faceid_plus": projectors.IdResampler,
    "faceid_plus_v2": projectors.IdResampler,
    "base": projectors.Linear,
    "flux": projectors.Linear,
}
_SAME_KEYS = (  # variants that may have the same keys
    {"faceid_plus", "faceid_plus_v2"},
    {"faceid", "portrait"},
    {"plus", "portrait", "lynx", "lynx_light"},
    {"base", "flux"},
)
_PREFIXES = ("image_proj", "ip_adapter", "start")
_XLABS = (
    ("ip_adapter_proj_model.", "image_proj."),
    ("double_blocks.", "ip_adapter."),
    (".processor.ip_adapter_double_stream_k_proj.", ".to_k_ip."),
    (".processor.ip_adapter_double_stream_v_proj.", ".to_v_ip."),
)
_LAYER = re.compile(r"(.+)\.(to_[kv]_ip\.(?:weight|bias)|registers)")
_LORA = re.compile(r"(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_SECOND = re.compile(r"plus[-_]?v2")
_TO_KV, _IP = re.compile(r"^(to_[kv])\."), r"\1_ip."  # our names of layers to the official
_KEYS_VALUES = ("to_k_ip.weight", "to_v_ip.weight")
_FEW = 8  # most names listed in a message


@dataclass(frozen=True)
class _Told:
    """Entries of the metadata of our own files that a reader relies on."""

    blocks: dict[str, str] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    transformer: dict[str, object] = field(default_factory=dict)
    image_encoder: str = ""
    image_size: Count = 1
    key_norm: KeyNorm = "none"


@dataclass(frozen=True)
class AdapterFile:
    """Contents of an adapter's file, before they are fitted to a model.

    Args:
        projector: state dict of the projector, by the official names.
        layers: maps the number or name of an attention to its to_k_ip.weight, to_v_ip.weight,
            their biases and registers.
        start: state dict of the projector before training, if the adapter needs it.
        lora: {n}.to_{q,k,v,out}_lora.{down,up}.weight of a FaceID adapter.
    """

    variant: str
    projector: dict[str, Tensor] = field(repr=False)
    layers: dict[str, dict[str, Tensor]] = field(repr=False)
    start: dict[str, Tensor] = field(default_factory=dict, repr=False)
    lora: dict[str, Tensor] = field(default_factory=dict, repr=False)
    metadata: Metadata = field(default_factory=dict)
    origin: str = "the adapter"


def find_adapter(
    source: str | Path, subfolder: str | None = None, weight_name: str | None = None
) -> Path:
    """Find an adapter's file, or Lynx's folder; downloads it if `source` is on the hub.

    Args:
        source: file, folder, or name of a hub repository.
        subfolder: subfolder of the folder or repository.
        weight_name: name of the file; by default there must be only one.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: several files, and no `weight_name`.
    """
    path = expanded(source)
    if path.is_file():
        if subfolder or weight_name:
            raise ValueError(f"{source} is a file: leave out subfolder and weight_name")
        return path
    if path.is_dir():
        return _in_folder(path / (subfolder or ""), weight_name)
    if not REPOSITORY.fullmatch(str(source)):
        embedded = "; the demo model's is gen_accel.demo.image_prompt_path()"
        raise FileNotFoundError(
            f"no adapter at {source}, and no repository is called like that"
            f"{embedded if str(source) == 'demo' else ''}"
        )
    return _from_hub(str(source), subfolder, weight_name)


def read_adapter(path: str | Path, *, variant: str | None = None) -> AdapterFile:
    """Read a file, or a folder of ours or of Lynx.

    Args:
        variant: kind of the adapter, if its keys do not tell; see the module's docstring.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an adapter, a broken file, or keys of another variant than `variant`.
    """
    path = expanded(path)
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {shown(variant)}")
    if path.is_dir():
        path = _in_folder(path, None)
    if path.is_dir():  # Lynx, without its reference branch
        projector, own = (_read_safetensors(path / name)[0] for name in LYNX)
        flat = {f"image_proj.{k}": x for k, x in projector.items()}
        flat |= {f"ip_adapter.{k}": x for k, x in own.items()}
        groups, metadata = _grouped(flat, path), {}
    elif path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        groups = _grouped(tensors, path)
    else:
        groups, metadata = _read_bin(path), {}
    layers: dict[str, dict[str, Tensor]] = {}
    lora, unknown = {}, []
    for key, x in groups["ip_adapter"].items():
        if match := _LAYER.fullmatch(key):
            layers.setdefault(match[1], {})[match[2]] = x
        elif _LORA.fullmatch(key):
            lora[key] = x
        else:
            unknown.append(f"ip_adapter.{key}")
    if unknown:
        raise ValueError(f"{path} is no image-prompt adapter: unexpected {listed(unknown)}")
    if not groups["image_proj"] or not layers:
        have = [name for name in _PREFIXES if groups[name]]
        raise ValueError(
            f"{path} is no whole image-prompt adapter: it needs image_proj.* and ip_adapter.*, "
            f"and has {', '.join(have) or 'neither'}"
        )
    found = _variant(groups["image_proj"], layers, lora, path)
    variant = variant or typed(metadata, "variant", str, origin=path, default=None)
    same = variant == found or any({variant, found} <= kinds for kinds in _SAME_KEYS)
    if variant is not None and not same:
        raise ValueError(f"{path} has the keys of {found!r}, not of {variant!r}")
    file = AdapterFile(
        variant or found,
        groups["image_proj"],
        layers,
        groups["start"],
        lora,
        metadata,
        str(path),
    )
    _check_whole(file)
    return file


def build_adapter(file: AdapterFile, transformer: "ModelMixin") -> ImageAdapter:
    """Build the adapter in float32, its layers numbered by `transformer`'s family.

    Layers are matched by the names of their blocks if the file has names, else by number. The
    transformer is not changed.

    Raises:
        ValueError: missing or unexpected keys, or another base model; the error names both.
    """
    sites = family_for(transformer, "image prompts").image_attentions(transformer)
    places = _places(file, sites, transformer)
    projector = _new_projector(file, file.projector, "image_proj")
    projector.load_state_dict(file.projector)
    layers = {}
    for key, site in places.items():
        width = site.width
        if file.variant == "flux":  # whose tokens are as wide as its text before it is embedded
            width = transformer.config.joint_attention_dim
        layers[site.number] = _build_layer(file, key, site, projector.width, width)
    start = None
    if file.start:
        start = _new_projector(file, file.start, "start")
        start.load_state_dict(file.start)
    return ImageAdapter(
        file.variant,
        projector,
        layers,
        key_norm=file.metadata.get("key_norm", _KEY_NORMS.get(file.variant, "none")),
        start=start,
        metadata={**file.metadata, **base_of(transformer, layers)},
    )


def base_of(transformer: "ModelMixin", numbers: Collection[str] | None = None) -> Metadata:
    """Describe an adapter's base model, for its metadata.

    Args:
        numbers: numbers of the attentions that have layers; None for all.
    """
    family = family_for(transformer, "image prompts")
    sites = {site.number: site for site in family.image_attentions(transformer)}
    kept = [site for n, site in sites.items() if numbers is None or n in numbers]
    return {
        "family": family.image_prompts.adapters,  # whose adapters fit
        "transformer": sizes(transformer),
        "blocks": {site.number: site.name for site in kept},
        "heads": {site.number: site.heads for site in kept},
    }


def write_adapter(
    folder_or_path: str | Path,
    adapter: ImageAdapter,
    metadata: Mapping[str, object] | None = None,
    *,
    beside: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a file, or a folder with the file and its metadata as JSON, and return the file. It
    appears only when it is complete.

    Args:
        folder_or_path: a file if it ends in .safetensors, else a folder.
        metadata: additions to the adapter's own; `base_of(transformer)` if that has no blocks.
        beside: files to write into a folder as well, by name.
    """
    path = expanded(folder_or_path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(f"adapters are written as .safetensors, got {path.name}")
    held = {f"image_proj.{k}": x for k, x in adapter.projector.state_dict().items()}
    for number, layer in adapter.layers.items():
        for key, x in layer.state_dict().items():
            held[f"ip_adapter.{number}.{_TO_KV.sub(_IP, key)}"] = x
    if adapter.start is not None:
        held |= {f"start.{k}": x for k, x in adapter.start.state_dict().items()}
    known = {
        **(adapter.metadata or {}),
        **(metadata or {}),
        "variant": adapter.variant,
        "key_norm": adapter.key_norm,
        "version": VERSION,
    }
    text = {"format": "pt", KEY: json.dumps(known)}
    tensors = {k: x.detach().cpu().clone() for k, x in held.items()}
    if path.suffix == ".safetensors":
        with replacing(path) as partial:
            save_tensors(tensors, partial, text)
        return path
    with replacing(path) as partial:
        partial.mkdir(parents=True)
        save_tensors(tensors, partial / WEIGHTS, text)
        write_json(partial / CONFIG, known)
        for name, data in (beside or {}).items():
            (partial / name).write_bytes(data)
    return path / WEIGHTS


def listed(keys: Iterable[str]) -> str:
    """List the first few keys, for a message."""
    return named(map(cut, keys), _FEW)


def differences(wanted: Iterable[str], given: Iterable[str]) -> list[str]:
    """Say, for a message, which keys are missing and which are unexpected; empty for neither."""
    wanted, given = dict.fromkeys(wanted), dict.fromkeys(given)
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    parts = [f"missing {listed(missing)}"] if missing else []
    return parts + ([f"unexpected {listed(unexpected)}"] if unexpected else [])


def _in_folder(folder: Path, weight_name: str | None) -> Path:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    chosen = _choose(names, weight_name, str(folder))
    return folder / chosen[0] if len(chosen) == 1 else folder


def _from_hub(repository: str, subfolder: str | None, weight_name: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    source = reachable(repository)
    if source != repository:
        return _in_folder(Path(source) / (subfolder or ""), weight_name)

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repository, name, subfolder=subfolder or None))

    if weight_name is not None:
        return fetch(weight_name)
    under = f"{subfolder.strip('/')}/" if subfolder else ""
    names = [
        name.removeprefix(under)
        for name in HfApi().list_repo_files(repository)
        if name.startswith(under)
    ]
    where = f"{repository}/{subfolder}" if subfolder else repository
    found = [fetch(name) for name in _choose([n for n in names if "/" not in n], None, where)]
    return found[0] if len(found) == 1 else found[0].parent


def _choose(names: list[str], weight_name: str | None, where: str) -> tuple[str, ...]:
    """Choose the adapter's file among `names`, or the two files of Lynx."""
    if weight_name is not None:
        if weight_name not in names and "/" not in weight_name:
            raise FileNotFoundError(f"no {weight_name} in {where}; there are {listed(names)}")
        return (weight_name,)
    if WEIGHTS in names:
        return (WEIGHTS,)
    if set(LYNX) <= set(names):
        return LYNX
    files = [n for n in names if n.endswith((".safetensors", ".bin")) and n not in LYNX]
    if len(files) == 1:
        return (files[0],)
    if files:
        raise ValueError(f"{where} holds several files; give weight_name, one of {listed(files)}")
    halves = [name for name in LYNX if name not in names]
    if len(halves) < len(LYNX):
        raise FileNotFoundError(f"{where} is half an adapter: {halves[0]} is missing")
    raise FileNotFoundError(f"no image-prompt adapter in {where}")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Metadata]:
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path}")
    tensors, metadata = read_tensors(path)
    return tensors, _metadata(metadata.get(KEY), path)


def _metadata(text: str | None, path: Path) -> Metadata:
    """Parse our own metadata; empty for files from elsewhere and for other contents."""
    if text is None:
        return {}
    try:
        data = parse_json(text, "it")
        if "variant" not in fields_of(data, "it"):
            return {}
        if typed(data, "version", int, origin="it") != VERSION:
            raise ValueError(f"its version is {shown(data['version'])}, not {VERSION}")
        if typed(data, "variant", str, origin="it") not in VARIANTS:
            raise ValueError(
                f"its variant is {shown(data['variant'])}, none of {', '.join(VARIANTS)}"
            )
        check_fields(data, _Told, "it")
        if data.get("image_size", 1) > MOST_PIXELS:
            raise ValueError(
                f"image_size must be at most {MOST_PIXELS} pixels, got {shown(data['image_size'])}"
            )
    except ValueError as error:
        raise ValueError(f"what {path} says of itself cannot be read: {error}") from error
    return data


def _read_bin(path: Path) -> dict[str, dict[str, Tensor]]:
    if path.suffix not in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(f"an adapter is a .safetensors or .bin file, got {path.name}")
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not read: it is broken, or holds more than weights, which could be code "
            "that runs on loading. Ask for a .safetensors file"
        ) from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, not the weights of an adapter")
    flat: dict[str, object] = {}
    for name, value in data.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{name}.{key}" if key else str(name): x for key, x in inner}
    return _grouped(flat, path)


def _grouped(tensors: Mapping[str, object], path: Path) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in _PREFIXES}
    unknown = []
    for name, x in tensors.items():
        key = name
        if key.startswith((_XLABS[0][0], _XLABS[1][0])):
            for theirs, ours in _XLABS:
                key = key.replace(theirs, ours, 1)
        prefix, _, rest = key.partition(".")
        if prefix not in groups or not rest:
            unknown.append(name)
        elif not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} in {path} is {kind}, no weights of floats")
        elif not (x.numel() and x.ndim) or (key.endswith(_KEYS_VALUES) and x.ndim != 2):
            raise ValueError(f"{name} in {path} is {tuple(x.shape)}, no matrix of weights")
        else:
            groups[prefix][rest] = x
    if unknown:
        raise ValueError(f"{path} is no image-prompt adapter: unexpected {listed(unknown)}")
    return groups


def _variant(
    projector: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Tensor]],
    lora: Mapping[str, Tensor],
    path: Path,
) -> str:
    """Determine the variant by keys and shapes, and by the file's name if two remain."""
    biased = any("to_k_ip.bias" in layer for layer in layers.values())
    if path.is_dir():
        return "lynx" if biased else "lynx_light"
    if "convs.0.weight" in projector:
        return "pixels"
    if "latents" in projector:
        entry = projector.get("proj_in.weight")
        faces = entry is not None and entry.shape[-1] == projectors.IDENTITY
        return "portrait" if faces else "plus"
    if any(key.startswith("perceiver_resampler.") for key in projector):
        second = _SECOND.search(path.name.lower())
        return "faceid_plus_v2" if second else "faceid_plus"
    if "proj.3.weight" in projector:
        return "full"
    if "proj.0.weight" in projector:
        last, norm = projector.get("proj.2.weight"), projector.get("norm.weight")
        tokens = 4 if last is None or norm is None else last.shape[0] // norm.shape[0]
        return "faceid" if lora or tokens == 4 else "portrait"
    if "proj.weight" in projector:
        return "flux" if biased else "base"
    raise ValueError(
        f"{path} is an adapter of no kind that is known ({', '.join(VARIANTS)}): its projector "
        f"has {listed(projector)}"
    )


def _check_whole(file: AdapterFile) -> None:
    """Refuse missing or unexpected keys, by a ValueError, before any model is loaded."""
    with torch.device("meta"):
        for name, state in (("image_proj", file.projector), ("start", file.start)):
            if state:
                _new_projector(file, state, name)
    missing = []
    for key, layer in file.layers.items():
        needed = [*_KEYS_VALUES]
        if any(name.endswith(".bias") for name in layer):
            needed += ["to_k_ip.bias", "to_v_ip.bias"]
        missing += [f"ip_adapter.{key}.{name}" for name in needed if name not in layer]
    if missing:
        raise ValueError(f"{file.origin} is no whole adapter: missing {listed(missing)}")


def _new_projector(file: AdapterFile, state: Mapping[str, Tensor], name: str) -> Projector:
    """Build the projector at the sizes of `state`, whose shapes must all agree."""
    resampled = projectors.Resampler if "latents" in state else projectors.IdLinear
    try:
        made = _PROJECTORS.get(file.variant, resampled).of(state, file.variant)
    except KeyError as error:
        raise ValueError(
            f"{file.origin} is no whole {file.variant} adapter: missing {name}.{error.args[0]}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{file.origin} is no whole {file.variant} adapter: {name}.{error}"
        ) from None
    _check_state(file, made.state_dict(), state, name)
    return made


def _build_layer(
    file: AdapterFile, key: str, site: ImageAttention, made: int, expected: int
) -> KeysValues:
    """Build a layer for tokens of the width `made`; `expected` is the width of its attention's."""
    state = file.layers[key]
    inner, width = state["to_k_ip.weight"].shape
    kind = type(site.module).__name__
    if inner != site.heads * site.dim:
        raise ValueError(
            f"{file.origin} is for another model: layer {key} makes {inner} channels, and "
            f"{site.name} ({kind}) has {site.heads * site.dim}"
        )
    if width != made:
        raise ValueError(
            f"{file.origin} does not fit together: layer {key} takes tokens of {width}, and its "
            f"projector makes tokens of {made}"
        )
    # Tokens of Lynx's light layers have a width of their own.
    if width != expected and file.variant != "lynx_light":
        raise ValueError(
            f"{file.origin} is for another model: layer {key} takes tokens of {width}, and "
            f"{site.name} ({kind}) of {expected}"
        )
    registers = state["registers"].shape[-2] if "registers" in state else 0
    layer = KeysValues(width, inner, bias="to_k_ip.bias" in state, registers=registers)
    given = {name.replace("_ip.", ".", 1): x for name, x in state.items()}
    _check_state(file, layer.state_dict(), given, f"ip_adapter.{key}")
    layer.load_state_dict(given)
    return layer


def _places(
    file: AdapterFile, sites: list[ImageAttention], transformer: "ModelMixin"
) -> dict[str, ImageAttention]:
    """Map the key of each layer in the file to its attention."""
    kind = type(transformer).__name__
    _check_base(file, sites, transformer)
    blocks = file.metadata.get("blocks", {})
    by_name, by_number = {s.name: s for s in sites}, {s.number: s for s in sites}
    second = sites[::2]
    if file.variant == "lynx_light" and not blocks:
        # Lynx counts the layers of every second block; files that count blocks are read too.
        counts_blocks = set(file.layers) == {site.number for site in second}
        by_number = {s.number if counts_blocks else str(i): s for i, s in enumerate(second)}
    found = {}
    for key in file.layers:
        site = by_name.get(blocks.get(key, key))
        if site is None and key not in blocks:
            site = by_number.get(key)
        if site is not None:
            found[key] = site
    unexpected = [blocks.get(key, key) for key in file.layers if key not in found]
    have = {site.name for site in found.values()}
    wanted = [key for key in blocks if key not in file.layers]
    wanted = wanted if blocks else [n for n, site in by_number.items() if site.name not in have]
    if parts := differences(wanted, unexpected):
        raise ValueError(
            f"{file.origin} has layers for {len(file.layers)} attentions, and {kind} has "
            f"{len(by_number)}: {'; '.join(parts)}. It is for another model, or a part is gone"
        )
    return found


def _check_base(file: AdapterFile, sites: list[ImageAttention], transformer: "ModelMixin") -> None:
    """Refuse an adapter of our own that was written for another base model.

    Compares the family and the heads, which the layers depend on.
    """
    own = family_for(transformer, "image prompts").image_prompts.adapters
    said = file.metadata.get("family", own)
    if said != own:
        raise ValueError(
            f"{file.origin} is for another model: one of the family {shown(said)}, and "
            f"{type(transformer).__name__} is {own}"
        )
    base, have = file.metadata.get("transformer", {}), sizes(transformer)
    wrong = [
        f"{name} {shown(base[name])} (this model: {shown(have[name])})"
        for name in ("num_attention_heads", "attention_head_dim")
        if name in base and name in have and base[name] != have[name]
    ]
    if wrong:
        raise ValueError(f"{file.origin} is for another model: {', '.join(wrong)}")
    heads = file.metadata.get("heads", {})
    for site in sites:
        if heads.get(site.number, site.heads) != site.heads:
            raise ValueError(
                f"{file.origin} is for another model: {heads[site.number]} heads in layer "
                f"{site.number}, and {site.name} has {site.heads}"
            )


def _check_state(
    file: AdapterFile, own: Mapping[str, Tensor], given: Mapping[str, Tensor], name: str
) -> None:
    parts = differences(*([f"{name}.{key}" for key in each] for each in (own, given)))
    if not parts:
        parts = [
            f"{name}.{key} is {tuple(given[key].shape)}, must be {tuple(x.shape)}"
            for key, x in own.items()
            if given[key].shape != x.shape
        ]
    if parts:
        raise ValueError(f"{file.origin} is no whole {file.variant} adapter: {'; '.join(parts)}")
