"""LoRAs of a pipeline: loaded whole, or refused."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import Tensor, nn

from gen_accel.attention_processors.attached.recipe import WEIGHTS, folders_of, read_recipe
from gen_accel.hub import check_there, fetched, parted, reachable
from gen_accel.io import named
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.model_index import one_line
from gen_accel.registry import EXPERTS, needed_for

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Names of a layer's two matrices in a file: by PEFT, by older diffusers, by kohya.
PARTS = re.compile(r"(.+?)\.(?:lora_(A|B)|lora\.(down|up)|lora_(down|up))\.weight")
DOWN = ("A", "down")


def lora_source(text: str) -> tuple[str, float]:
    """Parse "folder:0.5" to the folder, file or repository and 0.5; OSError if it is not there."""
    source, weight = parted(text)
    check_there(source, "LoRA")
    path = expanded(source)
    return (str(path) if path.exists() else reachable(source)), weight


def add_loras(pipe: "DiffusionPipeline", loras: Sequence[tuple[str, float]]) -> None:
    """Load LoRAs (source, weight), and make them active.

    Raises:
        ValueError: a LoRA that `check_lora` refuses.
        OSError: no LoRA at a source.
    """
    if not loras:
        return
    with needed_for("a LoRA", extra="video"):
        import peft  # noqa: F401
    adapters = {f"lora_{i}": source for i, (source, _) in enumerate(loras)}
    alone: Any = _loads_alone(pipe)
    for name, source in adapters.items():
        parts = _parts_of(source)
        for part, path in parts.items():
            check_lora(pipe, path, part)
        if alone is not None:
            file = _file_of(source)  # with its alpha in its metadata
            options = {"weight_name": file.name, "local_files_only": True}
            with one_line(source):
                alone.load_lora_adapter(
                    str(file.parent), prefix="transformer", adapter_name=name, **options
                )
            continue
        for part, path in parts.items():
            second = {"load_into_transformer_2": True} if part == EXPERTS[1] else {}
            with one_line(source):
                pipe.load_lora_weights(path, adapter_name=name, **second)
        if not any(name in loaded for loaded in pipe.get_list_adapters().values()):
            raise ValueError(f"{source} holds no LoRA for {type(pipe).__name__}")
    (pipe if alone is None else alone).set_adapters([*adapters], [weight for _, weight in loras])


def check_lora(pipe: "DiffusionPipeline", source: str, part: str = EXPERTS[0]) -> None:
    """Refuse a LoRA that diffusers would load only in part, with no more than a log message.

    Args:
        part: the transformer that it is loaded into.

    Raises:
        ValueError: layers that the model does not have, layers with one matrix missing or with no
            weights at all, matrices of another size, or integer weights.
        OSError: no LoRA there.
    """
    from diffusers.loaders.lora_base import LoraBaseMixin

    kind = type(pipe).__name__
    if (alone := _loads_alone(pipe)) is not None:
        tensors = load_file(_file_of(source))
        if len(under("transformer", tensors)) < len(tensors) or not tensors:
            raise ValueError(f"{source} holds no LoRA for {kind}")
        check_fit(source, alone, under("transformer", tensors), {})
        return
    if not isinstance(pipe, LoraBaseMixin):
        raise ValueError(f"{kind} takes no LoRA, got {source}")
    loader: Any = pipe
    options = {"unet_config": loader.unet.config} if "unet" in pipe._lora_loadable_modules else {}
    found = loader.lora_state_dict(source, return_lora_metadata=True, **options)
    tensors, about = (found[0], found[-1]) if isinstance(found, tuple) else (found, None)
    # By default pipelines load nothing into the second of two transformers.
    parts = [name for name in pipe._lora_loadable_modules if name != EXPERTS[1]]
    models = {name: getattr(pipe, name, None) for name in parts}
    if part == EXPERTS[1]:  # whose names in a file are those of the first
        models[EXPERTS[0]] = getattr(pipe, part, None)
        if models[EXPERTS[0]] is None:
            raise ValueError(f"{source} is for {part}, which this {kind} lacks")
    rest = [key for key in tensors if models.get(key.partition(".")[0]) is None]
    if len(rest) == len(tensors):
        raise ValueError(f"{source} holds no LoRA for {kind}")
    if rest:
        raise ValueError(
            f"{source} does not fit {kind}, which has no place for {len(rest)} of its "
            f"{len(tensors)} tensors, such as {named(rest)}"
        )
    for name, model in models.items():
        if model is not None and not name.startswith("text_encoder"):
            check_fit(source, model, under(name, tensors), under(name, about or {}))


def check_fit(
    source: str, model: nn.Module, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Check a LoRA against one model, as `check_lora` does.

    Args:
        tensors: tensors by their names in the model.
        about: options for PEFT in the file, if any. A pattern in place of the target modules
            names no layers, and ends of names match none.
    """
    whole = [key for key, x in tensors.items() if not x.is_floating_point()]
    if whole:
        kind = str(tensors[whole[0]].dtype).removeprefix("torch.")
        raise ValueError(f"{source} holds weights of {kind}: {named(whole)}")
    layers = {name: module for name, module in model.named_modules() if name}
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    for key, x in tensors.items():  # other names, such as alphas, are skipped
        if match := PARTS.fullmatch(key):
            layer, *which = match.groups()
            (down if any(one in DOWN for one in which) else up)[layer] = x
    targets = about.get("target_modules") or ()
    have = down.keys() | up.keys()
    asked = have | (layers.keys() & (set() if isinstance(targets, str) else {*targets}))
    wrong = {
        "are not in the model": have - layers.keys(),
        "have no weights or half of them": asked - (down.keys() & up.keys()),
        "are of another size": {
            name
            for name in down.keys() & up.keys() & layers.keys()
            if not _fits(down[name], up[name], layers[name])
        },
    }
    said = [f"{len(ns)} {what}, such as {named(sorted(ns))}" for what, ns in wrong.items() if ns]
    if said:
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: of its {len(asked)} layers "
            f"{'; '.join(said)}"
        )


