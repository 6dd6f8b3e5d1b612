"""Files of LoRAs from elsewhere: layers in the names of other programs, the options of PEFT in the
metadata, which PEFT itself takes as they are, and what is no product of two matrices.

FastVideo's adapters, which ComfyUI reads too, also have

    LAYER.diff, LAYER.diff_b   added to the weight and the bias of a layer
    LAYER.set_weight           the weight of a layer that the model lacks: the gate of VSA
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.attached.recipe import KEY, Recipe, check_base
from gen_accel.attention_processors.attached.trained import TRAINED, keep_trained
from gen_accel.attention_processors.families import families
from gen_accel.io import check_finite, fields_of, named, parse_json, read_tensors
from gen_accel.parsing import Count, Finite, check_fields, cut, shown

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from peft import PeftConfig

OPTIONS = "lora_adapter_metadata"  # key of the metadata
KOHYA, COMFYUI, PEFT = "lora_unet_", "diffusion_model.", r"base_model\.model\."
PREFIX = re.compile(rf"{KOHYA}|{re.escape(COMFYUI)}|{PEFT}|transformer\.")
ELSEWHERE = re.compile(rf"{KOHYA}|{PEFT}|.+\.(lora_(down|up)\.weight|alpha)$")
MATRIX = re.compile(r"(.+?)\.(?:(lora_A|lora_down)|(lora_B|lora_up))\.weight|(.+)\.alpha")
WHOLE = re.compile(r"(.+)\.(diff|diff_b|set_weight|set_bias)")
NUMBER = re.compile(rf"{re.escape(COMFYUI)}blocks\.([^.]*)(\..*)?", re.DOTALL)
MOST_BLOCKS, MOST_ALPHA = 1000, 1e6
# What makes a pattern slow beyond measure: repeats of groups, or many repeats.
REPEATED, REPEAT, MOST_REPEATS, MOST_LONG = re.compile(r"\)[*+{]"), re.compile(r"[*+{]"), 4, 500


# Classes of PEFT, by the kinds whose files diffusers does not load.
FACTORED = {"loha": "LoHaConfig", "lokr": "LoKrConfig"}


def factored(
    kind: str, *, rank: int, alpha: float, layers: list[str], about: dict[str, object] | None
) -> "PeftConfig":
    """Return the options of PEFT for a new LoHa or LoKr, which changes nothing.

    Args:
        layers: names of modules.
        about: what the adapter holds for whoever asks, as its recipe.
    """
    import peft

    made = getattr(peft, FACTORED[kind])
    return made(r=rank, alpha=alpha, target_modules=layers, init_weights=True, auto_mapping=about)


def load_factored(model: "ModelMixin", file: Path, recipe: Recipe, name: str) -> None:
    """Put a LoHa or LoKr of `gen-accel train` onto a transformer, and make it active.

    Args:
        name: of the adapter.

    Raises ValueError for a file that lacks weights, or has weights that the model has no place
    for, of other sizes, or not finite.
    """
    from peft import get_peft_model_state_dict

    tensors, _ = read_tensors(file)
    check_base(recipe, model)
    check_finite(tensors, f"the LoRA in {file}")
    given = {key.removeprefix("transformer."): x for key, x in tensors.items()}
    layers = sorted({key.rpartition(".")[0] for key in given})
    modules = {name for name, _ in model.named_modules()}
    if lost := [layer for layer in layers if layer not in modules]:
        raise ValueError(
            f"{file} holds layers that {type(model).__name__} does not have: "
            f"{named(map(cut, lost))}"
        )
    about: dict[str, object] = {KEY: recipe.to_dict()}
    made = factored(
        recipe.lora_kind, rank=recipe.rank, alpha=recipe.alpha, layers=layers, about=about
    )
    model.add_adapter(made, name)
    own = get_peft_model_state_dict(model, adapter_name=name)
    wrong = own.keys() ^ given.keys() or {k for k, x in given.items() if x.shape != own[k].shape}
    if wrong:
        model.delete_adapters(name)
        raise ValueError(
            f"{file} is no {recipe.lora_kind} of rank {recipe.rank} for this model: "
            f"{named(map(cut, sorted(wrong)))}"
        )
    with torch.no_grad():
        for key, x in given.items():
            own[key].copy_(x)


@dataclass(frozen=True)
class LoraOptions:
    """Options of PEFT that a file may set; see `peft.LoraConfig`. Initial weights of other kinds
    would change the model's own."""

    target_modules: list[str] | str
    r: Count = 8
    lora_alpha: Finite = 8
    lora_dropout: Finite = 0.0
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    alpha_pattern: dict[str, Finite] = field(default_factory=dict)
    use_dora: bool = False
    use_rslora: bool = False
    lora_bias: bool = False
    inference_mode: bool = False
    bias: Literal["none"] = "none"
    init_lora_weights: Literal[True, False, "gaussian"] = True
    auto_mapping: dict[str, object] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None


