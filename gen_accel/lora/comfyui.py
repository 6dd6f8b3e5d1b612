"""LoRAs for ComfyUI, in the names of the original models.

ComfyUI's models have the layers of the published checkpoints, where diffusers has its own: Wan's
`blocks.0.attn1.to_q` is `blocks.0.self_attn.q` there. Where several layers of diffusers are one
weight, as q, k and v of HunyuanVideo and Mochi, their LoRAs become one of the sum of their ranks,
which changes the weight by the same. A file holds for each layer

    diffusion_model.LAYER.lora_A.weight, .lora_B.weight, .alpha

and ComfyUI adds alpha / rank B A. A LoHa has .hada_w1_a, .hada_w1_b, .hada_w2_a and .hada_w2_b,
a LoKr .lokr_w1 and .lokr_w2, or the latter as .lokr_w2_a and .lokr_w2_b. Their weight is
multiplied in, and alpha is the rank. A LoKr of whole matrices has no alpha: ComfyUI e8f3bc5 passes
it over, 839df9f divides it by a quotient of their sizes. Beside them are the recipe, in the
metadata, and the method's own parameters, as `gen_accel.branch.NUMBER.NAME` with the number of the
block: other loaders pass these over, and the node of gen_accel attaches the attention by them.

ComfyUI 0.19.3 divides a DoRA's lengths by the lengths of the weights without the LoRA, PEFT by the
lengths with it. No file can hold a DoRA for both, and `export` refuses it.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gen_accel.attention_processors.attached.recipe import (
    KEY,
    WEIGHTS,
    Recipe,
    folders_of,
    read_recipe,
    scale_of,
)
from gen_accel.attention_processors.attached.storage import FILE
from gen_accel.attention_processors.attached.trained import GATE, TRAINED
from gen_accel.attention_processors.families import families
from gen_accel.attention_processors.families.base import Layout, OriginalLayer
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.attention_processors.methods.vsa import VSA, Gate
from gen_accel.io import check_finite, named, read_tensors, replacing, save_tensors
from gen_accel.lora.experts import NOISE
from gen_accel.parsing import cut, shown
from gen_accel.paths import check_input, check_places, expanded
from gen_accel.pipelines.generation.lora_file import MATRIX, WHOLE
from gen_accel.pipelines.generation.lora_file import PREFIX as THEIRS
from gen_accel.published import trained_method
from gen_accel.registry import check_export

PREFIX, OURS = "diffusion_model", "transformer"  # of ComfyUI's names, and of diffusers'
BRANCH = "gen_accel.branch"
# Tensors of a layer of other kinds; the first is always there.
PARTS = {
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
}
_DOWN, _UP, _LENGTHS = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


@dataclass(frozen=True)
class LoraLayer:
    """LoRA of one layer: alpha / rank up down is added to its weight.

    Args:
        down: (rank, inputs).
        up: (outputs, rank).
        lengths: (outputs,), of a DoRA; the lengths of the rows of the weight with the LoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    lengths: Tensor | None = None


@dataclass(frozen=True)
class Factors:
    """LoHa or LoKr of one layer.

    Args:
        tensors: by their names in the file, as lokr_w1.
    """

    tensors: dict[str, Tensor]

    @property
    def alpha(self) -> float | None:
        """Rank, by which ComfyUI divides it: the factor of the change is 1. None for a LoKr
        of whole matrices."""
        inner = [x for name, x in self.tensors.items() if name.endswith("_b")]
        return float(len(inner[0])) if inner else None


@dataclass(frozen=True)
class Loaded:
    """A LoRA in ComfyUI's names, with what it was trained with.

    Args:
        layers: by the name of the layer in ComfyUI's model, without "diffusion_model.".
        branches: parameters of the method by the number of the block, and their names.
    """

    layers: dict[str, LoraLayer | Factors]
    branches: dict[int, dict[str, Tensor]]
    recipe: Recipe


@dataclass(frozen=True)
class Published:
    """Weights from elsewhere with gates of VSA, as FastVideo's, in ComfyUI's names.

    Args:
        layers: LoRAs by the key of the weight.
        differences: what is added to a weight or bias, by its key.
        gates: of VSA, by the number of the block; none where ComfyUI's model has them itself.
        critical: of `VSA`, by the name of the file; None if that does not tell.
    """

    layers: dict[str, LoraLayer]
    differences: dict[str, Tensor]
    gates: dict[int, Gate]
    critical: float | None