def under(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Select the values whose names begin with `prefix` and a dot, and strip both."""
    begin = f"{prefix}."
    return {k.removeprefix(begin): x for k, x in values.items() if k.startswith(begin)}


def _parts_of(source: str) -> dict[str, str]:
    """Map the parts of a pipeline that a LoRA is for to the folders or files to load.

    A LoRA from elsewhere is for the first transformer. Raises FileNotFoundError for a LoRA of two
    experts that lacks the second.
    """
    try:
        read_recipe(source)
    except (FileNotFoundError, ValueError):
        return {EXPERTS[0]: source}
    return {part: str(path) for part, path in folders_of(source).items()}


def _loads_alone(pipe: "DiffusionPipeline") -> nn.Module | None:
    """Return the transformer of a pipeline that loads no LoRA itself if the transformer does, as
    HunyuanVideo 1.5's; None for any other pipeline."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    transformer = getattr(pipe, "transformer", None)
    if isinstance(pipe, LoraBaseMixin) or not hasattr(transformer, "load_lora_adapter"):
        return None
    return transformer


def _file_of(source: str) -> Path:
    """Return the file of a LoRA, given by itself, its folder or its repository."""
    path = expanded(source)
    if path.is_dir():
        path /= WEIGHTS
    elif not path.exists():
        path = fetched(source, WEIGHTS)
    if not path.is_file():
        raise FileNotFoundError(f"there is no LoRA at {path}")
    return path


def _fits(down: Tensor, up: Tensor, layer: nn.Module) -> bool:
    """Whether the product of the two has the shape of the layer's weight, if that is known."""
    weight = getattr(layer, "weight", None)
    if min(down.ndim, up.ndim) < 2 or down.shape[0] != up.shape[1]:
        return False
    if not isinstance(weight, Tensor) or weight.ndim < 2 or not weight.is_floating_point():
        return True  # quantised weights are packed, so their shape tells nothing
    return (up.shape[0], down.shape[1]) == tuple(weight.shape[:2])