def read_lora(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, float | None]:
    """Read a LoRA's tensors, the options of PEFT by "part.option", and the alpha of all layers, as
    LightX2V's for MiniMax-H3 have it; None for what the metadata lacks.

    Raises ValueError for options that are no names with values, and an alpha that is no number.
    """
    tensors, metadata = read_tensors(file)
    what, alpha = f"{OPTIONS} of {file}", metadata.get("alpha")
    text = metadata.get(OPTIONS)
    options = fields_of(parse_json(text, what), what) if text else None
    try:
        return tensors, options, None if alpha is None else float(alpha)
    except ValueError:
        raise ValueError(f"alpha of {file} must be a number, got {shown(alpha)}") from None


def check_options(about: Mapping[str, Any], tensors: Mapping[str, Tensor], origin: object) -> None:
    """Raise ValueError for options of PEFT that are of another type, unknown, slow to match, or
    not of the ranks of `tensors`, by their names in the model."""
    from peft import LoraConfig

    what = f"{OPTIONS} of {origin}"
    try:
        check_fields(about, LoraOptions, "it")
    except ValueError as error:
        raise ValueError(f"{what} cannot be read: {error}") from None
    own, plain = {one.name for one in fields(LoraOptions)}, LoraConfig().to_dict()
    for name in about.keys() - own:
        if name not in plain:
            raise ValueError(f"{what} has the unknown {shown(name)}: remove it")
        if about[name] and about[name] != plain[name]:
            raise ValueError(
                f"{name} of {what} changes more than a LoRA's layers, got {shown(about[name])}: "
                "remove it"
            )
    if not 0 <= about.get("lora_dropout", 0) <= 1:
        raise ValueError(f"lora_dropout of {what} must be from 0 to 1")
    alphas = {"": about.get("lora_alpha", 0), **about.get("alpha_pattern", {})}
    for layer, alpha in alphas.items():
        if abs(alpha) > MOST_ALPHA:
            name = f"the alpha of {shown(layer)}" if layer else "lora_alpha"
            raise ValueError(f"{name} in {what} must be at most {MOST_ALPHA:.0f}, got {alpha:g}")
    ranks, targets = about.get("rank_pattern", {}), about["target_modules"]
    patterns = [*ranks, *about.get("alpha_pattern", {})]
    for one in [*patterns, targets] if isinstance(targets, str) else patterns:
        try:
            re.compile(one)
        except re.error as error:
            raise ValueError(f"{shown(one)} in {what} is no pattern: {error}") from None
        repeats = len(REPEAT.findall(one))
        if REPEATED.search(one) or repeats > MOST_REPEATS or len(one) > MOST_LONG:
            raise ValueError(f"{shown(one)} in {what} may take for ever to match: name the layers")
    for key, x in tensors.items():
        layer, found, _ = key.rpartition(".lora_A.weight")
        own_ranks = (n for one, n in ranks.items() if re.match(rf"(.*\.)?({one})$", layer))
        rank = next(own_ranks, about.get("r", LoraOptions.r))
        if found and x.ndim and len(x) != rank:
            raise ValueError(f"{what} gives {shown(layer)} the rank {rank}, its weights {len(x)}")
    for option, end in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        layers = {key.partition(".lora_")[0] for key in tensors}
        if about.get(option) and (lacking := [x for x in layers if f"{x}.{end}" not in tensors]):
            raise ValueError(f"{what} sets {option}, and there is no {end} of {named(lacking)}")


class Whole(NamedTuple):
    """The part of an adapter that is no product of two matrices.

    Args:
        added: parameters of the model, by name, and what is added to each.
        trained: parameters of a method, by their names in the file.
    """

    added: Mapping[str, tuple[nn.Parameter, Tensor]]
    trained: Mapping[str, Tensor]

    def apply(self, model: nn.Module, weight: float, origin: object) -> None:
        """Add the differences to the model's parameters, summed in fp32, and keep the rest for
        the method that will be attached, all times `weight`."""
        if self.trained:
            keep_trained(model, self.trained, origin, weight)
        for own, x in self.added.values():
            # Not in place: copies of a pipeline share the memory of their weights.
            own.data = (own.data.float() + weight * x.to(own.device).float()).to(own.dtype)


