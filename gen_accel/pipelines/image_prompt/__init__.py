"""Image prompts on live diffusers pipelines: load an adapter, set images, take it off again."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.image_prompt import ImageAdapter
from gen_accel.attention_processors.seam import is_compiled
from gen_accel.parsing import shown
from gen_accel.pipelines.image_prompt.branch import child_name
from gen_accel.pipelines.image_prompt.formats import (
    AdapterFile,
    build_adapter,
    differences,
    find_adapter,
    read_adapter,
)
from gen_accel.pipelines.image_prompt.guidance import MODELS
from gen_accel.pipelines.image_prompt.handle import ImagePrompt
from gen_accel.pipelines.image_prompt.strength import Scale, ScaleRange
from gen_accel.registry import needed_for

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline, ModelMixin
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

__all__ = ["ImagePrompt", "ScaleRange", "load_image_prompt"]


def load_image_prompt(
    pipe: "DiffusionPipeline | ModelMixin",
    source: "ImageAdapter | str | Path",
    *,
    name: str = "default",
    scale: "Scale | Sequence[ScaleRange]" = 1.0,
    subfolder: str | None = None,
    weight_name: str | None = None,
    variant: str | None = None,
    image_encoder: "PreTrainedModel | str | Path | None" = None,
    part: str | None = None,
) -> "ImagePrompt":
    """Let images prompt a pipeline, in addition to its text.

        prompt = gen_accel.load_image_prompt(pipe, "h94/IP-Adapter", subfolder="models",
                                             weight_name="ip-adapter_sd15.safetensors")
        prompt.set_image("cat.png")
        image = pipe("on a beach").images[0]
        prompt.remove()

    Works with any method of `gen_accel.attach` and with any LoRA, loaded before or after. Several
    adapters, each with a name of its own, add up. Load before `torch.compile`.

    Args:
        pipe: a diffusers pipeline; or a transformer or UNet.
        source: a file, a folder, a repository of the hub, or an `ImageAdapter`. The demo model's
            adapter is at `gen_accel.demo.image_prompt_path()`.
        name: name of the adapter on this model.
        scale: see `ImagePrompt.set_scale`.
        subfolder, weight_name: location in a folder or repository.
        variant: kind of the file, one of `formats.VARIANTS`, if its keys do not tell:
            "faceid_plus_v2" for a file without "plusv2" in its name.
        image_encoder: encoder of the adapter's features: a CLIP vision model, its folder or
            repository. By default the encoder that the adapter's file names, or else the
            pipeline's own.
        part: "transformer" or "transformer_2" of a pipeline with both, if the adapter is for one.
            By default the part that the file says it was trained on, or else both.

    Raises:
        ValueError: an adapter for another model or of another variant, a name that is taken, a
            model that no family serves or that is compiled already, or a scale that does not fit.
        FileNotFoundError: nothing at `source`.
        TypeError: `pipe` is neither a pipeline nor a module.
    """
    if not name or "." in name:
        raise ValueError(f"name must not be empty or hold a dot, got {shown(name)}")
    served = served_transformers(pipe)
    models = {part: model for part, model in served.items() if part in MODELS}
    file = None
    if not isinstance(source, ImageAdapter):
        path = find_adapter(source, subfolder, weight_name)
        file = read_adapter(path, variant=variant)
        models = _chosen(models, part, file.metadata, pipe, bool(file.start))
        first = next(iter(models.values()))
        weight = next(first.parameters())
        half = weight.dtype in (torch.float16, torch.bfloat16)
        device = torch.device("cpu") if weight.is_meta else weight.device
        source = build_adapter(file, first).to(device, weight.dtype if half else torch.float32)
        source.requires_grad_(False).eval()
    elif variant is not None:
        raise ValueError(
            f"variant={variant!r} says what a file is, and an ImageAdapter, here of "
            f"{source.variant!r}, knows by itself: leave it out"
        )
    else:
        models = _chosen(models, part, source.metadata, pipe, source.start is not None)
    for key, model in models.items():
        if is_compiled(model):
            raise ValueError(
                f"{key} is compiled already; load it again, then the image prompt, and compile"
            )
        if hasattr(model, child_name(name)):
            raise ValueError(
                f"an image prompt {shown(name)} is on {key} already: remove it, or give "
                "another name"
            )
    owner = None if isinstance(pipe, nn.Module) else pipe
    prompt = ImagePrompt(models, owner, source, name, scale, image_encoder)
    if file is not None and file.lora:
        try:
            prompt.companions.append(load_identity_lora(pipe, file, child_name(name)))
        except BaseException:
            prompt.remove()
            raise
    return prompt


def load_identity_lora(
    pipe: "DiffusionPipeline | ModelMixin", file: AdapterFile, name: str
) -> Callable[[], None]:
    """Put the LoRA of a FaceID adapter on the UNet, beside any active adapters.

    Other adapters stay as active, as strong and as trainable as they were.

    Args:
        pipe: a pipeline with a `unet`, or the UNet.
        name: name of the adapter in PEFT; must be free.

    Returns:
        A function that takes the LoRA off. If it was the only adapter, the UNet has its stock
        layers again.

    Raises:
        ValueError: no LoRA in the file, a LoRA for another model, a name that is taken, or
            adapters that are merged or switched off.
    """
    with needed_for("an adapter of FaceID", extra="video"):
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
    unet: Any = getattr(pipe, "unet", pipe)
    matrices = _lora_of(file, unet)
    if name in (getattr(unet, "peft_config", None) or {}):
        raise ValueError(f"an adapter called {shown(name)} is there already; give another name")
    tuned = [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]
    if any(m.merged or m.disable_adapters for m in tuned):
        raise ValueError(
            "the UNet's adapters are merged or switched off; call unfuse_lora or enable_lora first"
        )
    (rank,) = {down.shape[0] for down, _ in matrices.values()}
    with _undisturbed(unet) as active:
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(matrices)), name
        )
        active.append(name)
    with torch.no_grad():
        for target, (down, up) in matrices.items():
            layer = unet.get_submodule(target)
            layer.lora_A[name].weight.copy_(down)
            layer.lora_B[name].weight.copy_(up)

    def remove() -> None:
        known = getattr(unet, "peft_config", None) or {}
        if name not in known:
            return
        if len(known) == 1:
            unet.unload_lora()
            return
        with _undisturbed(unet) as active:
            unet.delete_adapters(name)
            if name in active:
                active.remove(name)

    return remove


def _lora_of(file: AdapterFile, unet: "ModelMixin") -> dict[str, tuple[Tensor, Tensor]]:
    """Map the name of each linear layer to its two matrices, (rank, in) and (out, rank)."""
    if not file.lora:
        raise ValueError(f"{file.origin} has no LoRA of its own")
    if not hasattr(unet, "down_blocks"):
        raise ValueError(f"a FaceID adapter is for a UNet, got {type(unet).__name__}")
    # Without AnimateDiff's temporal attentions.
    spatial = [name for name in unet.attn_processors if "motion_modules" not in name]
    names = [name.removesuffix(".processor") for name in spatial]
    expected = [
        f"{n}.to_{part}_lora.{side}.weight"
        for n in range(len(names))
        for part in ("q", "k", "v", "out")
        for side in ("down", "up")
    ]
    parts = differences(expected, file.lora)
    if parts:
        raise ValueError(
            f"the LoRA in {file.origin} is for another model than {type(unet).__name__} with its "
            f"{len(names)} attentions: {'; '.join(parts)}"
        )
    ranks = {file.lora[f"{n}.to_q_lora.down.weight"].shape[0] for n in range(len(names))}
    if len(ranks) > 1:
        raise ValueError(f"the LoRA in {file.origin} has several ranks, {sorted(ranks)}")
    found = {}
    for n, name in enumerate(names):
        for part in ("q", "k", "v", "out"):
            target = f"{name}.to_{part}" + (".0" if part == "out" else "")
            shape = unet.get_parameter(f"{target}.weight").shape
            down, up = (file.lora[f"{n}.to_{part}_lora.{s}.weight"] for s in ("down", "up"))
            if (up.shape[0], down.shape[1]) != shape or {down.shape[0], up.shape[1]} != ranks:
                raise ValueError(
                    f"the LoRA in {file.origin} is for another model: at {target} it is "
                    f"{tuple(up.shape)} by {tuple(down.shape)}, the layer {tuple(shape)}"
                )
            found[target] = (down, up)
    return found


@contextmanager
def _undisturbed(unet: "ModelMixin") -> Iterator[list[str]]:
    """Restore active adapters and `requires_grad` after PEFT adds or deletes an adapter.

    PEFT would activate the added adapter, or any other after a deletion, and reset
    `requires_grad`. At the end of the context the adapters in the yielded list are active.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    def tuned() -> "list[BaseTunerLayer]":
        return [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]

    layers = tuned()
    active = list(layers[0].active_adapters) if layers else []
    trains = {p: p.requires_grad for p in unet.parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        yield active
    for layer in tuned():
        layer.set_adapter(active)
    for parameter in unet.parameters():
        parameter.requires_grad_(trains.get(parameter, False))


def _chosen(
    models: "dict[str, ModelMixin]",
    part: str | None,
    metadata: Mapping[str, object],
    pipe: "DiffusionPipeline | ModelMixin",
    starts: bool,
) -> "dict[str, ModelMixin]":
    """Choose the models that the adapter is for.

    An adapter with a `start` goes onto one model only: its layers began as copies of that model's
    layers, and their initial output is subtracted.
    """
    if part is not None and part not in models:
        raise ValueError(f"part must be one of {', '.join(models)}, got {shown(part)}")
    if isinstance(pipe, nn.Module):
        return models
    recipe = metadata.get("recipe")
    wanted = part or (recipe.get("part") if isinstance(recipe, Mapping) else None)
    if wanted is None:
        if starts and len(models) > 1:
            raise ValueError(
                f"the adapter starts from one model, and {type(pipe).__name__} has "
                f"{' and '.join(models)}: say which by part="
            )
        return models
    if wanted not in models:
        raise ValueError(
            f"the adapter is for the {wanted}, and {type(pipe).__name__} has "
            f"{', '.join(models)}: say where it goes by part="
        )
    return {wanted: models[wanted]}