@dataclass(frozen=True)
class Exported:
    """Files that `export` wrote, with the number of layers in each, and the largest rank."""

    files: dict[Path, int]
    rank: int
    recipe: Recipe


def export(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "comfyui",
    dtype: str = "float32",
    overwrite: bool = False,
) -> Exported:
    """Write a LoRA of `gen-accel train` for another program.

    Args:
        source: folder of the LoRA, or its file.
        out: *.safetensors. Of a LoRA for two experts, as of Wan 2.2, there are two files,
            *_high_noise.safetensors and *_low_noise.safetensors.
        format: of `registry.LORA_FORMATS`.
        dtype: of the matrices; training kept them in float32.
        overwrite: whether a file that is there already is replaced; the LoRA itself never is.

    Raises:
        FileNotFoundError: no LoRA there.
        FileExistsError: a file is there already.
        ValueError: a model or a layer that ComfyUI does not have, a DoRA, an unknown format or
            dtype, or a name of another ending.
        OSError: the file cannot be written.
    """
    check_export(out, format, dtype)
    place = expanded(out)
    parts = folders_of(source)
    found = {part: load(folder) for part, folder in parts.items()}
    for part, one in found.items():
        if one.recipe.dora:
            raise ValueError(
                f"{parts[part]} is a DoRA, which ComfyUI computes otherwise than PEFT: load the "
                "folder itself by the node Load LoRA (gen_accel), or train with dora: false"
            )
    ends = {part: f"_{NOISE[part]}" if len(found) > 1 else "" for part in found}
    paths = {part: place.with_stem(f"{place.stem}{end}") for part, end in ends.items()}
    outputs = {"out": list(paths.values())}
    check_places(outputs, outputs, {"source": [Path(source)]}, overwrite=overwrite)
    files = {}
    with ExitStack() as stack:  # both experts are whole before one file is replaced
        for part, one in found.items():
            path = paths[part]
            tensors = written(one, getattr(torch, dtype))
            check_finite(tensors, f"the LoRA for {path}")
            metadata = {"format": "pt", KEY: json.dumps(one.recipe.to_dict())}
            save_tensors(tensors, stack.enter_context(replacing(path)), metadata)
            files[path] = len(one.layers)
    first = next(iter(found.values())).recipe
    ranks = [
        len(layer.down) if isinstance(layer, LoraLayer) else first.rank
        for one in found.values()
        for layer in one.layers.values()
    ]
    return Exported(files, max(ranks, default=0), first)


def load(source: str | Path) -> Loaded:
    """Read a LoRA of `gen-accel train`, or one that `export` wrote.

    Args:
        source: a folder, or a file. Beside a file in diffusers' names lie the method's parameters.

    Raises ValueError for a LoRA from elsewhere, or of a model that ComfyUI does not have.
    """
    path = expanded(source)
    path = path / WEIGHTS if path.is_dir() else path
    recipe = read_recipe(path)
    tensors, _ = read_tensors(path)
    if any(name.startswith((f"{PREFIX}.", f"{BRANCH}.")) for name in tensors):
        return _read_back(tensors, recipe, path)
    layers = converted(tensors, recipe, path)
    beside = path.parent / FILE
    held = read_tensors(beside)[0] if beside.is_file() else {}
    return Loaded(layers, _numbered(held, recipe, beside), recipe)