def split_whole(
    tensors: dict[str, Tensor], model: nn.Module, origin: object
) -> tuple[dict[str, Tensor], Whole | None]:
    """Part an adapter into its products of two matrices and the rest. None in the place of the
    rest, and the tensors as they are, for one that has products alone.

    Raises ValueError for a whole weight that the model has no place for, or in another size.
    """
    rest = {key for key in tensors if WHOLE.fullmatch(key) or TRAINED.fullmatch(key)}
    if not rest:
        return tensors, None
    # A LoRA that is on already has put its layers around the model's own.
    own = {key.replace(".base_layer.", "."): x for key, x in model.named_parameters()}
    modules = {key.replace(".base_layer", "") for key, _ in model.named_modules() if key}
    places = _places(model, modules)
    added: dict[str, tuple[nn.Parameter, Tensor]] = {}
    trained, wrong = {}, []
    for key in sorted(rest):
        x, match = tensors[key], WHOLE.fullmatch(key)
        if TRAINED.fullmatch(key):
            trained[key] = x
            continue
        assert match is not None
        place = places.get(PREFIX.sub("", match[1], count=1), "")
        name = f"{place}.{'bias' if match[2] == 'diff_b' else 'weight'}"
        found = own.get(name)
        if match[2].startswith("set") or found is None or found.shape != x.shape or name in added:
            wrong.append(key)
        elif found.is_floating_point() and x.isfinite().all():
            added[name] = found, x
        else:
            raise ValueError(
                f"{shown(key)} of {origin} is not finite, or is for weights that are quantised: "
                "load the model in full precision"
            )
    if wrong:
        raise ValueError(
            f"{origin} changes {len(wrong)} of its {len(rest)} whole weights that "
            f"{type(model).__name__} lacks, or has in another size: {named(map(shown, wrong))}"
        )
    low = {key: x for key, x in tensors.items() if key not in rest}
    if not any(map(PREFIX.match, low)):
        low = {f"transformer.{key}": x for key, x in low.items()}
    return low, Whole(added, trained)


def brought_home(
    tensors: Mapping[str, Tensor], model: nn.Module, origin: object, alpha: float | None = None
) -> dict[str, Tensor] | None:
    """Bring a LoRA in kohya's names, ComfyUI's, PEFT's, or the layers' names alone to diffusers'
    own, its alphas multiplied in. None for names that diffusers reads.

    Args:
        alpha: of layers whose names stand alone and that have none; None: their rank.

    Raises ValueError for layers that the model does not have, an alpha that is no number, and a
    number of a block beyond any.
    """
    modules = {name for name, _ in model.named_modules() if name}
    layers = {match[1] or match[4] for match in map(MATRIX.fullmatch, tensors) if match}
    is_comfyui = any(key.startswith(COMFYUI) for key in tensors)
    is_alone, places = bool(layers) and layers <= modules, _places(model, modules)
    ours = bool(layers) and all(PREFIX.sub("", one, count=1) in places for one in layers)
    if is_comfyui and not ours and not any(key.startswith(KOHYA) for key in tensors):
        for key in tensors:
            number = NUMBER.fullmatch(key)
            if number and not (number[1].isdecimal() and int(number[1][:9]) < MOST_BLOCKS):
                raise ValueError(f"{origin} names a block that no model has: {shown(key)}")
        return None
    if not (is_comfyui or is_alone) and not any(map(ELSEWHERE.match, tensors)):
        return None
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, x in tensors.items():
        match = MATRIX.fullmatch(key)
        layer = PREFIX.sub("", match[1] or match[4], count=1) if match else ""
        part = "alpha" if match and match[4] else "A" if match and match[2] else "B"
        own = found.setdefault(places.get(layer, ""), {})
        if layer not in places or part in own:
            unknown.append(key)
        own[part] = x
    if unknown:
        raise ValueError(
            f"{origin} holds {len(unknown)} of {len(tensors)} tensors in names that "
            f"{type(model).__name__} has no place for: {named(map(shown, unknown))}"
        )
    home = {}
    for layer, parts in found.items():
        if is_alone and alpha is not None:
            parts.setdefault("alpha", torch.tensor(alpha))
        scale = _scale(parts, f"{layer} of {origin}")
        for part in parts.keys() & {"A", "B"}:
            x = parts[part]
            home[f"transformer.{layer}.lora_{part}.weight"] = x * scale if part == "A" else x
    return home


def _scale(parts: Mapping[str, Tensor], what: str) -> float:
    """Alpha / rank of a layer; 1 without an alpha."""
    alpha, down = parts.get("alpha"), parts.get("A")
    if alpha is None:
        return 1.0
    rank = len(down) if down is not None and down.ndim == 2 else 0
    if not (rank and alpha.numel() == 1 and alpha.isreal().all() and abs(alpha) <= MOST_ALPHA):
        raise ValueError(
            f"alpha of {what} must be one number of at most {MOST_ALPHA:.0f}, beside a matrix of "
            f"rank 1 or more, got {tuple(alpha.shape)} values of {alpha.dtype} and rank {rank}"
        )
    return alpha.item() / rank


def _places(model: nn.Module, modules: set[str]) -> dict[str, str]:
    """Map names of layers, by diffusers and by the original model, with dots and with
    underscores, to modules. Layers that are one weight in the original model are not named."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    layout = next((one.comfyui for one in families() if kinds & {*one.classes}), {})
    found = {name: name for name in modules}
    for name in modules:
        match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name)
        theirs, inside = layout.get(match[1] if match else "", ("", None))
        one = inside.get(match[3] if match else name) if inside else None
        if one and len(one.widths) == 1 and not one.is_swapped:
            found[f"{theirs}.{match[2]}.{one.name}" if match else one.name] = name
    return {name.replace(".", "_"): home for name, home in found.items()} | found