def load_published(source: str | Path, keys: Mapping[str, torch.Size]) -> Published:
    """Read gates of VSA, and the adapter that they lie in.

    Args:
        source: an adapter, of which all is read, or a model with gates, of which they alone are.
        keys: shapes of the weights of ComfyUI's model, by their names there.

    Raises:
        ValueError: no gates; a tensor that the model has no place for, or in another size.
        OSError: no file there.
    """
    path = expanded(source)
    check_input(path)
    tensors, metadata = read_tensors(path, _with_gates)
    own = {name: x for name, x in tensors.items() if TRAINED.fullmatch(name)}
    if not own or any(GATE not in name for name in own):
        raise ValueError(f"{path} holds no gates of VSA: load it by ComfyUI's own nodes")
    name = trained_method(metadata.get("finetuned_model", ""), path.name)
    method = None if name is None else method_from(name)
    share = method.critical if isinstance(method, VSA) else None
    if not any(map(_is_part, tensors)) and all(_its_own(one) in keys for one in own):
        return Published({}, {}, {}, share)
    coded = [name for name, x in own.items() if not x.is_floating_point()]
    coded += [name for name in tensors.keys() - own.keys() if GATE in name and not _is_part(name)]
    if coded:
        raise ValueError(
            f"{path} holds its gates quantised ({cut(coded[0])}): take a file that has them in "
            "bfloat16, as FastVideo's own, or for MiniMax-H3 ComfyUI 0.35, which reads them itself"
        )
    check_finite(tensors, str(path))
    parts: dict[str, dict[OriginalLayer, dict[str, Tensor]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    differences: dict[str, Tensor] = {}
    lost = []
    for name, x in tensors.items():
        if name in own:
            continue
        match, pair = WHOLE.fullmatch(name), MATRIX.fullmatch(name)
        layer = match[1] if match else (pair[1] or pair[4]) if pair else name
        place = None if GATE in layer else _place_in(THEIRS.sub("", layer, count=1), keys)
        if place is not None and match and not match[2].startswith("set"):
            key = f"{PREFIX}.{place.name}.{'bias' if match[2].endswith('_b') else 'weight'}"
            whole = _rows(x, place)
            if keys.get(key) == whole.shape:
                differences[key] = differences[key] + whole if key in differences else whole
                continue
        if place is not None and pair:
            part = "alpha" if pair[4] else "down" if pair[2] else "up"
            parts[place.name][place][part] = x
            continue
        lost.append(name)
    made = {}
    for name, some in parts.items():
        key, found = f"{PREFIX}.{name}.weight", {}
        for place, held in some.items():
            down, up = held.get("down"), held.get("up")
            if down is not None and up is not None:
                layer = LoraLayer(down, up, float(held.get("alpha", len(down))))
                found[place.slot] = place, layer
        joined = _joined(name, found, path) if len(found) == len(some) else None
        if joined is None or (len(joined.up), *joined.down.shape[1:]) != (*keys[key],):
            lost.append(key)
            continue
        made[key] = joined
    if lost:
        pruned = f"{PREFIX}.adaln_t_table" in keys
        raise ValueError(
            f"{path} does not fit this model, which has no place for {len(lost)} of its "
            f"{len(tensors)} tensors, or in another size: {named(map(cut, sorted(lost)))}"
            + ("; this MiniMax-H3 is pruned: load the whole one" if pruned else "")
        )
    return Published(made, differences, _gates(own, path), share)


def _with_gates(names: list[str]) -> list[str]:
    """Choose all tensors of an adapter, and the gates of a model."""
    if any(map(_is_part, names)):
        return names
    return [name for name in names if GATE in name or TRAINED.fullmatch(name)]


def _its_own(name: str) -> str:
    """Name a tensor of a model's file as ComfyUI's model does."""
    return f"{PREFIX}.{name.removeprefix('model.').removeprefix(f'{PREFIX}.')}"


def _is_part(name: str) -> bool:
    """Whether a tensor is of an adapter."""
    return bool(WHOLE.fullmatch(name) or MATRIX.fullmatch(name))


def _gates(tensors: Mapping[str, Tensor], path: Path) -> dict[int, Gate]:
    """Make the gates of a file, by the number of the block."""
    parts: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, x in tensors.items():
        match = TRAINED.fullmatch(name)
        number = re.search(r"\.(\d+)(?:\.|$)", f".{match[1]}" if match else "")
        if match is None or number is None or match[3] in parts[int(number[1])]:
            raise ValueError(f"{path} holds {shown(name)}, a gate of no block of its own")
        parts[int(number[1])][match[3]] = x
    found = {}
    for number, held in parts.items():
        weight = held.get("weight")
        if weight is None or weight.ndim != 2:
            raise ValueError(f"{path} lacks the weight of the gate of block {number}")
        gate = found[number] = Gate(1, len(weight), weight.shape[1]).to(weight.dtype)
        held.setdefault("bias", weight.new_zeros(len(weight)))
        for name, x in held.items():
            getattr(gate.to_gate_compress, name).data.copy_(x)
        gate.requires_grad_(False)
    return found


def _original(layout: Layout, layer: str) -> OriginalLayer | None:
    """Find a layer of diffusers in the whole original model; None for one that is not named."""
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer)
    theirs, inside = layout.get(match[1] if match else "", ("", {}))
    if match and inside is None:
        return OriginalLayer(f"{theirs}.{match[2]}.{match[3]}")
    one = (inside or {}).get(match[3] if match else layer)
    return replace(one, name=f"{theirs}.{match[2]}.{one.name}") if match and one else one


def _place_in(layer: str, keys: Mapping[str, object]) -> OriginalLayer | None:
    """Find a layer of diffusers, or of ComfyUI's model itself, in ComfyUI's model; None for one
    that has no weight there."""
    found = [OriginalLayer(layer), *(_original(one.comfyui, layer) for one in families())]
    return next((x for x in found if x and f"{PREFIX}.{x.name}.weight" in keys), None)


def _rows(x: Tensor, place: OriginalLayer) -> Tensor:
    """Bring the rows of a difference to their places in the original layer, zeros beside them."""
    if place.is_swapped:
        x = torch.cat(x.chunk(2)[::-1])
    unit = len(x) // place.widths[place.slot]
    beside = [x.new_zeros(unit * width, *x.shape[1:]) for width in place.widths]
    return torch.cat([*beside[: place.slot], x, *beside[place.slot + 1 :]])


def converted(
    tensors: Mapping[str, Tensor], recipe: Recipe, origin: object
) -> dict[str, LoraLayer | Factors]:
    """Bring a LoRA's tensors, as a training writes them, to ComfyUI's layers.

    Args:
        origin: file or folder, for errors.
    """
    stacks = _stacks(recipe, origin)
    parts: dict[str, dict[int, tuple[OriginalLayer, LoraLayer]]] = defaultdict(dict)
    factors: dict[str, LoraLayer | Factors] = {}
    for name, layer in _own_layers(tensors, recipe, origin).items():
        place = _original(stacks, name)
        if place is None:
            raise ValueError(
                f"{origin} has a LoRA on {name}, which no layer of ComfyUI's model stands for: "
                "train with targets attention and feed_forward"
            )
        home = place.name
        if isinstance(layer, LoraLayer):
            parts[home][place.slot] = (place, layer)
            continue
        if len(place.widths) > 1 or place.is_swapped:
            raise ValueError(
                f"{origin} has a {recipe.lora_kind} on {name}, whose rows are a part of {home} of "
                "ComfyUI's model, or in another order there: train with lora_kind lora"
            )
        factors[home] = layer
    joined = {name: _joined(name, some, origin) for name, some in parts.items()}
    return dict(sorted((factors | joined).items()))


def written(loaded: Loaded, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the tensors of a file that ComfyUI loads; alphas are float32."""
    tensors = {}
    for name, layer in loaded.layers.items():
        if isinstance(layer, Factors):
            tensors |= {
                f"{PREFIX}.{name}.{part}": x.to(dtype) for part, x in layer.tensors.items()
            }
            if layer.alpha is not None:
                tensors[f"{PREFIX}.{name}.alpha"] = torch.tensor(layer.alpha)
            continue
        tensors[f"{PREFIX}.{name}.{_DOWN}"] = layer.down.to(dtype)
        tensors[f"{PREFIX}.{name}.{_UP}"] = layer.up.to(dtype)
        tensors[f"{PREFIX}.{name}.alpha"] = torch.tensor(layer.alpha)
    for number, held in loaded.branches.items():
        tensors |= {f"{BRANCH}.{number}.{name}": x for name, x in held.items()}
    return tensors


def _stacks(recipe: Recipe, origin: object) -> Layout:
    kind = recipe.transformer["class"]
    layouts = {kind: one.comfyui for one in families() if one.comfyui for kind in one.classes}
    if kind not in layouts:
        raise ValueError(
            f"{origin} is for {kind}, which ComfyUI does not have; it has the models of "
            f"{', '.join(layouts)}"
        )
    return layouts[kind]


def _own_layers(
    tensors: Mapping[str, Tensor], recipe: Recipe, origin: object
) -> dict[str, LoraLayer | Factors]:
    """Sort a file's tensors by layer."""
    held: dict[str, dict[str, Tensor]] = defaultdict(dict)
    known = (_DOWN, _UP, _LENGTHS) if recipe.lora_kind == "lora" else PARTS[recipe.lora_kind]
    rest = []
    for key, x in tensors.items():
        name = key.removeprefix(f"{OURS}.")
        part = next((one for one in known if name.endswith(f".{one}")), None)
        if part is None or name == key:
            rest.append(key)
        else:
            held[name.removesuffix(f".{part}")][part] = x
    needed = {_DOWN, _UP} if recipe.lora_kind == "lora" else {known[0]}
    rest += [name for name, parts in held.items() if not needed <= parts.keys()]
    if rest:
        raise ValueError(
            f"{origin} is no whole LoRA of gen-accel train: {named(map(cut, sorted(rest)))}"
        )
    found: dict[str, LoraLayer | Factors] = {}
    weight = scale_of(recipe.alpha, recipe.rank, recipe.rank_stabilised)
    for name, parts in held.items():
        if recipe.lora_kind != "lora":
            found[name] = Factors({**parts, known[0]: parts[known[0]] * weight})
            continue
        rank = len(parts[_DOWN])
        found[name] = LoraLayer(parts[_DOWN], parts[_UP], weight * rank, parts.get(_LENGTHS))
    return found


def _joined(
    name: str, parts: Mapping[int, tuple[OriginalLayer, LoraLayer]], origin: object
) -> LoraLayer:
    """Make one LoRA of those on parts of a weight."""
    place, layer = next(iter(parts.values()))
    if len(place.widths) == 1 and place.is_swapped:
        up = torch.cat([*layer.up.chunk(2)][::-1])
        lengths = None if layer.lengths is None else torch.cat([*layer.lengths.chunk(2)][::-1])
        return LoraLayer(layer.down, up, layer.alpha, lengths)
    if len(place.widths) == 1:
        return layer
    unit = len(layer.up) // place.widths[place.slot]
    rows = [unit * width for width in place.widths]
    wrong = [slot for slot, (_, one) in parts.items() if len(one.up) != rows[slot]]
    if wrong:
        raise ValueError(
            f"{origin} has parts of {name} with {[len(one.up) for _, one in parts.values()]} "
            f"rows, where ComfyUI's model has {rows}"
        )
    some = [one for _, (_, one) in sorted(parts.items())]
    down = torch.cat([one.down for one in some])
    ups = [parts[i][1].up if i in parts else down.new_zeros(n, 0) for i, n in enumerate(rows)]
    whole = [one.lengths for one in some if one.lengths is not None]
    if whole and len(whole) < len(rows):
        raise ValueError(
            f"{origin} is a DoRA on parts of {name}, whose other rows have no lengths: load it "
            "in diffusers"
        )
    alpha = layer.alpha / len(layer.down) * len(down)
    return LoraLayer(down, torch.block_diag(*ups), alpha, torch.cat(whole) if whole else None)


def _read_back(tensors: Mapping[str, Tensor], recipe: Recipe, path: Path) -> Loaded:
    """Read what `written` made."""
    layers: dict[str, LoraLayer | Factors] = {}
    branches: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, x in tensors.items():
        layer, _, part = key.removeprefix(f"{PREFIX}.").rpartition(".")
        if part in PARTS.get(recipe.lora_kind, ()) and key.startswith(f"{PREFIX}."):
            earlier = layers.get(layer)
            held = earlier.tensors if isinstance(earlier, Factors) else {}
            layers[layer] = Factors({**held, part: x})
        elif match := re.fullmatch(rf"{re.escape(BRANCH)}\.(\d+)\.(.+)", key):
            branches[int(match[1])][match[2]] = x
        elif key.startswith(f"{PREFIX}.") and key.endswith(f".{_DOWN}"):
            layer = key.removesuffix(f".{_DOWN}")
            try:
                up, alpha = tensors[f"{layer}.{_UP}"], float(tensors[f"{layer}.alpha"])
            except KeyError as error:
                raise ValueError(f"{path} has no {error.args[0]}: export it again") from None
            layers[layer.removeprefix(f"{PREFIX}.")] = LoraLayer(x, up, alpha)
    return Loaded(layers, dict(branches), recipe)


def _numbered(
    tensors: Mapping[str, Tensor], recipe: Recipe, path: Path
) -> dict[int, dict[str, Tensor]]:
    """Sort parameters of layers, as `save_processors` names them, by the number of the block."""
    stacks = [*_stacks(recipe, path)]
    found: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, x in tensors.items():
        match = re.fullmatch(r"\w+\.(\w+)\.(\d+)\.(.+)", key)
        if match is None or match[1] not in stacks:
            raise ValueError(f"{path} holds {key}, which is of no block of ComfyUI's model")
        # HunyuanVideo counts its single blocks on from the double ones.
        before = recipe.transformer["num_layers"] if stacks.index(match[1]) else 0
        found[before + int(match[2])][match[3]] = x
    return dict(found)
